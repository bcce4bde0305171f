"""An app at a glance: what the start banner and the status page show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamflow.config import Settings
from streamflow.metrics import package_version
from streamflow.processing.declarations import Declarations
from streamflow.processing.policy import policy_text


@dataclass(frozen=True)
class AgentLine:
    """One agent.

    Attributes:
        name: Its name.
        sources: Topics it reads.
        sinks: Topics it writes to by `sink=`.
        on_error: Its error policy.
        concurrency: Records of one partition in progress at once.
        place: Where it was declared, `file:line`.
    """

    name: str
    sources: tuple[str, ...]
    sinks: tuple[str, ...]
    on_error: str
    concurrency: int
    place: str


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
        tables: Names of the tables that its web server answers reads of.
    """

    app: str
    version: str
    broker: str
    guarantee: str
    data_dir: str
    agents: Sequence[AgentLine]
    topics: Sequence[str]
    tables: Sequence[str] = ()


def agent_lines(app: Declarations) -> list[AgentLine]:
    """The app's agents in order of declaration.

    Args:
        app: Its declarations.
    """
    return [
        AgentLine(
            agent.name,
            tuple(topic.name for topic in agent.input_topics),
            tuple(topic.name for topic in agent.sink_topics),
            policy_text(agent.on_error),
            agent.concurrency,
            agent.place,
        )
        for agent in app.agents.values()
    ]


def overview_of(app: Declarations, settings: Settings, broker: str, guarantee: str) -> Overview:
    """Make an app's overview.

    Args:
        app: Its declarations.
        settings: Resolved.
        broker: Absolute address of the log, without secrets.
        guarantee: Processing guarantee in force.
    """
    topics = tuple(app.every_topic())
    tables = (*app.tables, *app.global_tables) if settings.serve_tables else ()
    return Overview(app.id, package_version(), broker, guarantee, settings.data_dir, agent_lines(app), topics, tables)
