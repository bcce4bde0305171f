"""What becomes of a record that failed: the agent's `on_error` policy, applied and counted in one place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamflow.errors import RecordError
from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition
from streamflow.processing.policy import DeadLetter, ErrorPolicy, Retry, Skip
from streamflow.processing.topic import Topic
from streamflow.runtime.dead_letter import headers_of
from streamflow.runtime.derived import Processor
from streamflow.sensors import Sensors

if TYPE_CHECKING:
    from streamflow.runtime.outputs import Staged
    from streamflow.runtime.turn import Turn

logger = logging.getLogger("streamflow.agents")


class Drop:
    """Stands for a value when its record was passed over."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about a failure: exactly one of the fields is set; none of them means to skip the record."""

    retry_after_s: float | None = None
    dead_letter: Topic[Any, Any] | None = None
    stop: bool = False


class RecordErrors:
    """Decides about the failed records of one agent.

    Args:
        agent: The agent.
        sensors: Told each decision.
    """

    def __init__(self, agent: Processor, sensors: Sensors) -> None:
        self._agent = agent
        self._sensors = sensors
        self._told: set[type[BaseException]] = set()

    def decide(self, error: RecordError, attempt: int) -> Decision:
        """Decide, log and count.

        Args:
            error: What happened, its position set.
            attempt: How often the unit has failed, this time included.
        """
        policy: ErrorPolicy = self._agent.on_error
        if isinstance(policy, Retry):
            if attempt <= policy.times:
                delay_s = policy.delay_s(attempt)
                self._tell("retry", f"trying again in {delay_s:g} s ({attempt} of {policy.times})", error)
                return Decision(retry_after_s=delay_s)
            policy = policy.then
        if isinstance(policy, Skip):
            self._tell("skip", "skipped", error)
            return Decision()
        if isinstance(policy, DeadLetter):
            self._tell("dead_letter", f"sent to dead-letter topic {policy.topic.name!r}", error)
            return Decision(dead_letter=policy.topic)
        return self.stop()

    def stop(self) -> Decision:
        """Count a record that stops the worker."""
        self._sensors.record_error(self._agent.name, "stop")
        return Decision(stop=True)

    def _tell(self, policy: str, done: str, error: RecordError) -> None:
        self._sensors.record_error(self._agent.name, policy)
        # One line each; the traceback of the first of a kind only (a dead letter carries its own).
        kind = type(error.__cause__ or error)
        is_first = kind not in self._told
        self._told.add(kind)
        logger.warning(
            "agent %s: %s; %s", self._agent.name, error, done, exc_info=error.__cause__ if is_first else None
        )

    def dead_letters(self, turn: Turn, topic: Topic[Any, Any], error: RecordError, attempts: int) -> list[Staged]:
        """Dead letters of the whole unit in hand."""
        return [self._dead_letter(turn, topic, error, attempts, tp, record) for tp, record in turn.in_hand()]

    def _dead_letter(
        self,
        turn: Turn,
        topic: Topic[Any, Any],
        error: RecordError,
        attempts: int,
        tp: TopicPartition,
        record: LogRecord,
    ) -> Staged:
        output = turn.task.outputs.to(topic)
        headers = headers_of(record, tp, error, agent=self._agent.name, attempts=attempts)
        try:
            output.target.check_size(record.key, record.value, headers)
        except RecordError:
            headers = headers[:-1]  # the traceback
            output.target.check_size(record.key, record.value, headers)
        key = record.key
        return (output.of_key(key), output.target.taken_time(record.timestamp), key, record.value, headers)


def way_past(agent: Processor, error: RecordError) -> str:
    """What to write so that a record which stopped the worker is passed."""
    if not error.position:
        return (
            f"agent {agent.name!r} stopped the worker before it took a record: {error.message}\n"
            f"  on_error= is about records and does not apply; the agent's own code has to be mended."
        )
    return (
        f"agent {agent.name!r} stopped the worker at {error.position}: {error.message}\n"
        f"  Nothing past this record was committed; the next start meets it again. To get past it, fix its cause, or\n"
        f"  declare @app.agent(..., on_error=sf.Skip()), on_error=sf.DeadLetter(topic) or on_error=sf.Retry(3)."
    )
