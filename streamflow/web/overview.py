"""An app at a glance: what the start banner and the status page show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AgentLine:
    """One agent.

    Attributes:
        name: Its name.
        sources: Topics it reads.
        sinks: Topics it writes to by `sink=`.
    """

    name: str
    sources: tuple[str, ...]
    sinks: tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """An app at a glance.

    Attributes:
        app: Its id.
        version: StreamFlow's version.
        broker: Absolute address of the log.
        guarantee: Processing guarantee in force.
        data_dir: Absolute.
        agents: In order of declaration.
        topics: Names of all its topics.
    """

    app: str
    version: str
    broker: str
    guarantee: str
    data_dir: str
    agents: Sequence[AgentLine]
    topics: Sequence[str]
