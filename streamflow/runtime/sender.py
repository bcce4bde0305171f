"""Sends outside any record's turn: from timers, tasks, clients. Immediate and at least once.

What is sent while an earlier batch is under way goes out together in the next one, so many concurrent sends cost few
requests and a single one waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio

from streamflow.clock import Clock
from streamflow.errors import ClosedError, StreamFlowError
from streamflow.log.api import Producer
from streamflow.log.batch import BatchBuilder
from streamflow.model.record import Headers, RecordMetadata, TopicPartition
from streamflow.processing.topic import Topic
from streamflow.runtime.outputs import Target
from streamflow.runtime.targets import KnownTargets
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.sender")

_MAX_WAITING_RECORDS = 100_000
_CLOSE_S = 5.0


class _Batch:
    """Records for one partition that wait, and who waits for them."""

    __slots__ = ("builder", "timestamps_ms", "waiters")

    def __init__(self, target: Target) -> None:
        self.builder = BatchBuilder(target.compression, target.batch_bytes)
        self.waiters: list[asyncio.Future[RecordMetadata] | None] = []
        self.timestamps_ms: list[int] = []


class DirectSender:
    """Sends records at once.

    Args:
        producer: The log's producer.
        known: The topics that may be written; one that is not known yet is described.
        clock: Default timestamps.
        sensors: Metrics hooks.
    """

    def __init__(
        self,
        producer: Producer,
        known: KnownTargets,
        clock: Clock,
        sensors: Sensors,
    ) -> None:
        self._producer = producer
        self._known = known
        self._clock = clock
        self._sensors = sensors
        self._batches: dict[TopicPartition, list[_Batch]] = {}
        # Closed to further records and not yet taken by the producer, in order.
        self._leaving: deque[tuple[TopicPartition, _Batch]] = deque()
        self._sending = asyncio.Lock()
        self.waiting = 0
        self.abandoned = False
        self._arrived = asyncio.Event()
        self._sticky: dict[str, int] = {}

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[DirectSender]:
        """Run the sending task while the block runs; what waits at its end is sent."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run)
            try:
                yield self
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(0 if self.abandoned else _CLOSE_S) as closing:
                    await self._send_waiting()
                    with suppress(StreamFlowError):  # whoever sent what failed is told
                        await self._producer.flush()
                self.abandoned = closing.cancelled_caught
                tasks.cancel_scope.cancel()
                self._fail_waiting()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await asyncio.sleep(0)
            await self._send_waiting()

    async def _send_waiting(self) -> None:
        async with self._sending:
            self._close_batches()
            while self._leaving:
                tp, batch = self._leaving[0]
                sealed = batch.builder.seal()
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
        self._close_batches()
        while self._leaving:
            self._settle(*self._leaving.popleft(), None, ClosedError("closed before the log took the record"))

    def _acknowledged(self, tp: TopicPartition, batch: _Batch, done: asyncio.Future[int]) -> None:
        if done.cancelled():
            self._settle(tp, batch, None, asyncio.CancelledError())
        elif (error := done.exception()) is not None:
            self._producer.reset(tp)  # each send is told for itself: later ones have a chance of their own
            self._settle(tp, batch, None, error)
        else:
            self._settle(tp, batch, done.result(), None)

    def _settle(self, tp: TopicPartition, batch: _Batch, base_offset: int | None, error: BaseException | None) -> None:
        self.waiting -= len(batch.waiters)
        if base_offset is None and (lost := batch.waiters.count(None)):
            logger.error("%d record(s) sent to %s with send_nowait() were lost: %s", lost, tp, error)
        for number, (waiter, timestamp_ms) in enumerate(zip(batch.waiters, batch.timestamps_ms, strict=True)):
            if base_offset is not None:
                if waiter is not None and not waiter.done():
                    waiter.set_result(RecordMetadata(tp.topic, tp.partition, base_offset + number, timestamp_ms))
            elif waiter is None:
                self._sensors.record_error("send_nowait", "lost")
            elif not waiter.done():
                if isinstance(error, asyncio.CancelledError) or error is None:
                    waiter.cancel()
                else:
                    waiter.set_exception(error)

    # --- sending -----------------------------------------------------------------------------------------------

    async def send(
        self,
        topic: Topic[Any, Any],
        key: Any,
        value: Any,
        *,
        partition: int | None,
        timestamp_ms: int | None,
        headers: Headers,
    ) -> RecordMetadata:
        """See `processing.context.Sender`."""
        target = await self._known.of(topic)
        waiter: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        self._add(target, key, value, partition, timestamp_ms, list(headers), waiter)
        return await waiter

    def send_nowait(
        self,
        topic: Topic[Any, Any],
        key: Any,
        value: Any,
        *,
        partition: int | None,
        timestamp_ms: int | None,
        headers: Headers,
    ) -> None:
        """See `processing.context.Sender`."""
        if self.waiting >= _MAX_WAITING_RECORDS:
            raise anyio.WouldBlock
        if topic.name not in self._known.targets:
            raise anyio.WouldBlock  # it has to be described first: `send` does
        self._add(self._known.targets[topic.name], key, value, partition, timestamp_ms, list(headers), None)

    def _add(
        self,
        target: Target,
        key: Any,
        value: Any,
        partition: int | None,
        timestamp_ms: int | None,
        headers: list[tuple[str, bytes | None]],
        waiter: asyncio.Future[RecordMetadata] | None,
    ) -> None:
        topic = target.topic
        key_bytes = topic.key_codec.encode(key, headers)
        data = topic.value_codec.encode(value, headers)
        self.add_encoded(target, key_bytes, data, partition, timestamp_ms, headers, waiter)

    def add_encoded(
        self,
        target: Target,
        key: bytes | None,
        value: bytes | None,
        partition: int | None,
        timestamp_ms: int | None,
        headers: Headers,
        waiter: asyncio.Future[RecordMetadata] | None,
    ) -> None:
        """Queue a record whose key and value are encoded."""
        target.check_size(key, value, headers)
        if partition is not None:
            target.check_partition(partition)
        elif key is not None:
            partition = target.partition_of(key)
        else:
            partition = self._next_partition(target)
        timestamp_ms = self._clock.now_ms() if timestamp_ms is None else timestamp_ms
        batches = self._batches.setdefault(TopicPartition(target.name, partition), [])
        if not batches or not batches[-1].builder.append(timestamp_ms, key, value, headers):
            batches.append(_Batch(target))
            batches[-1].builder.append(timestamp_ms, key, value, headers)
        batches[-1].waiters.append(waiter)
        batches[-1].timestamps_ms.append(timestamp_ms)
        self.waiting += 1
        self._arrived.set()

    def _next_partition(self, target: Target) -> int:
        if self._arrived.is_set() and target.name in self._sticky:
            return self._sticky[target.name]
        before = self._sticky.get(target.name)
        # A random start: short-lived senders must not all begin at partition 0.
        partition = random.randrange(target.partitions) if before is None else (before + 1) % target.partitions
        self._sticky[target.name] = partition
        return partition
