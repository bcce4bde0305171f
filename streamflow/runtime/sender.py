"""Sends outside any record's turn: from timers, tasks, clients. Immediate and at least once.

What is sent while an earlier batch is under way goes out together in the next one, so many concurrent sends cost few
requests and a single one waits for nobody.

Records count against a bound in bytes from the call until the log has them (or failed). Beyond it `send` waits for
room, in the order of the calls, and `send_nowait` raises.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import anyio

from streamflow.clock import Clock
from streamflow.errors import ClosedError, StreamFlowError
from streamflow.log.api import Producer
from streamflow.log.batch import BatchBuilder, SealedBatch
from streamflow.model.record import RecordMetadata, TopicPartition
from streamflow.processing.context import Outgoing
from streamflow.runtime.outputs import Destination, Encoded, Target, size_of
from streamflow.runtime.targets import KnownTargets
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.sender")

_CLOSE_S = 5.0
_LEAST_CLOSE_S = 1.0
_RECORD_COST_BYTES = 200  # what a record on its way takes beside its own bytes: who waits for it, its time


class _Batch:
    """Records for one partition that wait, and who waits for them."""

    __slots__ = ("_sealed", "builder", "cost_bytes", "timestamps_ms", "waiters")

    def __init__(self, target: Target) -> None:
        self.builder = BatchBuilder(target.compression, target.batch_bytes)
        self.waiters: list[asyncio.Future[RecordMetadata] | None] = []
        self.timestamps_ms: list[int] = []
        self.cost_bytes = 0
        self._sealed: SealedBatch | None = None

    def sealed(self) -> SealedBatch:
        """The batch as it leaves; sealed once, since it is tried again where the wait for room was cancelled."""
        if self._sealed is None:
            self._sealed = self.builder.seal()
        return self._sealed


class _DirectTopic(Destination[TopicPartition]):
    """A topic that is sent to.

    Args:
        target: The topic.
        burst: Set while something waits to be sent: records without a key then share a partition.
    """

    __slots__ = ("_burst", "_sticky")

    def __init__(self, target: Target, burst: asyncio.Event) -> None:
        super().__init__(target)
        self._burst = burst
        self._sticky: int | None = None

    def of_key(self, key: bytes | None) -> TopicPartition:
        """See `Destination.of_key`."""
        return TopicPartition(self.target.name, self._next() if key is None else self.target.partition_of(key))

    def of_number(self, partition: int) -> TopicPartition:
        """See `Destination.of_number`."""
        self.target.check_partition(partition)
        return TopicPartition(self.target.name, partition)

    def _next(self) -> int:
        if self._sticky is None:  # a random start: short-lived senders must not all begin at partition 0
            self._sticky = random.randrange(self.target.partitions)
        elif not self._burst.is_set():
            self._sticky = (self._sticky + 1) % self.target.partitions
        return self._sticky


class DirectSender:
    """Sends records at once.

    Args:
        producer: The log's producer.
        known: The topics that may be written; one that is not known yet is described.
        clock: Default timestamps.
        sensors: Metrics hooks.
        max_bytes: How much may be on its way at once, about.
    """

    def __init__(
        self, producer: Producer, known: KnownTargets, clock: Clock, sensors: Sensors, *, max_bytes: int
    ) -> None:
        self._producer = producer
        self._known = known
        self._clock = clock
        self._sensors = sensors
        self._max_bytes = max_bytes
        self._topics: dict[str, _DirectTopic] = {}
        self._batches: dict[TopicPartition, list[_Batch]] = {}
        # Closed to further records and not yet taken by the producer, in order.
        self._leaving: deque[tuple[TopicPartition, _Batch]] = deque()
        self._sending = asyncio.Lock()
        self._held_bytes = 0
        self._held_records = 0
        # What found no room, in order. Ordered for its first one: a plain dict looks at all that was taken from it.
        self._held_back: OrderedDict[int, tuple[Encoded[TopicPartition], asyncio.Future[RecordMetadata] | None]] = (
            OrderedDict()
        )
        self._numbers = 0
        self._room_changed = asyncio.Event()
        self._closed = False
        self.abandoned = False
        # When sending what waits at the end is to be over, in the event loop's time; None takes `_CLOSE_S`.
        self.end_by_s: float | None = None
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Records that were sent and that the log has not yet."""
        return self._held_records + len(self._held_back)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[DirectSender]:
        """Run the sending task while the block runs; what waits at its end is sent."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run)
            try:
                yield self
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(self._patience_s()) as closing:
                    await self._send_all()
                    with suppress(StreamFlowError):  # whoever sent what failed is told
                        await self._producer.flush()
                self.abandoned = closing.cancelled_caught
                tasks.cancel_scope.cancel()
                self._fail_waiting()

    def _patience_s(self) -> float:
        if self.abandoned:
            return 0.0
        if self.end_by_s is None:
            return _CLOSE_S
        return min(_CLOSE_S, max(_LEAST_CLOSE_S, self.end_by_s - anyio.current_time()))

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await asyncio.sleep(0)
            await self._send_waiting()

    async def _send_all(self) -> None:
        while True:
            self._room_changed.clear()
            await self._send_waiting()
            if not self._batches:
                if not self._held_back:
                    return
                await self._room_changed.wait()

    async def _send_waiting(self) -> None:
        async with self._sending:
            self._close_batches()
            while self._leaving:
                tp, batch = self._leaving[0]
                sealed = batch.sealed()
                try:
                    future = await self._producer.enqueue(tp, sealed)
                except Exception as exc:
                    self._leaving.popleft()
                    self._settle(tp, batch, None, exc)
                else:
                    self._leaving.popleft()
                    self._sensors.batch_out(tp.topic, sealed.num_records, sealed.size_bytes)
                    future.add_done_callback(partial(self._acknowledged, tp, batch))

    def _close_batches(self) -> None:
        self._leaving.extend((tp, batch) for tp, batches in self._batches.items() for batch in batches)
        self._batches = {}

    def _fail_waiting(self) -> None:
        """The end, and the producer had no room in time: nobody may wait for what it did not take."""
        self._closed = True
        error = ClosedError("closed before the log took the record")
        while self._held_back:
            _, (record, waiter) = self._held_back.popitem(last=False)
            self._fail(record[0], [waiter], error)
        self._close_batches()
        while self._leaving:
            self._settle(*self._leaving.popleft(), None, error)

    def _acknowledged(self, tp: TopicPartition, batch: _Batch, done: asyncio.Future[int]) -> None:
        if done.cancelled():
            self._settle(tp, batch, None, asyncio.CancelledError())
        elif (error := done.exception()) is not None:
            self._producer.reset(tp)  # each send is told for itself: later ones have a chance of their own
            self._settle(tp, batch, None, error)
        else:
            self._settle(tp, batch, done.result(), None)

    def _settle(self, tp: TopicPartition, batch: _Batch, base_offset: int | None, error: BaseException | None) -> None:
        self._held_records -= len(batch.waiters)
        self._held_bytes -= batch.cost_bytes
        if base_offset is None:
            self._fail(tp, batch.waiters, error)
        else:
            for number, (waiter, timestamp_ms) in enumerate(zip(batch.waiters, batch.timestamps_ms, strict=True)):
                if waiter is not None and not waiter.done():
                    waiter.set_result(RecordMetadata(tp.topic, tp.partition, base_offset + number, timestamp_ms))
        self._admit()

    def _fail(
        self,
        tp: TopicPartition,
        waiters: Sequence[asyncio.Future[RecordMetadata] | None],
        error: BaseException | None,
    ) -> None:
        if lost := waiters.count(None):
            logger.error("%d record(s) sent to %s with send_nowait() were lost: %s", lost, tp, error)
        for waiter in waiters:
            if waiter is None:
                self._sensors.record_error("send_nowait", "lost")
            elif not waiter.done():
                if isinstance(error, asyncio.CancelledError) or error is None:
                    waiter.cancel()
                else:
                    waiter.set_exception(error)

    # --- sending -----------------------------------------------------------------------------------------------

    async def send(self, outgoing: Outgoing) -> RecordMetadata:
        """See `processing.context.Sender`."""
        record = self._encoded(await self._known.of(outgoing[0]), outgoing)
        waiter: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        number = self._take(record, waiter)
        try:
            return await waiter
        finally:
            self._held_back.pop(number, None)  # cancelled before there was room: it is not sent

    def send_nowait(self, outgoing: Outgoing) -> None:
        """See `processing.context.Sender`."""
        name = outgoing[0].name
        if name not in self._known.targets:
            raise anyio.WouldBlock(f"topic {name!r} was not described yet; `await topic.send(...)` once does that")
        record = self._encoded(self._known.targets[name], outgoing)
        if self._held_back or not self._has_room(_cost_of(record)):
            raise anyio.WouldBlock(
                f"{self._held_bytes:,} bytes are on their way to the log, of {self._max_bytes:,} (an eighth of "
                "memory_budget_bytes); `await topic.send(...)` waits for room"
            )
        self._take(record, None)

    def send_encoded(self, record: Encoded[TopicPartition]) -> None:
        """Send what is encoded without waiting; where there is no room, it leaves as soon as there is."""
        self._take(record, None)

    def _encoded(self, target: Target, outgoing: Outgoing) -> Encoded[TopicPartition]:
        topic = self._topics.get(target.name)
        if topic is None:
            topic = self._topics[target.name] = _DirectTopic(target, self._arrived)
        _, key, value, partition, timestamp_ms, headers = outgoing
        at_ms = self._clock.now_ms() if timestamp_ms is None else timestamp_ms
        headers = list(headers)
        return topic.encode(target.topic.key_codec.encode(key, headers), value, partition, at_ms, headers)

    def _has_room(self, cost_bytes: int) -> bool:
        """Whether a record may join those on their way; one that is larger than the bound goes alone."""
        return not self._held_bytes or self._held_bytes + cost_bytes <= self._max_bytes

    def _take(self, record: Encoded[TopicPartition], waiter: asyncio.Future[RecordMetadata] | None) -> int:
        """Send a record, now or when there is room: in the order of the calls. Returns its number while it is held."""
        if self._closed:
            raise ClosedError(f"a record for topic {record[0].topic!r} came after everything was sent and closed")
        self._numbers += 1
        if self._held_back or not self._has_room(_cost_of(record)):
            self._held_back[self._numbers] = (record, waiter)
        else:
            self._add(record, waiter)
        return self._numbers

    def _admit(self) -> None:
        """Let go what found no room, as far as there is room now."""
        while self._held_back:
            number, (record, waiter) = next(iter(self._held_back.items()))
            if not self._has_room(_cost_of(record)):
                break
            del self._held_back[number]
            self._add(record, waiter)
        self._room_changed.set()

    def _add(self, record: Encoded[TopicPartition], waiter: asyncio.Future[RecordMetadata] | None) -> None:
        tp, timestamp_ms, key, value, headers = record
        batches = self._batches.setdefault(tp, [])
        if not batches or not batches[-1].builder.append(timestamp_ms, key, value, headers):
            batches.append(_Batch(self._known.targets[tp.topic]))
            batches[-1].builder.append(timestamp_ms, key, value, headers)
        cost_bytes = _cost_of(record)
        batches[-1].waiters.append(waiter)
        batches[-1].timestamps_ms.append(timestamp_ms)
        batches[-1].cost_bytes += cost_bytes
        self._held_bytes += cost_bytes
        self._held_records += 1
        self._arrived.set()


def _cost_of(record: Encoded[TopicPartition]) -> int:
    _, _, key, value, headers = record
    return len(key or b"") + len(value or b"") + size_of(headers) + _RECORD_COST_BYTES
