"""What a worker says when it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from streamflow.cli.output import note
from streamflow.config import LogFormat
from streamflow.web.overview import AgentLine, Overview

_MOST = 20
"""Agents and topics shown one by one; an app may have hundreds."""

logger = logging.getLogger("streamflow.worker")


def announce(overview: Overview, web: str, processes: int | None, log_format: LogFormat) -> None:
    """Say what starts: a block for people, one line in a structured log.

    Args:
        overview: The app.
        web: Address of the web server, or why there is none.
        processes: How many worker processes, where there are several.
        log_format: `console` or `json`.
    """
    if log_format == "json":
        logger.info(
            "worker of %s starts: version %s, broker %s, guarantee %s, agents %s, topics %s, data directory %s, web %s",
            overview.app,
            overview.version,
            overview.broker,
            overview.guarantee,
            ",".join(agent.name for agent in overview.agents) or "none",
            ",".join(overview.topics) or "none",
            overview.data_dir,
            web,
        )
    else:
        note(banner(overview, web, processes))


def banner(overview: Overview, web: str, processes: int | None) -> str:
    """The start banner.

    Args:
        overview: The app.
        web: Address of the web server, or why there is none.
        processes: How many worker processes, where there are several.
    """
    facts = [
        ("broker", overview.broker),
        ("guarantee", overview.guarantee.replace("_", " ")),
        ("data", overview.data_dir),
        ("web", web),
    ]
    if processes is not None:
        facts.append(("processes", str(processes)))
    facts += _labelled("agents", [_agent(agent) for agent in overview.agents])
    facts += _labelled("topics", [", ".join(overview.topics[: _MOST * 2])] if overview.topics else [])
    width = max(len(label) for label, _ in facts)
    lines = [f"{overview.app} · StreamFlow {overview.version}"]
    lines += [f"  {label:<{width}}  {text}" for label, text in facts]
    return "\n".join(lines)


def _agent(agent: AgentLine) -> str:
    return f"{agent.name}: {', '.join(agent.sources)}" + (f" -> {', '.join(agent.sinks)}" if agent.sinks else "")


def _labelled(label: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    shown = list(lines[:_MOST]) or ["none"]
    if len(lines) > _MOST:
        shown.append(f"and {len(lines) - _MOST} more")
    return [(label if number == 0 else "", line) for number, line in enumerate(shown)]
