"""How the agents of a task are fed: one at a time and directly, or several records in hand through lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamflow.model.record import TopicPartition
from streamflow.runtime.derived import Processor
from streamflow.runtime.direct import DirectFeed
from streamflow.runtime.feed import Feed
from streamflow.runtime.lanes import Dispatcher, LaneFeed
from streamflow.runtime.ledger import Ledger
from streamflow.runtime.local_state import LocalState
from streamflow.runtime.record_errors import RecordErrors
from streamflow.runtime.run import AgentRun
from streamflow.runtime.task_view import TaskView


def runs_of(
    task: TaskView, agents: list[Processor], local: LocalState | None
) -> tuple[list[AgentRun], Dispatcher | None, Callable[[], Mapping[TopicPartition, int]]]:
    """Make the runs of a task's agents.

    Args:
        task: The task, whose tables are there.
        agents: Its agents.
        local: Its tables before it runs; None without tables.

    Returns:
        One run for each agent and unit of its concurrency (none in the leader topic's task); who hands records to them,
        None where the one run takes them itself; and who knows the next offset to process per source partition.
    """
    if len(agents) == 1 and agents[0].concurrency == 1 and not _fills_and_feeds(task, agents[0]):
        feed = DirectFeed(task, agents[0], RecordErrors(agents[0], task.sensors))
        _give_tables(task, feed, local, shared=agents[0].thread)
        return [AgentRun(agents[0], feed)], None, feed.positions
    ledger = Ledger(task.start_positions(), task.inputs.wake)
    lanes = [
        [LaneFeed(task, agent, RecordErrors(agent, task.sensors), ledger) for _ in range(agent.concurrency)]
        for agent in agents
    ]
    dispatcher = Dispatcher(task, ledger, lanes, in_step=_share_tables(agents, local))
    for lane in (feed for each in lanes for feed in each):
        _give_tables(task, lane, local, shared=True)
    return [AgentRun(feed.agent, feed) for each in lanes for feed in each], dispatcher, ledger.positions


def _share_tables(agents: list[Processor], local: LocalState | None) -> bool:
    """Whether two agents may touch one table, and write it."""
    if local is None:
        return False
    written = {table.name for table in local.tables if table.source is None}
    names = [name for agent in agents for name in written.intersection(local.by_agent.get(agent.name, ()))]
    return len(names) > len(set(names))


def _fills_and_feeds(task: TaskView, agent: Processor) -> bool:
    """Whether a topic fills a table and is read by the agent, too, so that each record has to go to both."""
    filling = task.source_tables
    return filling is not None and any(topic.name in filling for topic in agent.input_topics)


def _give_tables(task: TaskView, feed: Feed[Any], local: LocalState | None, *, shared: bool) -> None:
    if task.tables is not None and local is not None:
        names = local.by_agent.get(feed.agent.name, ())
        feed.give(task.tables.stages(names, feed.touched, feed.number, shared=shared), task.tables.undo)
