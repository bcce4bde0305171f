"""What a bounded run says at its end."""

from __future__ import annotations

import logging
from dataclasses import asdict

from streamflow.cli.output import as_json, note, write
from streamflow.runtime.status import Outcome

logger = logging.getLogger("streamflow.worker")


def conclude(outcome: Outcome, seconds: float, *, as_json_line: bool, as_log: bool) -> None:
    """Say how a bounded run went: to people or in the log, and as a JSON object on standard output if asked to.

    Args:
        outcome: How far it got.
        seconds: How long it took.
        as_json_line: Whether to print the object.
        as_log: Whether people are told by the log.
    """
    text = conclusion(outcome, seconds)
    if as_log:
        logger.info("%s", text)
    else:
        note(text)
    if as_json_line:
        topics = [asdict(topic) for topic in outcome.topics]
        write([as_json({"finished": outcome.finished, "seconds": round(seconds, 3), "topics": topics})])


def conclusion(outcome: Outcome, seconds: float) -> str:
    """The closing line.

    Args:
        outcome: How far it got.
        seconds: How long it took.
    """
    total = sum(topic.processed for topic in outcome.topics)
    done = f"{total:,} record{'' if total == 1 else 's'} processed in {seconds:.1f} s"
    if outcome.finished:
        each = ", ".join(f"{topic.topic} {topic.processed:,}" for topic in outcome.topics)
        return f"done: {done}" + (f" ({each})" if len(outcome.topics) > 1 else "")
    left = ", ".join(f"{topic.topic} {topic.left:,}" for topic in outcome.topics if topic.left)
    return f"stopped before the end: {done}; not processed: {left or 'nothing so far'}. The next start goes on there"
