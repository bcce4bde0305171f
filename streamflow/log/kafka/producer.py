"""An idempotent producer of whole batches.

Per partition one batch is in flight at a time, so order holds by construction; partitions that share a leader share a
request, and a leader has a few requests under way. The broker recognises a repeated batch by producer id, epoch and
sequence number (KIP-98), so a batch of unknown outcome is sent again as it was. A partition whose identity the broker
does not accept any more gets a new producer id, and the batch is stamped anew, but only when it surely was not stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import anyio

from streamflow.errors import (
    ClosedError,
    FatalError,
    InternalError,
    LogUnavailableError,
    ProductionError,
    RefusedError,
    RetriableError,
    StreamFlowError,
    UnknownTopicError,
)
from streamflow.log.api import Producer
from streamflow.log.batch import DEFAULT_MAX_BATCH_BYTES, SealedBatch
from streamflow.log.kafka import codes, wire
from streamflow.log.kafka.client import Client, backoff_s, retried
from streamflow.log.kafka.hot import MAX_PRODUCE_BYTES, PRODUCE, ProducedPartition, ProduceResponse
from streamflow.log.kafka.slots import Slots
from streamflow.log.tasks import TaskOwner
from streamflow.model.record import TopicPartition

logger = logging.getLogger("streamflow.kafka")


_SLOTS = 5
_FLUSH_AT_CLOSE_S = 5.0
_TOLD_AT_FAILURES = 3
_LATE_ANSWER_S = 0.5
_UNKNOWN_TOPIC_S = 10.0
_SEQUENCE_MASK = 0x7FFFFFFF
_IDENTITY_REFUSED = frozenset(
    {
        codes.OUT_OF_ORDER_SEQUENCE,
        codes.UNKNOWN_PRODUCER_ID,
        codes.INVALID_PRODUCER_EPOCH,
        codes.INVALID_PRODUCER_ID_MAPPING,
        codes.PRODUCER_FENCED,
    }
)
_OUTCOME_UNKNOWN = frozenset({-1, codes.REQUEST_TIMED_OUT, codes.NOT_ENOUGH_REPLICAS_AFTER_APPEND, 13, 56})


@dataclass(frozen=True, slots=True)
class Identity:
    """What the broker recognises a producer by."""

    producer_id: int
    epoch: int


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A batch on its way."""

    batch: SealedBatch
    future: asyncio.Future[int]
    deadline: float
    stamped: bytes | None = None
    sequence: int = 0
    may_be_stored: bool = False


@dataclass(slots=True, eq=False)
class _Partition:
    """The batches of one partition, in order; the first one is in flight or next.

    `in_flight` is empty again once that batch has timed out: an answer that comes later means nothing any more.
    """

    tp: TopicPartition
    queue: deque[_Outgoing] = field(default_factory=deque)
    in_flight: _Outgoing | None = None
    identity: Identity | None = None
    next_sequence: int = 0
    failures: int = 0
    failure: StreamFlowError | None = None


_Taken: TypeAlias = list[tuple[_Partition, _Outgoing]]
"""What one request carries."""


def next_sequence(sequence: int, records: int) -> int:
    """The sequence number after this many records; it wraps from 2^31-1 to 0."""
    return (sequence + records) & _SEQUENCE_MASK


def unacceptable(tp: TopicPartition, batch: SealedBatch, code: int, limits: Mapping[str, int]) -> ProductionError:
    """The error of a batch that the broker refuses for good; `limits` are `max.message.bytes` per topic."""
    limit = limits.get(tp.topic, DEFAULT_MAX_BATCH_BYTES)
    return ProductionError(
        f"{tp}: the broker refused a batch of {batch.num_records} records and {batch.size_bytes} bytes with "
        f"{codes.name(code)}; the topic's max.message.bytes is {limit}"
    )


class KafkaProducer(Producer):
    """A `Producer` over `Client.send`; enter it with `async with`.

    Args:
        client: The data loop's connections.
        limits: `max.message.bytes` per topic, filled by whoever describes topics.
        delivery_timeout_s: After this time without an answer a batch fails.
    """

    def __init__(self, client: Client, limits: Mapping[str, int], *, delivery_timeout_s: float = 120.0) -> None:
        self.errors: Counter[str] = Counter()
        self._client = client
        self._limits = limits
        self._delivery_timeout_s = delivery_timeout_s
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._ready: dict[_Partition, None] = {}
        self._identity: Identity | None = None
        self._identity_lock = asyncio.Lock()
        self._buffered_bytes = 0
        self._room_wanted: set[asyncio.Future[None]] = set()
        self._outstanding: dict[_Outgoing, None] = {}
        self._homeless: dict[_Partition, None] = {}
        self._leader_needed = asyncio.Event()
        self._deadline_moved = asyncio.Event()
        self._dispatching = False
        self._last = ""
        self._closed = False
        self._tasks = TaskOwner("kafka producer", on_bug=self._on_bug)

    async def __aenter__(self) -> KafkaProducer:
        self._loop = asyncio.get_running_loop()
        self._slots: Slots[_Taken] = Slots(self._tasks, _SLOTS, self._produce, self._on_slot_free)
        self._tasks.start(self._find_leaders())
        self._tasks.start(self._expire())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if exc_info[0] is None or isinstance(exc_info[1], Exception):
            with anyio.move_on_after(_FLUSH_AT_CLOSE_S):
                await self._settled()
        self._closed = True
        await self._tasks.__aexit__()
        closed = ClosedError("the producer was closed before the log answered")
        for outgoing in list(self._outstanding):
            self._fail_one(outgoing, closed)

    # --- contract ------------------------------------------------------------------------------------------------

    async def enqueue(self, tp: TopicPartition, batch: SealedBatch) -> asyncio.Future[int]:
        size = batch.size_bytes
        while self._buffered_bytes and self._buffered_bytes + size > self._client.options.producer_buffer_bytes:
            await self._wait_for_room()
        if self._closed:
            raise ClosedError("the producer is closed")
        future: asyncio.Future[int] = self._loop.create_future()
        partition = self._partitions.get(tp)
        if partition is None:
            partition = self._partitions[tp] = _Partition(tp)
        if partition.failure is not None:
            future.set_exception(partition.failure)
            future.exception()  # seen: a future nobody awaits makes no noise
            return future
        outgoing = _Outgoing(batch, future, time.monotonic() + self._delivery_timeout_s)
        self._buffered_bytes += size
        if not self._outstanding:
            self._deadline_moved.set()
        self._outstanding[outgoing] = None
        partition.queue.append(outgoing)
        if len(partition.queue) == 1:
            self._send_soon(partition)
        return future

    async def flush(self) -> None:
        await self._settled()
        for partition in self._partitions.values():
            if partition.failure is not None:
                raise partition.failure

    def reset(self, tp: TopicPartition) -> None:
        """Accept batches again for a partition that failed."""
        partition = self._partitions.get(tp)
        if partition is not None:
            partition.failure = None

    async def _settled(self) -> None:
        futures = [outgoing.future for outgoing in self._outstanding if not outgoing.future.done()]
        if futures:
            await asyncio.wait(futures)

    async def _wait_for_room(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._room_wanted.add(waiter)
        try:
            await waiter
        finally:
            self._room_wanted.discard(waiter)

    # --- choosing what to send -----------------------------------------------------------------------------------

    def _send_soon(self, partition: _Partition) -> None:
        """Once per turn of the loop, so that batches enqueued together leave together."""
        if partition.in_flight is None:
            self._ready[partition] = None
            self._dispatch_soon()

    def _dispatch_soon(self) -> None:
        if not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        if self._closed:
            return
        by_node: dict[int, list[_Partition]] = {}
        for partition in self._ready:
            node = self._client.leader(partition.tp)
            if node is None:
                self._homeless[partition] = None
            else:
                by_node.setdefault(node, []).append(partition)
        if self._homeless:
            for partition in self._homeless:
                self._ready.pop(partition, None)
            self._leader_needed.set()
        for node, partitions in by_node.items():
            free = self._slots.free(node)
            while free and partitions:
                taken = self._cut(partitions)
                partitions = partitions[len(taken) :]
                self._slots.start(node, free[-1], taken)

    def _cut(self, partitions: list[_Partition]) -> _Taken:
        """As many first batches as fit into one request."""
        taken: _Taken = []
        size = 0
        for partition in partitions:
            outgoing = partition.queue[0]
            size += outgoing.batch.size_bytes
            if taken and size > MAX_PRODUCE_BYTES:
                break
            del self._ready[partition]
            partition.in_flight = outgoing
            taken.append((partition, outgoing))
        return taken

    def _on_slot_free(self, node: int) -> None:
        if self._ready:
            self._dispatch_soon()

    # --- sending -------------------------------------------------------------------------------------------------

    async def _produce(self, node: int, slot: int, taken: _Taken) -> None:
        try:
            if self._identity is None:
                await self._init_identity(None)
            batches = [(p.tp, self._stamp(p, outgoing)) for p, outgoing in taken if p.in_flight is outgoing]
            call = PRODUCE(batches, timeout_ms=self._client.request_timeout_ms)
            response: ProduceResponse = await self._client.send(node, call, "produce")
        except RetriableError as exc:
            for partition in self._landed(taken):
                self._on_no_answer(partition, exc)
        except StreamFlowError as exc:
            for partition in self._landed(taken):
                self._fail(partition, _fatal(exc))
        else:
            told = {part.tp: part for part in response.partitions}
            for partition in self._landed(taken):
                await self._take(partition, partition.queue[0], told.get(partition.tp))

    def _landed(self, taken: _Taken) -> list[_Partition]:
        """Those partitions whose batch is still waited for; it is in flight no more."""
        landed = [partition for partition, outgoing in taken if partition.in_flight is outgoing]
        for partition in landed:
            partition.in_flight = None
        return landed

    def _stamp(self, partition: _Partition, outgoing: _Outgoing) -> bytes:
        if outgoing.stamped is None:
            if partition.identity is None:
                partition.identity, partition.next_sequence = self._identity, 0
            identity = partition.identity
            if identity is None:
                raise RetriableError("no producer id yet")
            outgoing.sequence = partition.next_sequence
            outgoing.stamped = outgoing.batch.stamped(identity.producer_id, identity.epoch, outgoing.sequence)
        return outgoing.stamped

    async def _init_identity(self, refused: Identity | None) -> None:
        """Get a producer id; several partitions refused at once share the new one."""
        async with self._identity_lock:
            if self._identity is not None and self._identity != refused:
                return

            async def init() -> Identity:
                response = await self._client.ask_any(wire.INIT_PRODUCER_ID(None, 0, -1, -1))
                if response.error_code:
                    raise codes.error(response.error_code, "get a producer id (IDEMPOTENT_WRITE)")
                return Identity(response.producer_id, response.producer_epoch)

            self._identity = await retried(init, timeout_s=5.0)

    # --- answers -------------------------------------------------------------------------------------------------

    async def _take(self, partition: _Partition, outgoing: _Outgoing, part: ProducedPartition | None) -> None:
        code = -1 if part is None else part.error_code
        if part is not None and code in (codes.NONE, codes.DUPLICATE_SEQUENCE):
            self._on_stored(partition, outgoing, part.base_offset)
            return
        self._count(f"produce: {codes.name(code)}", partition)
        error = codes.error(code, f"write to {partition.tp}")
        if code in codes.UNACCEPTABLE_RECORDS:
            self._fail(partition, unacceptable(partition.tp, outgoing.batch, code, self._limits))
        elif code in _IDENTITY_REFUSED:
            await self._on_identity_refused(partition, outgoing, code)
        elif isinstance(error, FatalError) and not isinstance(error, UnknownTopicError):
            self._fail(partition, error)
        else:
            outgoing.may_be_stored |= code in _OUTCOME_UNKNOWN
            self._find_leader_of(partition)

    def _on_stored(self, partition: _Partition, outgoing: _Outgoing, base_offset: int) -> None:
        partition.queue.popleft()
        partition.failures = 0
        partition.next_sequence = next_sequence(outgoing.sequence, outgoing.batch.num_records)
        self._release(outgoing)
        if not outgoing.future.done():
            outgoing.future.set_result(base_offset)
        if partition.queue:
            self._send_soon(partition)

    async def _on_identity_refused(self, partition: _Partition, outgoing: _Outgoing, code: int) -> None:
        """A new producer id, if the batch surely was not stored under the old one.

        Out of order means that what is stored ends before this batch; the other codes say nothing about it, so after
        an attempt of unknown outcome the batch may be there.
        """
        if outgoing.may_be_stored and code != codes.OUT_OF_ORDER_SEQUENCE:
            what = f"{partition.tp}: the broker has forgotten this producer ({codes.name(code)})"
            self._fail(partition, LogUnavailableError(f"{what}; whether the last batch was stored cannot be told"))
            return
        try:
            await self._init_identity(partition.identity)
        except StreamFlowError as exc:
            self._count(str(exc), partition)
        else:
            partition.identity, partition.next_sequence, outgoing.stamped = None, 0, None
        self._find_leader_of(partition)

    def _on_no_answer(self, partition: _Partition, exc: RetriableError) -> None:
        self._count(str(exc), partition)
        partition.queue[0].may_be_stored |= partition.queue[0].stamped is not None
        self._find_leader_of(partition)

    # --- failing -------------------------------------------------------------------------------------------------

    def _fail(self, partition: _Partition, error: StreamFlowError) -> None:
        """The first batch and all behind it fail; the next identity starts at sequence 0.

        A fresh identity is needed because a dropped batch may be stored: its sequence numbers are spent, and a later
        batch under the same ones would be taken for a repetition and lost.
        """
        partition.failure = error
        partition.identity = None
        partition.in_flight = None
        partition.failures = 0
        self._identity = None
        self._ready.pop(partition, None)
        self._homeless.pop(partition, None)
        while partition.queue:
            self._fail_one(partition.queue.popleft(), error)

    def _on_bug(self, exc: BaseException) -> None:
        error = InternalError(f"the producer failed: {exc!r}")
        error.__cause__ = exc
        for partition in self._partitions.values():
            self._fail(partition, error)

    def _fail_one(self, outgoing: _Outgoing, error: StreamFlowError) -> None:
        self._release(outgoing)
        if not outgoing.future.done():
            outgoing.future.set_exception(error)
            outgoing.future.exception()  # seen: a future nobody awaits makes no noise

    def _release(self, outgoing: _Outgoing) -> None:
        if self._outstanding.pop(outgoing, self) is self:
            return
        self._buffered_bytes -= outgoing.batch.size_bytes
        for waiter in self._room_wanted:
            if not waiter.done():
                waiter.set_result(None)

    async def _expire(self) -> None:
        """Fail what is past its delivery time-out, in flight or not; batches expire in the order they came."""
        while True:
            first = next(iter(self._outstanding), None)
            if first is None:
                self._deadline_moved.clear()
                await self._deadline_moved.wait()
                continue
            now = time.monotonic()
            if first.deadline > now:
                await anyio.sleep(first.deadline - now)
                # A loop that was blocked has not read its answers yet: they come first.
                await anyio.sleep(min(time.monotonic() - first.deadline, _LATE_ANSWER_S))
                continue
            for partition in self._partitions.values():
                if partition.queue and partition.queue[0].deadline <= now:
                    what = f"{partition.tp}: no acknowledgement within {self._delivery_timeout_s:g} s"
                    self._fail(partition, LogUnavailableError(f"{what} (last error: {self._last_error(partition)})"))

    def _last_error(self, partition: _Partition) -> str:
        unknown_s = self._client.unknown_for_s(partition.tp.topic)
        if unknown_s:
            return f"the topic does not exist for {unknown_s:.0f} s"
        return self._last or "none, the broker just does not answer"

    def _count(self, what: str, partition: _Partition) -> None:
        self.errors[what] += 1
        self._last = what
        partition.failures += 1
        # Once or twice is nothing: a topic that was just made, a leader that moved.
        level = logging.WARNING if partition.failures == _TOLD_AT_FAILURES else logging.DEBUG
        logger.log(level, "%s: %s, %d times in a row; trying on", partition.tp, what, partition.failures)

    # --- leaders -------------------------------------------------------------------------------------------------

    def _find_leader_of(self, partition: _Partition) -> None:
        if partition.queue:
            self._homeless[partition] = None
            self._leader_needed.set()

    async def _find_leaders(self) -> None:
        """Refresh the metadata while a partition has no leader or its leader refused it; never a hot loop."""
        while True:
            await self._leader_needed.wait()
            self._leader_needed.clear()
            partitions = list(self._homeless)
            failures = min((partition.failures for partition in partitions), default=0)
            if failures:
                await anyio.sleep(backoff_s(failures))
            try:
                await self._client.refresh({partition.tp.topic for partition in partitions})
            except RetriableError as exc:
                for partition in partitions:
                    self._count(str(exc), partition)
            except StreamFlowError as exc:
                for partition in partitions:
                    self._fail(partition, _fatal(exc))
            for partition in partitions:
                self._rehome(partition)
            if self._homeless:
                self._leader_needed.set()

    def _rehome(self, partition: _Partition) -> None:
        if self._homeless.pop(partition, self) is self or not partition.queue:
            return
        topic = partition.tp.topic
        if self._client.leader(partition.tp) is not None:
            self._send_soon(partition)
            return
        code = self._client.topic_errors.get(topic, codes.NONE)
        error = codes.error(code, f"write to {partition.tp}") if code else None
        is_gone = self._client.unknown_for_s(topic) > _UNKNOWN_TOPIC_S
        if is_gone or (isinstance(error, FatalError) and not isinstance(error, UnknownTopicError)):
            self._fail(partition, error or UnknownTopicError(f"write to {partition.tp}: the topic does not exist"))
            return
        partition.failures += 1
        self._homeless[partition] = None


def _fatal(error: StreamFlowError) -> StreamFlowError:
    """What refuses at the start stops the worker later."""
    return FatalError(str(error)) if isinstance(error, RefusedError) else error
