"""Sends outside any record's turn: from timers, tasks, clients. Immediate and at least once.

What is sent while an earlier batch is under way goes out together in the next one, so many concurrent sends cost few
requests and a single one waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.abc

from streamflow.clock import Clock
from streamflow.log.api import Producer
from streamflow.log.batch import BatchBuilder
from streamflow.model.record import Headers, RecordMetadata, TopicPartition
from streamflow.processing.topic import Topic
from streamflow.runtime.outputs import Target
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
        target_of: Looks up (and where needed describes) a topic.
        clock: Default timestamps.
        sensors: Metrics hooks.
    """

    def __init__(
        self,
        producer: Producer,
        target_of: Callable[[Topic[Any, Any]], Awaitable[Target]],
        clock: Clock,
        sensors: Sensors,
    ) -> None:
        self._producer = producer
        self._target_of = target_of
        self._clock = clock
        self._sensors = sensors
        self._batches: dict[TopicPartition, list[_Batch]] = {}
        self.waiting = 0
        self.abandoned = False
        self._arrived = asyncio.Event()
        self._sticky: dict[str, int] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[DirectSender]:
        """Run the sending task while the block runs; what waits at its end is sent."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            tasks.start_soon(self._run)
            try:
                yield self
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(0 if self.abandoned else _CLOSE_S) as closing:
                    await self._send_waiting()
                    await self._producer.flush()
                self.abandoned = closing.cancelled_caught
                self._tasks = None
                tasks.cancel_scope.cancel()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await asyncio.sleep(0)
            await self._send_waiting()

    async def _send_waiting(self) -> None:
        waiting, self._batches = self._batches, {}
        for tp, batches in waiting.items():
            for batch in batches:
                sealed = batch.builder.seal()
                self._sensors.batch_out(tp.topic, sealed.num_records, sealed.size_bytes)
                try:
                    future = await self._producer.enqueue(tp, sealed)
                except Exception as exc:
                    self._settle(tp, batch, None, exc)
                else:
                    future.add_done_callback(partial(self._acknowledged, tp, batch))

    def _acknowledged(self, tp: TopicPartition, batch: _Batch, done: asyncio.Future[int]) -> None:
        if done.cancelled():
            self._settle(tp, batch, None, asyncio.CancelledError())
        elif (error := done.exception()) is not None:
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
        target = await self._target_of(topic)
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
        target = self.known_target(topic)
        self._add(target, key, value, partition, timestamp_ms, list(headers), None)

    def known_target(self, topic: Topic[Any, Any]) -> Target:
        """The target of a topic that has been described before."""
        awaitable = self._target_of(topic)
        # A target that is known is returned without waiting for anything, so its coroutine ends at the first step.
        iterator = awaitable.__await__()
        try:
            next(iterator)
        except StopIteration as done:
            target: Target = done.value
            return target
        raise anyio.WouldBlock

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
