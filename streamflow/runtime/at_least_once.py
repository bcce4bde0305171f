"""At least once: outputs as soon as possible, acknowledged before the offsets are committed.

Table changes are acknowledged first, too, and the offsets say up to where of each changelog: what a crash leaves behind
that mark is taken back by the next owner, so that a replay does not count an update twice.

Nothing fences a process that was stopped for longer than its session: what it has handed to its connections may arrive
when it wakes up. In a changelog such a record stands where the owner's own should be, and the offset that the owner is
given for its next one says so, before a commit counts it in. The task then starts anew from its last commit, behind
which the record stands: it is taken back like what a crash leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter

from streamflow.clock import Clock
from streamflow.errors import FatalError, ProductionError, RetriableError, TaskMigratedError
from streamflow.log.api import Group, OffsetMark, Producer
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit import FIRST_RETRY_S, Commits
from streamflow.runtime.commit_mark import CommitMark, new_commit_id
from streamflow.runtime.task_tables import TaskTables
from streamflow.runtime.task_view import Sealed, TaskView
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.commits")

_SILENCE_POLL_S = 0.05
_MANY_BATCHES = 16
_BATCHES_PER_PARTITION = 2


class AtLeastOnce(Commits):
    """Outputs as soon as possible, acknowledged before the offsets are committed.

    Args:
        producer: Sends the outputs.
        group: See `Commits`.
        sensors: See `Commits`.
        clock: See `Commits`.
        session_timeout_s: Silence of the group after which the partitions may be another member's, in seconds.
    """

    def __init__(
        self,
        producer: Producer,
        group: Callable[[], Group],
        sensors: Sensors,
        clock: Clock,
        session_timeout_s: float,
    ) -> None:
        super().__init__(group, sensors, clock)
        self._producer = producer
        self._session_timeout_s = session_timeout_s
        self._sending = asyncio.Lock()
        self._unsent: deque[tuple[TopicPartition, SealedBatch]] = deque()
        self._unacknowledged: set[asyncio.Future[int]] = set()
        self._written: set[TopicPartition] = set()
        # Sealed, and not in a commit that is over: they are in the next one, also when theirs was cancelled.
        self._taken: list[Sealed] = []
        # The batches that were handed over since the last commit, and how many records each has.
        self._handed: dict[TopicPartition, list[tuple[asyncio.Future[int], int]]] = {}
        # Where those end that were acknowledged, in changelogs.
        self._ends: dict[TopicPartition, int] = {}
        self._failed: BaseException | None = None

    def abandon(self) -> None:
        """There is nothing to abandon: to stop waiting is to leave the offsets where they are."""

    async def idle(self, task: TaskView) -> None:
        """Send what the batch that ended has left; while the group is silent, the next commit does."""
        if task.outputs.waiting and not self._group_is_silent() and not self._is_behind():
            await self._send(task)

    async def linger(self, tasks: Iterable[TaskView]) -> None:
        """Send what slow agents have left."""
        for task in list(tasks):
            if task.outputs.waiting and not self._group_is_silent() and not self._is_behind():
                await self._send(task)

    async def make_room(self, task: TaskView) -> None:
        """Send it; the producer's memory bound holds the task back."""
        await self._send(task)
        if task.is_full():  # of table changes, which a commit alone sends
            await self._next_commit()

    async def _send(self, task: TaskView) -> None:
        """Send the outputs of a task; its table changes wait for the commit."""
        async with self._sending:
            await self._heard_from_group()
            if not task.lost:
                self._unsent.extend(task.outputs.seal())
                await self._send_unsent()

    async def _send_sealed(self, task: TaskView) -> None:
        """Take and send everything that a task has."""
        async with self._sending:
            await self._heard_from_group()
            if not task.lost:
                if sealed := task.seal():
                    self._taken.append(sealed)
                    self._unsent.extend(sealed.batches)
                await self._send_unsent()

    async def _send_unsent(self) -> None:
        while self._unsent:  # also what a cancelled call has left
            tp, batch = self._unsent[0]
            future = await self._producer.enqueue(tp, batch)
            self._sent([self._unsent.popleft()])
            self._unacknowledged.add(future)
            self._written.add(tp)
            self._handed.setdefault(tp, []).append((future, batch.num_records))
            future.add_done_callback(self._acknowledged)

    async def _heard_from_group(self) -> None:
        """Hold back while the group has been silent for a session.

        A process that was stopped and wakes up must learn first whether its partitions have gone to another member.
        """
        while self._group_is_silent():
            await self._clock.sleep(_SILENCE_POLL_S)

    def _is_behind(self) -> bool:
        """Whether the log acknowledges more slowly than batches are made: then they wait for the commit and grow.

        A partition takes one batch at a time; many small ones in line would hold up the commit for seconds, and a crash
        would repeat all of them.
        """
        return len(self._unacknowledged) > max(_MANY_BATCHES, _BATCHES_PER_PARTITION * len(self._written))

    def _group_is_silent(self) -> bool:
        age_s = self._group().statistics().last_heartbeat_age_s
        return age_s is not None and age_s > self._session_timeout_s

    def _acknowledged(self, future: asyncio.Future[int]) -> None:
        self._unacknowledged.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failed = self._failed or error

    async def commit(self, tasks: Iterable[TaskView]) -> None:
        """See `Delivery`."""
        async with self._one_at_a_time:
            started_s = perf_counter()
            self.trying_since_s = self._clock.monotonic()
            tasks = list(tasks)
            await self._pin(tasks)
            for task in filter(_is_pinned, tasks):
                await self._send_sealed(task)
            if self._unacknowledged:
                await asyncio.wait(self._unacknowledged)
            if self._failed is not None:
                raise (
                    self._failed
                    if not isinstance(self._failed, ProductionError)
                    else FatalError(f"an output could not be written: {self._failed}")
                ) from self._failed
            taken = self._taken
            ends = self._ends_of_changelogs(taken)
            commit_id = new_commit_id()
            for each in taken:
                each.task.commit_ids_under_way.add(commit_id)
            offsets = [(each.task, _marks(each, commit_id, ends)) for each in taken]
            committed = await self._commit_offsets([each for each in offsets if each[1]], started_s)
            for each in taken:
                if each.task in committed:
                    each.committed(commit_id, ends)
            self._taken, self._handed, self._ends = [], {}, {}
            self._committed.set()
            self.trying_since_s = None

    def _ends_of_changelogs(self, taken: Iterable[Sealed]) -> dict[TopicPartition, int]:
        """The offset after the last record of each changelog that was written; only a commit writes them.

        A task whose changelog was written by another process in between starts anew.
        """
        for each in taken:
            tables = each.task.tables
            if tables is None or each.task.lost:
                continue
            for tp, name in tables.changelogs().items():
                for future, count in self._handed.pop(tp, ()):
                    offset = future.result()
                    if offset != tables.ends[name]:
                        self._is_written_elsewhere(each.task, tp, tables.ends[name], offset)
                    tables.ends[name] = self._ends[tp] = offset + count
        return self._ends

    def _is_written_elsewhere(self, task: TaskView, tp: TopicPartition, expected: int, offset: int) -> None:
        if not task.lost:
            logger.warning(
                "task %s: its record in %s has offset %d, and %d was the next one: another process has written there, "
                "which had the task before, was stopped and woke up; the task starts anew from its last commit, and "
                "takes that back",
                task.name,
                tp,
                offset,
                expected,
            )
            self._is_overtaken(task)

    async def _pin(self, tasks: Iterable[TaskView]) -> None:
        """Say where changelogs stand before anything is added to them, where the last commit does not.

        It does not for a new task, a new table, and after exactly once.
        """
        fresh = [task for task in tasks if _is_to_be_pinned(task) and not task.lost and task.is_changed()]
        if fresh:
            commit_id = new_commit_id()
            for task in fresh:
                task.commit_ids_under_way.add(commit_id)
            offsets = [(task, _pinned(task, task.tables, commit_id)) for task in fresh if task.tables is not None]
            for task in await self._commit_offsets(offsets, perf_counter()):
                task.is_committed_as(commit_id)
                if task.tables is not None:
                    task.tables.is_pinned = True

    async def _commit_offsets(
        self, taken: list[tuple[TaskView, dict[TopicPartition, OffsetMark]]], started_s: float
    ) -> list[TaskView]:
        """Commit the offsets of the tasks that are still owned; returns those tasks."""
        delay_s = FIRST_RETRY_S
        while taken := self._owned(taken):
            membership = self._group().membership
            offsets = {tp: mark for _, marks in taken for tp, mark in marks.items()}
            try:
                if membership is None:
                    raise TaskMigratedError("not a member of the group at present")
                sealed = [Sealed(task, marks, [], False, {}, []) for task, marks in taken]
                await self._keep_owned(sealed, membership.generation)
                if any(task.lost for task, _ in taken):
                    continue
                await self._group().commit(offsets, membership)
            except (TaskMigratedError, RetriableError) as error:
                delay_s = await self._back_off(error, delay_s)
            else:
                self._succeeded(started_s, offsets)
                return [task for task, _ in taken]
        return []

    def _owned(
        self, taken: list[tuple[TaskView, dict[TopicPartition, OffsetMark]]]
    ) -> list[tuple[TaskView, dict[TopicPartition, OffsetMark]]]:
        """Those of the tasks whose partitions are all still this member's."""
        self._let_go_of_others(task for task, _ in taken)
        return [each for each in taken if not each[0].lost]


def _is_pinned(task: TaskView) -> bool:
    return task.tables is None or task.tables.is_pinned


def _is_to_be_pinned(task: TaskView) -> bool:
    """Whether changelogs are to be marked; while they are restored it is not known yet where they stand."""
    return task.tables is not None and task.tables.is_level and not task.tables.is_pinned


def _pinned(task: TaskView, tables: TaskTables, commit_id: str) -> dict[TopicPartition, OffsetMark]:
    committed = task.committed[task.anchor]
    start = task.start_positions()[task.anchor] if committed < 0 else committed
    mark = CommitMark(
        commit_id, tables.positions_after({}), tables.committed_times(), tables.incarnations, tables.serializers
    )
    return {task.anchor: OffsetMark(start, mark.metadata())}


def _marks(sealed: Sealed, commit_id: str, ends: Mapping[TopicPartition, int]) -> dict[TopicPartition, OffsetMark]:
    tables = sealed.task.tables
    if tables is None:
        return sealed.marked(commit_id) if sealed.marks else {}
    return sealed.marked(commit_id, tables.positions_after(ends))
