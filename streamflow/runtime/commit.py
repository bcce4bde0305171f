"""Commits: outputs first, then (or together with) the positions they stand for.

`ExactlyOnce` makes one atomic commit over the outputs and offsets of all tasks. `AtLeastOnce` sends outputs as soon
as a batch ends, waits until the log has acknowledged them, and then commits the offsets.

Invariant of both: positions and outputs are taken from a task in one step without an await between, so the offsets
never pass a record whose outputs are not in the same commit or acknowledged before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter

from streamflow.clock import Clock
from streamflow.errors import FatalError, ProductionError, RetriableError, TaskMigratedError
from streamflow.log.api import AtomicCommit, Group, Membership, OffsetMark, Producer, TransactionalProducer
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.runtime.task_view import TaskView
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.commits")

_FIRST_RETRY_S = 0.02
_MAX_RETRY_S = 1.0
_TELL_FROM_S = 0.25
_SILENCE_POLL_S = 0.05

Offsets = dict[TopicPartition, OffsetMark]
Batches = list[tuple[TopicPartition, SealedBatch]]


class Commits:
    """What both guarantees share: one commit at a time, retried until the log answers.

    Args:
        group: The current group membership, asked at each try.
        sensors: Metrics hooks.
        clock: For back-off.

    Attributes:
        wanted: Set when a commit is wanted before the interval is over.
        last_commit_s: Monotonic time of the last commit; None before the first.
        trying_since_s: Since when a commit is being tried; None while none is.
        generation: Of the last assignment the task manager has acted on.
    """

    def __init__(self, group: Callable[[], Group], sensors: Sensors, clock: Clock) -> None:
        self._group = group
        self._sensors = sensors
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self.wanted = asyncio.Event()
        self.last_commit_s: float | None = None
        self.trying_since_s: float | None = None
        self.generation = -1

    def _sent(self, batches: Iterable[tuple[TopicPartition, SealedBatch]]) -> None:
        for tp, batch in batches:
            self._sensors.batch_out(tp.topic, batch.num_records, batch.size_bytes)

    def _succeeded(self, started_s: float, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        self.last_commit_s = self._clock.monotonic()
        if offsets:
            self._sensors.committed(perf_counter() - started_s, len(offsets))

    def hurry(self) -> None:
        """Commit soon: somebody waits for an answer."""
        self.wanted.set()

    async def _back_off(self, error: Exception, delay_s: float) -> float:
        self._sensors.commit_failed(type(error).__name__)
        if _TELL_FROM_S <= delay_s < 2 * _TELL_FROM_S:  # once per commit, and not for what passes at once
            logger.warning("commit: %s; trying again until it succeeds", error)
        await self._clock.sleep(delay_s)
        return min(delay_s * 2, _MAX_RETRY_S)


class ExactlyOnce(Commits):
    """One atomic commit over outputs and offsets.

    Args:
        producer: Makes it.
        group: See `Commits`.
        sensors: See `Commits`.
        clock: See `Commits`.
    """

    def __init__(
        self, producer: TransactionalProducer, group: Callable[[], Group], sensors: Sensors, clock: Clock
    ) -> None:
        super().__init__(group, sensors, clock)
        self._producer = producer
        self._committed = asyncio.Event()
        # Sealed and not yet with the log: they are first in line, also when the commit that took them was cancelled.
        self._taken: deque[list[_Sealed]] = deque()

    async def idle(self, task: TaskView) -> None:
        """Nothing leaves before its commit."""

    async def linger(self, tasks: Iterable[TaskView]) -> None:
        """Nothing leaves before its commit."""

    async def make_room(self, task: TaskView) -> None:
        """Ask for a commit and wait for it."""
        self._committed.clear()
        self.wanted.set()
        await self._committed.wait()

    async def commit(self, tasks: Iterable[TaskView]) -> None:
        """See `Delivery`."""
        async with self._one_at_a_time:
            sealed = [_Sealed(task, task.uncommitted(), task.outputs.seal()) for task in tasks if not task.lost]
            if sealed := [each for each in sealed if each.marks or each.batches]:
                self._taken.append(sealed)
            delay_s = _FIRST_RETRY_S
            while self._taken:
                if self.trying_since_s is None:
                    self.trying_since_s = self._clock.monotonic()
                try:
                    await self._commit_first()
                except TaskMigratedError as error:
                    self._migrated(error)
                except RetriableError as error:
                    delay_s = await self._back_off(error, delay_s)
            self.trying_since_s = None
            self._committed.set()

    async def _commit_first(self) -> None:
        """Commit what is first in line.

        The generation is that of the last assignment the task manager has acted on, not the group's newest: partitions
        that were lost and came back in between are then refused, as what was sealed stands on their old positions.
        """
        self._taken[0] = [each for each in self._taken[0] if not each.task.lost]
        if taken := self._taken[0]:
            started_s = perf_counter()
            current = self._group().membership
            if current is None:
                raise TaskMigratedError("not a member of the group at present")
            membership = Membership(current.group_id, current.member_id, min(self.generation, current.generation))
            outputs = [batch for each in taken for batch in each.batches]
            offsets = {tp: mark for each in taken for tp, mark in each.marks.items()}
            await self._producer.commit(AtomicCommit(outputs, offsets, membership))
            for each in taken:
                each.task.set_committed(each.marks)
                self._sent(each.batches)
            self._succeeded(started_s, offsets)
        self._taken.popleft()

    def _migrated(self, error: TaskMigratedError) -> None:
        """Find out whose partitions are gone: each task alone; one that is refused alone commits nothing any more."""
        self._sensors.commit_failed(type(error).__name__)
        taken = self._taken.popleft()
        if len(taken) > 1:
            self._taken.extendleft([each] for each in reversed(taken))
            return
        for each in taken:
            each.task.lost = True
            logger.warning("task %s has gone to another worker; what it had is dropped: %s", each.task.name, error)


@dataclass(slots=True)
class _Sealed:
    """What one task has to commit: its outputs, and the positions they stand for."""

    task: TaskView
    marks: Offsets
    batches: Batches


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
        self._failed: BaseException | None = None

    async def idle(self, task: TaskView) -> None:
        """Send what the batch that ended has left; while the group is silent, the next commit does."""
        if task.outputs.waiting and not self._group_is_silent():
            await self._send(task)

    async def linger(self, tasks: Iterable[TaskView]) -> None:
        """Send what slow agents have left."""
        for task in list(tasks):
            if task.outputs.waiting and not self._group_is_silent():
                await self._send(task)

    async def make_room(self, task: TaskView) -> None:
        """Send it; the producer's memory bound holds the task back."""
        await self._send(task)

    async def _send(self, task: TaskView) -> Offsets:
        async with self._sending:
            await self._heard_from_group()
            if task.lost:
                return {}
            marks = task.uncommitted()
            self._unsent.extend(task.outputs.seal())
            while self._unsent:  # also what a cancelled call has left
                future = await self._producer.enqueue(*self._unsent[0])
                self._sent([self._unsent.popleft()])
                self._unacknowledged.add(future)
                future.add_done_callback(self._acknowledged)
        return marks

    async def _heard_from_group(self) -> None:
        """Hold back while the group has been silent for a session.

        A process that was stopped and wakes up must learn first whether its partitions have gone to another member.
        """
        while self._group_is_silent():
            await self._clock.sleep(_SILENCE_POLL_S)

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
            taken = [(task, await self._send(task)) for task in list(tasks)]
            if self._unacknowledged:
                await asyncio.wait(self._unacknowledged)
            if self._failed is not None:
                raise (
                    self._failed
                    if not isinstance(self._failed, ProductionError)
                    else FatalError(f"an output could not be written: {self._failed}")
                ) from self._failed
            await self._commit_offsets([each for each in taken if each[1]], started_s)
            self.trying_since_s = None

    async def _commit_offsets(self, taken: list[tuple[TaskView, Offsets]], started_s: float) -> None:
        delay_s = _FIRST_RETRY_S
        while taken := self._owned(taken):
            membership = self._group().membership
            offsets = {tp: mark for _, marks in taken for tp, mark in marks.items()}
            try:
                if membership is None:
                    raise TaskMigratedError("not a member of the group at present")
                await self._group().commit(offsets, membership)
            except (TaskMigratedError, RetriableError) as error:
                delay_s = await self._back_off(error, delay_s)
            else:
                for task, marks in taken:
                    task.set_committed(marks)
                self._succeeded(started_s, offsets)
                return

    def _owned(self, taken: list[tuple[TaskView, Offsets]]) -> list[tuple[TaskView, Offsets]]:
        """Those of the tasks whose partitions are all still this member's."""
        assignment = self._group().assignment
        return [each for each in taken if not each[0].lost and assignment.issuperset(each[0].committed)]
