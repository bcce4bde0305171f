"""Commits: outputs first, then (or together with) the positions they stand for.

`ExactlyOnce` makes one atomic commit over the outputs and offsets of all tasks. `AtLeastOnce` sends outputs as soon
as a batch ends, waits until the log has acknowledged them, and then commits the offsets.

Invariant of both: positions and outputs are taken from a task in one step without an await between, so the offsets
never pass a record whose outputs are not in the same commit or acknowledged before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter

from streamflow.clock import Clock
from streamflow.errors import FatalError, ProductionError, RetriableError, TaskMigratedError
from streamflow.log.api import AtomicCommit, Group, OffsetMark, Producer, TransactionalProducer
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.runtime.task_view import TaskView
from streamflow.sensors import Sensors

_FIRST_RETRY_S = 0.02
_MAX_RETRY_S = 1.0

Offsets = dict[TopicPartition, OffsetMark]


class Commits:
    """What both guarantees share: one commit at a time, retried until the log answers.

    Args:
        group: The current group membership, asked at each try.
        sensors: Metrics hooks.
        clock: For back-off.
    """

    def __init__(self, group: Callable[[], Group], sensors: Sensors, clock: Clock) -> None:
        self._group = group
        self._sensors = sensors
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self.wanted = asyncio.Event()
        self.last_commit_s: float | None = None
        self.trying_since_s: float | None = None

    def owned(self, tasks: Iterable[TaskView]) -> list[TaskView]:
        """Those of the tasks whose partitions are all still this member's."""
        assignment = self._group().assignment
        return [task for task in tasks if assignment.issuperset(task.committed)]

    def _sent(self, batches: Iterable[tuple[TopicPartition, SealedBatch]]) -> None:
        for tp, batch in batches:
            self._sensors.batch_out(tp.topic, batch.num_records, batch.size_bytes)

    def _succeeded(self, started_s: float, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        self.last_commit_s = self._clock.monotonic()
        self.trying_since_s = None
        if offsets:
            self._sensors.committed(perf_counter() - started_s, len(offsets))

    async def _back_off(self, error: Exception, delay_s: float) -> float:
        self._sensors.commit_failed(type(error).__name__)
        self.trying_since_s = self.trying_since_s or self._clock.monotonic()
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
            taken = [(task, task.uncommitted(), task.outputs.seal()) for task in tasks]
            taken = [each for each in taken if each[1] or each[2]]
            delay_s = _FIRST_RETRY_S
            while taken:
                started_s = perf_counter()
                try:
                    await self._commit_once(taken)
                except TaskMigratedError as error:
                    delay_s = await self._back_off(error, delay_s)
                    owned = set(self.owned(task for task, _, _ in taken))
                    taken = [each for each in taken if each[0] in owned]
                except RetriableError as error:
                    delay_s = await self._back_off(error, delay_s)
                else:
                    self._finished(taken, started_s)
                    break
            self._committed.set()

    async def _commit_once(
        self, taken: list[tuple[TaskView, Offsets, list[tuple[TopicPartition, SealedBatch]]]]
    ) -> None:
        membership = self._group().membership
        if membership is None:
            raise TaskMigratedError("not a member of the group at present")
        outputs = [batch for _, _, batches in taken for batch in batches]
        offsets = {tp: mark for _, marks, _ in taken for tp, mark in marks.items()}
        await self._producer.commit(AtomicCommit(outputs, offsets, membership))

    def _finished(
        self, taken: list[tuple[TaskView, Offsets, list[tuple[TopicPartition, SealedBatch]]]], started_s: float
    ) -> None:
        for task, marks, batches in taken:
            task.set_committed(marks)
            self._sent(batches)
        self._succeeded(started_s, {tp: mark for _, marks, _ in taken for tp, mark in marks.items()})


class AtLeastOnce(Commits):
    """Outputs as soon as possible, acknowledged before the offsets are committed.

    Args:
        producer: Sends the outputs.
        group: See `Commits`.
        sensors: See `Commits`.
        clock: See `Commits`.
    """

    def __init__(self, producer: Producer, group: Callable[[], Group], sensors: Sensors, clock: Clock) -> None:
        super().__init__(group, sensors, clock)
        self._producer = producer
        self._sending = asyncio.Lock()
        self._unacknowledged: set[asyncio.Future[int]] = set()
        self._failed: BaseException | None = None

    async def idle(self, task: TaskView) -> None:
        """Send what the batch that ended has left."""
        if task.outputs.waiting:
            await self._send(task)

    async def linger(self, tasks: Iterable[TaskView]) -> None:
        """Send what slow agents have left."""
        for task in list(tasks):
            if task.outputs.waiting:
                await self._send(task)

    async def make_room(self, task: TaskView) -> None:
        """Send it; the producer's memory bound holds the task back."""
        await self._send(task)

    async def _send(self, task: TaskView) -> Offsets:
        async with self._sending:
            marks = task.uncommitted()
            for tp, batch in task.outputs.seal():
                future = await self._producer.enqueue(tp, batch)
                self._unacknowledged.add(future)
                future.add_done_callback(self._acknowledged)
                self._sent([(tp, batch)])
        return marks

    def _acknowledged(self, future: asyncio.Future[int]) -> None:
        self._unacknowledged.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failed = self._failed or error

    async def commit(self, tasks: Iterable[TaskView]) -> None:
        """See `Delivery`."""
        async with self._one_at_a_time:
            taken = [(task, await self._send(task)) for task in list(tasks)]
            started_s = perf_counter()
            if self._unacknowledged:
                await asyncio.wait(self._unacknowledged)
            if self._failed is not None:
                raise (
                    self._failed
                    if not isinstance(self._failed, ProductionError)
                    else FatalError(f"an output could not be written: {self._failed}")
                ) from self._failed
            await self._commit_offsets([each for each in taken if each[1]], started_s)

    async def _commit_offsets(self, taken: list[tuple[TaskView, Offsets]], started_s: float) -> None:
        delay_s = _FIRST_RETRY_S
        while taken:
            membership = self._group().membership
            offsets = {tp: mark for _, marks in taken for tp, mark in marks.items()}
            try:
                if membership is None:
                    raise TaskMigratedError("not a member of the group at present")
                await self._group().commit(offsets, membership)
            except (TaskMigratedError, RetriableError) as error:
                delay_s = await self._back_off(error, delay_s)
                owned = set(self.owned(task for task, _ in taken))
                taken = [each for each in taken if each[0] in owned]
            else:
                for task, marks in taken:
                    task.set_committed(marks)
                self._succeeded(started_s, offsets)
                return
