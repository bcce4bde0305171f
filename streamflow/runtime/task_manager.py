"""Opens and closes tasks as the group assigns, revokes and loses partitions.

What is assigned starts at its committed offsets; what is revoked finishes the records in hand, commits, and only then
is let go; what is lost is dropped with all that is uncommitted. Tasks that stay are not touched, unless the log shows
that another worker has had them in between: those start anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.abc

from streamflow.clock import Clock
from streamflow.config import Settings
from streamflow.errors import (
    ClosedError,
    FatalError,
    StreamFlowError,
    TopologyError,
)
from streamflow.log.api import Assigned, GroupEvent, Lost, Revoked, Told
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.processing.topology import SubTopology
from streamflow.runtime.arrivals import Arrivals
from streamflow.runtime.assignment.cluster import UNKNOWN_LAG, TaskId
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.derived import processors_of
from streamflow.runtime.hooks import call_hooks
from streamflow.runtime.layout import Layout
from streamflow.runtime.local_state import LocalState, LocalStates
from streamflow.runtime.open_log import OpenLog
from streamflow.runtime.patience import PATIENCE_S
from streamflow.runtime.standbys import Standbys
from streamflow.runtime.task import Surroundings, Task
from streamflow.runtime.task_starts import Start, TaskStarts
from streamflow.runtime.task_view import TaskView
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.tasks")

_RETRY_S = 0.2
_MAX_REBUILDS = 3
_REBUILDS_WITHIN_S = 600.0
_LAST_CLOSE_S = 0.8


class TaskManager:
    """The tasks of one worker.

    Args:
        app: The app.
        layout: How its work is cut into tasks.
        settings: Time-outs, offset reset.
        log: What is open of the log.
        shared: What tasks share.
        local: Opens what tasks keep on this machine.
        standbys: Stores of tasks that are elsewhere.
        tasks: Task group the tasks run in.
    """

    def __init__(
        self,
        app: Declarations,
        layout: Layout,
        settings: Settings,
        log: OpenLog,
        shared: Surroundings,
        local: LocalStates,
        standbys: Standbys,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        self._app = app
        self._settings = settings
        self._group = log.group
        self._reader = log.reader
        self._delivery = log.delivery
        self._shared = shared
        self._local = local
        self.standbys = standbys
        self._task_group = tasks
        self._layout = layout
        self._topics = app.every_topic()
        self._starts = TaskStarts(log, app, settings, layout, shared.clock)
        self._by_topic = {topic: sub for sub in layout.sub_topologies for topic in sub.topics}
        self._agents = {sub.name: processors_of(app, sub) for sub in layout.sub_topologies}
        # Of tasks that are not open: what is this worker's of them.
        self._incomplete: dict[tuple[str, int], set[TopicPartition]] = {}
        self._by_tp: dict[TopicPartition, Task] = {}
        self.tasks: dict[tuple[str, int], Task] = {}
        # Of those that are being opened or closed, what is said of their state.
        self._opening: dict[TaskId, int] = {}
        self._closing: dict[tuple[str, int], Task] = {}
        # Tasks with tables that were lost and have not come back.
        self.lost: set[TaskId] = set()
        self.changing = False
        self.is_finishing = False
        # Of the partitions that are lost by events that are not acted on yet, how often.
        self._lost_ahead: Counter[TopicPartition] = Counter()
        # What hooks were told has come, and were not told has gone.
        self._told_of: set[TopicPartition] = set()
        # Of the group's events and rebuilds, one is acted on at a time.
        self._acting = anyio.Lock()
        # When tasks were rebuilt, monotonic seconds.
        self._rebuilt: dict[tuple[str, int], deque[float]] = {}
        # Agents that went on after they were cancelled: task, name, and what they run in.
        self._deaf: list[tuple[str, str, asyncio.Task[None]]] = []
        self.assigned_once = anyio.Event()
        # Takes what was fetched; see `Arrivals.take`.
        self.fetched = Arrivals(self._starts, log.reader, shared, settings, self.task_of).take
        self.limits: dict[TopicPartition, int] = {}
        # Acts on what the assignor tells this worker, in turn with the other events of the group.
        self.on_told: Callable[[Told], Awaitable[None]] | None = None

    @property
    def _clock(self) -> Clock:
        return self._shared.clock

    @property
    def _sensors(self) -> Sensors:
        return self._shared.sensors

    def running(self) -> list[Task]:
        """Tasks whose work is to be committed."""
        return list(self.tasks.values())

    def task_of(self, tp: TopicPartition) -> Task | None:
        """The task that owns a source partition."""
        return self._by_tp.get(tp)

    def assigned_to(self, sub: SubTopology) -> set[int]:
        """The partitions of a sub-topology that the group gives this worker, whether their tasks are open or not."""
        return {tp.partition for tp in self._group.assignment if tp.topic in sub.topics}

    @property
    def has_opened(self) -> bool:
        """Whether the tasks of all that is assigned are open, restored or not."""
        return not self.changing and self._group.assignment <= self._by_tp.keys()

    @property
    def has_restored(self) -> bool:
        """Whether they are restored, too."""
        return self.has_opened and all(task.restored.is_set() for task in self.running())

    @property
    def runs_user_code(self) -> bool:
        """Whether agents or hooks of the app may have begun to run."""
        app = self._app
        if any(task.restored.is_set() for task in self.running()):
            return True
        has_hooks = bool(app.assigned_hooks) and bool(self._told_of)
        return has_hooks or (bool(self.tasks) and any(table.on_recover for table in app.tables.values()))

    # --- events ------------------------------------------------------------------------------------------------

    def foresee(self, event: GroupEvent | Overtaken) -> None:
        """Note what an event means for commits that may be made before it is acted on."""
        if isinstance(event, Lost):
            self._lost_ahead.update(event.partitions)
            for task in self._tasks_of(event.partitions):
                task.lost = True

    async def handle(self, event: GroupEvent | Overtaken) -> None:
        """Act on one event of the group; events are handled one after the other."""
        async with self._acting_alone():
            if isinstance(event, Assigned):
                await self._assigned(event)
            elif isinstance(event, Revoked):
                await self._revoked(event.partitions)
            elif isinstance(event, Lost):
                await self._lost(event)
            elif isinstance(event, Told):
                if self.on_told is not None:
                    await self.on_told(event)
            else:
                await self._open_anew(event.task)
            if not self.is_finishing:
                self.standbys.go_on(self.has)

    def has(self, task: TaskId) -> bool:
        """Whether a task is open here."""
        return task in self.tasks

    @asynccontextmanager
    async def _acting_alone(self) -> AsyncGenerator[None]:
        async with self._acting:
            self.changing = True
            try:
                yield
            finally:
                self.changing = False

    async def rebuild(self, task: Task) -> None:
        """Close a task whose local state cannot be used, and open it anew at what the log has committed.

        Closing sets the store aside. What the task had not committed is processed again.
        """
        async with self._acting_alone():
            key = task.sub_topology.name, task.partition
            if self.tasks.get(key) is not task or task.tables is None:
                return  # it has gone to another worker meanwhile
            logger.error("task %s: %s; its local state is rebuilt from the log", task.name, task.tables.damage)
            await self._delivery.commit([])  # one that is under way may hold the task's
            await self._close([task], frozenset())
            if self._is_kept(task):
                try:
                    self._check_rebuilds(key, task)
                except FatalError as error:
                    self._shared.fail(error)
                else:
                    await self._open_if_kept(key, task)

    def _check_rebuilds(self, key: tuple[str, int], task: Task) -> None:
        now_s = self._clock.monotonic()
        times = self._rebuilt.setdefault(key, deque(maxlen=_MAX_REBUILDS))
        if len(times) == _MAX_REBUILDS and now_s - times[0] < _REBUILDS_WITHIN_S:
            why = task.tables.damage if task.tables is not None else None
            raise FatalError(
                f"task {task.name}: its local state was rebuilt {_MAX_REBUILDS} times within "
                f"{_REBUILDS_WITHIN_S / 60:.0f} minutes and is unusable again: {why}. Check the disk under data_dir"
            )
        times.append(now_s)

    async def _assigned(self, event: Assigned) -> None:
        partitions = event.partitions
        concerned: dict[tuple[str, int], set[TopicPartition]] = {}
        for tp in partitions:
            key = self._by_topic[tp.topic].name, tp.partition
            concerned[key] = self._incomplete.setdefault(key, set())
            concerned[key].add(tp)
        complete = {key: tps for key, tps in concerned.items() if self._is_complete(key, tps)}
        for key in complete:
            del self._incomplete[key]
        self._tell_of_new(partitions)
        for key, tps in complete.items():
            if (grown := self.tasks.get(key)) is not None:
                tps |= await self._let_go(grown)
        starts = await self._starts.of([tp for tps in complete.values() for tp in tps])
        if partitions:
            logger.info("assigned: %s", _named(partitions))
            self._sensors.rebalanced(len(partitions), 0, 0)
            self._told_of |= partitions
            await self._call_hooks("on_assigned", self._app.assigned_hooks, partitions)
        if self.is_finishing:
            return  # a task that began now would have nobody to commit it
        await self._open_all({key: {tp: starts[tp] for tp in tps} for key, tps in complete.items()})
        self.assigned_once.set()

    async def _open_anew(self, task: TaskView) -> None:
        """Open a task again that another worker has had meanwhile, where it still belongs to this one."""
        own = next(((key, each) for key, each in self.tasks.items() if each is task), None)
        if own is None:
            return
        key, held = own
        await self._close([held], frozenset())
        if self._is_kept(held):
            await self._open_if_kept(key, held)

    def _is_kept(self, closed: Task) -> bool:
        """Whether a task that was closed still belongs to this worker, which may have lost it meanwhile."""
        return not self.is_finishing and self._group.assignment.issuperset(closed.committed)

    async def _open_if_kept(self, key: tuple[str, int], closed: Task) -> None:
        starts = await self._starts.of(list(closed.committed))
        if self._is_kept(closed):
            await self._open_all({key: starts})

    async def _open_all(self, starts: Mapping[tuple[str, int], Mapping[TopicPartition, Start]]) -> None:
        changelogs = self._local.changelogs({self._by_topic[next(iter(of_task)).topic] for of_task in starts.values()})
        if changelogs:
            self._local.know(await self._starts.described(changelogs))
        for key, of_task in starts.items():
            if self.is_finishing:
                return
            try:
                await self._open(key, of_task)
            except StreamFlowError as error:
                self._shared.fail(error)
                return

    def _is_complete(self, key: tuple[str, int], tps: set[TopicPartition]) -> bool:
        """Whether a task has all its partitions, with those that it was opened with."""
        sub, task = self._by_topic[next(iter(tps)).topic], self.tasks.get(key)
        return tps.union(() if task is None else task.committed).issuperset(self._layout.of_task(sub, key[1]))

    def _tell_of_new(self, partitions: Iterable[TopicPartition]) -> None:
        """Say which topics have more partitions than they had when this worker started."""
        counts: dict[str, int] = {}
        for tp in filter(self._starts.is_new, partitions):
            counts[tp.topic] = max(tp.partition + 1, counts.get(tp.topic, 0))
        for topic, count in sorted(counts.items()):
            if self._by_topic[topic].tables:
                self._shared.fail(_grown(topic, count, self._layout.counts[topic], self._by_topic[topic].tables))
                continue
            logger.warning(
                "topic %s has %d partitions or more, and had %d when this worker started: the new ones are processed "
                "from their beginning. Keys may have moved to other partitions, and what this app sends to the topic "
                "goes to the old ones until its workers are restarted; a partitions= it declares has to be changed "
                "before that",
                topic,
                count,
                self._layout.counts[topic],
            )

    async def _let_go(self, task: Task) -> frozenset[TopicPartition]:
        """Commit and close a task that another topic's new partition joins; its partitions, to be opened again."""
        partitions = frozenset(task.committed)
        await self._finish([task])
        await self._delivery.commit([task])
        await self._close([task], frozenset())
        return partitions

    async def _finish(self, tasks: Sequence[Task]) -> None:
        with anyio.move_on_after(min(self._settings.shutdown_timeout_s, self._settings.rebalance_timeout_ms / 2000)):
            async with anyio.create_task_group() as group:
                for task in tasks:
                    group.start_soon(task.finish_records)

    async def _open(self, key: tuple[str, int], starts: Mapping[TopicPartition, Start]) -> None:
        sub = self._by_topic[next(iter(starts)).topic]
        self._incomplete.pop(key, None)
        topics = [self._topics[name] for name in sub.topics]
        positions = {tp: start.position for tp, start in starts.items()}
        mark = CommitMark.of_task({tp: start.mark for tp, start in starts.items()})
        self.lost.discard(TaskId(*key))
        lag = self._lag_before(TaskId(*key), mark)
        local = await self._open_state(sub, key[1], mark, lag)
        task = Task(sub, key[1], self._agents[sub.name], topics, positions, self._shared, mark, local)
        if task.tables is not None:
            task.tables.restoring.expected = lag
        task.commit_id = CommitMark.of(starts[task.anchor].mark).id
        for tp, start in starts.items():
            self._by_tp[tp] = task
            if start.mark is None:
                task.committed[tp] = -1  # so that the first commit pins where the task started
            self._reader.add(tp, start.position)
            task.inputs.by_tp[tp].limit = self.limits.get(tp)
        self.tasks[key] = task
        self._task_group.start_soon(task.run, name=f"task {task.name}")

    def _lag_before(self, task: TaskId, mark: CommitMark | None) -> int:
        """What a task that comes lacks of its state, as far as that is known before it is restored."""
        if mark is None:
            return 0  # nothing was committed yet: there is nothing to have
        lag = self.standbys.lag_of(task)
        return UNKNOWN_LAG if lag is None else lag

    async def _open_state(
        self, sub: SubTopology, partition: int, mark: CommitMark | None, lag: int
    ) -> LocalState | None:
        task = TaskId(sub.name, partition)
        if sub.tables:
            self._opening[task] = lag
        try:
            return await self._local.open(sub, partition, mark, await self.standbys.hand_over(task))
        finally:
            self._opening.pop(task, None)

    async def _revoked(self, partitions: frozenset[TopicPartition]) -> None:
        asked = partitions - self._lost_ahead.keys()  # the others are lost, and told as that
        if not asked:
            return
        logger.info("giving back: %s", _named(asked))
        tasks = self._tasks_of(asked)
        await self._finish(tasks)
        # All in one, so that what stays does not wait for a commit of its own behind this one.
        await self._delivery.commit(self.running())
        await self._close(tasks, asked)
        given_back = asked - self._lost_ahead.keys()
        if given_back:
            logger.info("revoked: %s", _named(given_back))
            self._sensors.rebalanced(0, len(given_back), 0)
            self._group.revoked(given_back)

    async def _lost(self, event: Lost) -> None:
        self._lost_ahead -= Counter(event.partitions)
        logger.warning("lost: %s: %s", _named(event.partitions), event.reason)
        tasks = self._tasks_of(event.partitions)
        for task in tasks:
            task.lost = True
            if task.tables is not None:
                self.lost.add(TaskId(task.sub_topology.name, task.partition))
        await self._close(tasks, event.partitions)
        self._sensors.rebalanced(0, 0, len(event.partitions))

    def _tasks_of(self, partitions: Iterable[TopicPartition]) -> list[Task]:
        return list({id(task): task for tp in partitions if (task := self._by_tp.get(tp)) is not None}.values())

    async def _close(
        self, tasks: Sequence[Task], partitions: frozenset[TopicPartition], patience_s: float = PATIENCE_S
    ) -> None:
        for task in tasks:
            # A commit under way may hold more of it; refused once, it is sent again without that.
            task.lost = True
            for tp in task.committed:
                self._by_tp.pop(tp, None)
                self._reader.remove(tp)
            self._closing[task.sub_topology.name, task.partition] = task
            self.tasks = {key: each for key, each in self.tasks.items() if each is not task}
            task.cancel(patience_s)
        for task in tasks:
            await task.closed()
            self._deaf.extend((task.name, *each) for each in task.deaf.items())
            try:
                await task.close_tables()
                self._note_state(task)
            except StreamFlowError as error:
                # The worker ends, but the others let go of their stores, and hooks of what they hold, all the same.
                logger.exception("task %s: its tables were not closed as they should be", task.name)
                self._shared.fail(error)
            finally:
                self._closing.pop((task.sub_topology.name, task.partition), None)
        for task in tasks:  # what stays of them waits for the rest to come back, or for the task to be opened anew
            key = task.sub_topology.name, task.partition
            self._incomplete.setdefault(key, set()).update(task.committed)
        for tps in self._incomplete.values():
            tps -= partitions
        self._incomplete = {key: tps for key, tps in self._incomplete.items() if tps}
        gone = partitions & self._told_of
        self._told_of -= gone
        if gone:
            await self._call_hooks("on_revoked", self._app.revoked_hooks, gone)

    def _note_state(self, task: Task) -> None:
        """Say from now on what the state that a closed task leaves here lacks."""
        tables = task.tables
        if tables is not None and tables.left_at is not None:
            left = TaskId(task.sub_topology.name, task.partition)
            self.standbys.left(left, tables.left_at, tables.restoring.lag, ran=tables.is_level)

    async def _call_hooks(
        self, kind: str, hooks: Sequence[Callable[..., Any]], partitions: frozenset[TopicPartition]
    ) -> None:
        error = await call_hooks(kind, hooks, set(partitions))
        if error is not None:
            self._shared.fail(error)

    # --- what is told to the group ------------------------------------------------------------------------------

    def lags(self) -> dict[TaskId, int]:
        """How many records the state of each task lacks that is here; tasks that run with all of it are not in it."""
        lags = self.standbys.lags() | self._opening
        for key, task in self._open_tasks():
            lags.pop(TaskId(*key), None)
            if task.tables is not None and not task.tables.is_level:
                lags[TaskId(*key)] = task.tables.restoring.lag
        return lags

    def ran(self) -> frozenset[TaskId]:
        """Tasks that run here with all of their state, or did so until just now."""
        running = (
            TaskId(*key)
            for key, task in self._open_tasks()
            if task.tables is not None and task.tables.is_level and task.tables.damage is None
        )
        return frozenset(running).union(self.standbys.dormant.ran)

    def _open_tasks(self) -> Iterable[tuple[tuple[str, int], Task]]:
        return [*self._closing.items(), *self.tasks.items()]

    # --- stop --------------------------------------------------------------------------------------------------

    async def finish_records(self) -> None:
        """Hand out nothing more, open nothing more, and wait until every record in hand is done."""
        self.is_finishing = True
        async with anyio.create_task_group() as group:
            for task in self.running():
                group.start_soon(task.finish_records)

    async def close(self) -> None:
        """Cancel all agents; those that went on when they were cancelled are the worker's failure."""
        try:
            await self._close(self.running(), frozenset(self._told_of), _LAST_CLOSE_S)
        finally:
            if deaf := sorted({f"{name!r} (task {task})" for task, name, agent in self._deaf if not agent.done()}):
                self._shared.fail(
                    ClosedError(
                        f"the worker has stopped, but not agent {', '.join(deaf)}: it goes on after it was cancelled. "
                        "Let `asyncio.CancelledError` pass: catch Exception, not BaseException, and raise it again"
                    )
                )


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Another worker has committed for a task that is held here.

    Attributes:
        task: The task.
    """

    task: TaskView


def _grown(topic: str, count: int, before: int, tables: Sequence[str]) -> TopologyError:
    return TopologyError(
        f"topic {topic!r} has {count} partitions or more, and had {before} when the tables {', '.join(tables)} were "
        "partitioned like it: keys are in other partitions now than what was kept for them. Stop all workers and start "
        "the app over, `streamflow reset APP`, or read the topic by way of `group_by`, whose topic keeps its count"
    )


def _named(partitions: Iterable[TopicPartition]) -> str:
    return ", ".join(str(tp) for tp in sorted(partitions))
