"""Is a worker getting on? The snapshot behind `/live`, `/ready`, the metrics and the status page."""

from __future__ import annotations

from typing import Protocol

from streamflow.config import Settings
from streamflow.log.api import Group
from streamflow.processing.declarations import Declarations
from streamflow.runtime.global_tables import GlobalTables
from streamflow.runtime.standbys import Standbys
from streamflow.runtime.status import PartitionStatus, TaskStatus, WorkerStatus
from streamflow.runtime.task import Task
from streamflow.runtime.task_manager import TaskManager

_STALE_COMMIT_S = 30.0


class Observed(Protocol):
    """What a snapshot is taken of: a worker."""

    app: Declarations
    settings: Settings
    state: str
    guarantee: str
    manager: TaskManager | None
    group: Group | None
    global_tables: GlobalTables | None
    standbys: Standbys | None

    @property
    def address(self) -> str:
        """The log's absolute address."""
        ...

    def last_commit_age_s(self) -> float | None:
        """Seconds since the last commit; None before the first."""
        ...

    def uncommitted_for_s(self) -> float:
        """How long a commit has been trying, in seconds; 0 while none is."""
        ...


def snapshot(worker: Observed) -> WorkerStatus:
    """What a worker says about itself now."""
    manager, group = worker.manager, worker.group
    tasks = (
        tuple(sorted((_task_status(task) for task in manager.running()), key=lambda each: each.task)) if manager else ()
    )
    statistics = group.statistics() if group is not None else None
    heartbeat_age_s = statistics.last_heartbeat_age_s if statistics else None
    reason = _why_not_live(worker, tasks, heartbeat_age_s)
    state = "rebalancing" if worker.state == "running" and manager is not None and manager.changing else worker.state
    return WorkerStatus(
        app=worker.app.id,
        state=state,
        address=worker.address,
        guarantee=worker.guarantee,
        tasks=tasks,
        ready=worker.state == "running" and all(task.state == "running" for task in tasks),
        live=reason == "ok",
        live_reason=reason,
        rebalances=statistics.rebalances if statistics else 0,
        rebalance_s=statistics.rebalance_s if statistics else 0.0,
        last_commit_age_s=worker.last_commit_age_s(),
        global_tables=worker.global_tables.status() if worker.global_tables is not None else (),
        heartbeat_age_s=heartbeat_age_s,
        session_timeout_s=worker.settings.session_timeout_ms / 1000,
        uncommitted_s=worker.uncommitted_for_s(),
        memory_budget_bytes=worker.settings.memory_budget_bytes,
        standbys=worker.standbys.status() if worker.standbys is not None else (),
    )


def _task_status(task: Task) -> TaskStatus:
    positions = task.positions()
    partitions = tuple(
        PartitionStatus(
            topic=tp.topic,
            partition=tp.partition,
            position=position,
            end_offset=end,
            lag=None if end is None else max(0, end - position),
        )
        for tp, position in sorted(positions.items())
        for end in (task.inputs.end_offset(task.inputs.by_tp[tp]),)
    )
    restoring = task.tables.restoring.status() if task.tables is not None and task.state == "restoring" else None
    return TaskStatus(task.name, task.state, partitions, task.oldest_in_flight_s(), restoring)


def _why_not_live(worker: Observed, tasks: tuple[TaskStatus, ...], heartbeat_age_s: float | None) -> str:
    stuck_s = worker.settings.max_poll_interval_ms / 1000
    for task in tasks:
        if task.oldest_in_flight_s > stuck_s:
            return f"task {task.task} has had a record in hand for {task.oldest_in_flight_s:.0f} s"
    session_s = worker.settings.session_timeout_ms / 1000
    if heartbeat_age_s is not None and heartbeat_age_s > session_s:
        return f"the group has not answered a heartbeat for {heartbeat_age_s:.0f} s"
    waiting_s = worker.uncommitted_for_s()
    if waiting_s > max(_STALE_COMMIT_S, 3 * session_s):
        return f"nothing could be committed for {waiting_s:.0f} s"
    if worker.state == "stopped":
        return "the worker has stopped"
    return "ok"
