"""The batches of one transaction, to the leaders of their partitions.

They go in waves. A partition's first batch of a transaction goes alone, as a broker that knows nothing of the producer
yet takes any sequence number; once it is stored, the broker refuses what is out of order, and up to five follow one
another without waiting (a broker recognises a producer's last five batches). Leaders are written to side by side.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import anyio

from streamflow.errors import LogUnavailableError, RetriableError, StreamFlowError, UnknownTopicError
from streamflow.log.batch import SealedBatch
from streamflow.log.kafka import codes
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.client import Client
from streamflow.log.kafka.hot import MAX_PRODUCE_BYTES, PRODUCE, ProducedPartition, ProduceResponse
from streamflow.log.kafka.producer import Identity, next_sequence, unacceptable
from streamflow.log.kafka.wire_transaction import PRODUCE_2
from streamflow.model.record import TopicPartition

_IN_FLIGHT = 5
_UNKNOWN_TOPIC_S = 3.0
_STILL_ENDING = frozenset({codes.CONCURRENT_TRANSACTIONS, codes.NOT_ENOUGH_REPLICAS})
"""The transaction before is still writing its markers: the second code is what versions before 12 get for the first."""
_ABORT = frozenset(
    {
        codes.OUT_OF_ORDER_SEQUENCE,
        codes.DUPLICATE_SEQUENCE,  # stored, but where is not told
        codes.INVALID_PRODUCER_EPOCH,
        codes.INVALID_TRANSACTION_STATE,
        codes.INVALID_PRODUCER_ID_MAPPING,
        codes.UNKNOWN_PRODUCER_ID,
        codes.PRODUCER_FENCED,
        codes.TRANSACTION_ABORTABLE,
    }
)


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A batch and its place in the partition's sequence."""

    tp: TopicPartition
    batch: SealedBatch
    sequence: int


@dataclass(slots=True, eq=False)
class _Partition:
    """What is still to be stored, in order."""

    tp: TopicPartition
    next_sequence: int
    queue: deque[_Outgoing] = field(default_factory=deque)
    is_known: bool = False
    end_offset: int = -1


_Request: TypeAlias = list[_Outgoing]
"""What one request carries: at most one batch per partition."""


class TransactionOutputs:
    """Stores the outputs of transactions, one transaction at a time.

    Args:
        client: Connections.
        limits: `max.message.bytes` per topic.
        transactional_id: Of the producer.
        lane: A connection of its own to each leader.
        timeout_ms: How long a broker may wait for its replicas.
    """

    def __init__(
        self,
        client: Client,
        limits: Mapping[str, int],
        transactional_id: str,
        lane: tuple[object, str],
        timeout_ms: int,
    ) -> None:
        self._client = client
        self._limits = limits
        self._id = transactional_id
        self._lane = lane
        self._timeout_ms = timeout_ms
        self._sequences: dict[TopicPartition, int] = {}
        self._leaders_in_doubt = False

    def restart_sequences(self) -> None:
        """The next batch is the first of a new identity."""
        self._sequences.clear()

    def restart(self) -> None:
        """After a failure: besides, what is known of topics and leaders may be what was wrong."""
        self._sequences.clear()
        self._leaders_in_doubt = True

    async def find_leaders(self, tps: Iterable[TopicPartition], attempt: Attempt) -> None:
        """Know who leads these partitions; asked anew after one has not answered.

        Raises:
            UnknownTopicError: One does not exist, for some seconds already.
            RetriableError: One has no leader.
        """
        tps = list(tps)
        failures = 0
        while tps and (self._leaders_in_doubt or any(self._client.leader(tp) is None for tp in tps)):
            error = await self._refresh(tps, attempt)
            if error is None:
                return
            failures += 1
            await attempt.pause(failures, error)

    async def _refresh(self, tps: Sequence[TopicPartition], attempt: Attempt) -> RetriableError | None:
        try:
            with anyio.fail_after(attempt.remaining_s()):
                await self._client.refresh({tp.topic for tp in tps})
                await self._client.leaders(tps)
        except TimeoutError:
            return LogUnavailableError(f"write to {tps[0]}: no broker tells who leads it")
        except UnknownTopicError as exc:
            if any(self._client.unknown_for_s(tp.topic) > _UNKNOWN_TOPIC_S for tp in tps):
                raise
            return RetriableError(str(exc))
        except RetriableError as exc:
            return exc
        self._leaders_in_doubt = False
        return None

    async def store(
        self, outputs: Iterable[tuple[TopicPartition, SealedBatch]], identity: Identity, version: int, attempt: Attempt
    ) -> dict[TopicPartition, int]:
        """Store all, or raise; then the transaction has to be aborted, and nothing is under way any more.

        Args:
            outputs: Batches, per partition in order.
            identity: Under which.
            version: Of the transaction protocol; version 2 makes the partitions part of the transaction.
            attempt: The bound.

        Returns:
            Per partition the offset after its last record.

        Raises:
            ProductionError: A batch is refused for good.
            AuthorizationError, UnknownTopicError: As it says.
            RetriableError: Anything else.
        """
        partitions: dict[TopicPartition, _Partition] = {}
        for tp, batch in outputs:
            partition = partitions.get(tp)
            if partition is None:
                partition = partitions[tp] = _Partition(tp, self._sequences.get(tp, 0))
            partition.queue.append(_Outgoing(tp, batch, partition.next_sequence))
            partition.next_sequence = next_sequence(partition.next_sequence, batch.num_records)
        failures = 0
        while left := [partition for partition in partitions.values() if partition.queue]:
            error = await self._wave(left, identity, version, attempt)
            if error is None:
                failures = 0
                continue
            failures += 1
            await attempt.pause(failures, error, brief=not self._leaders_in_doubt)
        self._sequences.update((tp, partition.next_sequence) for tp, partition in partitions.items())
        return {tp: partition.end_offset for tp, partition in partitions.items()}

    async def _wave(
        self, partitions: list[_Partition], identity: Identity, version: int, attempt: Attempt
    ) -> RetriableError | None:
        """Send what may go now, and wait for all of it; the error is why some of it has to go again."""
        tps = [partition.tp for partition in partitions]
        if self._leaders_in_doubt and (error := await self._refresh(tps, attempt)):
            return error
        by_node: dict[int, list[_Partition]] = {}
        for tp, partition in zip(tps, partitions, strict=True):
            node = self._client.leader(tp)
            if node is None:
                self._leaders_in_doubt = True
                return RetriableError(f"write to {tp}: it has no leader")
            by_node.setdefault(node, []).append(partition)
        wave = _Wave(self, identity, version, attempt)
        requests = [(node, _cut(led)) for node, led in by_node.items()]
        if len(requests) == 1:
            await wave.send_all(*requests[0])
        else:
            await asyncio.gather(*(wave.send_all(*each) for each in requests))
        if wave.failure is not None:
            self._leaders_in_doubt = True
            raise wave.failure
        refused: RetriableError | None = None
        has_moved = False
        for partition in partitions:
            code = wave.apply(partition, self._limits)
            if code:
                refused = RetriableError(f"write to {partition.tp}: {codes.name(code)}")
                has_moved |= code not in _STILL_ENDING
        if has_moved:
            self._leaders_in_doubt = True
        return refused

    async def produce(
        self, node: int, request: _Request, identity: Identity, version: int, attempt: Attempt
    ) -> ProduceResponse:
        """Send one request."""
        batches = [
            (
                outgoing.tp,
                outgoing.batch.stamped(identity.producer_id, identity.epoch, outgoing.sequence, transactional=True),
            )
            for outgoing in request
        ]
        produce = PRODUCE_2 if version == 2 else PRODUCE
        call = produce(batches, timeout_ms=self._timeout_ms, transactional_id=self._id)
        response: ProduceResponse = await self._client.send(node, call, self._lane, timeout_s=attempt.remaining_s())
        return response


class _Wave:
    """One round of requests and what became of each batch."""

    def __init__(self, outputs: TransactionOutputs, identity: Identity, version: int, attempt: Attempt) -> None:
        self.failure: StreamFlowError | None = None
        self._told: dict[_Outgoing, ProducedPartition | None] = {}
        self._outputs = outputs
        self._identity = identity
        self._version = version
        self._attempt = attempt

    async def send_all(self, node: int, requests: list[_Request]) -> None:
        """Send requests to one leader in this order, a few at a time; never raises but for cancellation."""
        if len(requests) == 1:
            await self._send(node, requests[0])
            return
        async with asyncio.TaskGroup() as tasks:
            sending: deque[asyncio.Task[None]] = deque()
            for request in requests:
                if len(sending) == _IN_FLIGHT:
                    await sending.popleft()
                if self.failure is not None:
                    break
                sending.append(tasks.create_task(self._send(node, request)))

    async def _send(self, node: int, request: _Request) -> None:
        try:
            response = await self._outputs.produce(node, request, self._identity, self._version, self._attempt)
        except StreamFlowError as exc:
            self.failure = self.failure or exc
            return
        told = {part.tp: part for part in response.partitions}
        for outgoing in request:
            self._told[outgoing] = told.get(outgoing.tp)

    def apply(self, partition: _Partition, limits: Mapping[str, int]) -> int:
        """Take off what is stored.

        Returns:
            The code of the first that is not and may go again; 0 when there is none.

        Raises:
            StreamFlowError: It may not.
        """
        while partition.queue and partition.queue[0] in self._told:
            outgoing = partition.queue[0]
            part = self._told[outgoing]
            code = codes.UNKNOWN_SERVER_ERROR if part is None else part.error_code
            if part is None or code:
                _raise_unless_repeatable(outgoing, code, limits)
                return code
            partition.queue.popleft()
            partition.is_known = True
            partition.end_offset = part.base_offset + outgoing.batch.num_records
        return codes.NONE


def _raise_unless_repeatable(outgoing: _Outgoing, code: int, limits: Mapping[str, int]) -> None:
    if code in codes.UNACCEPTABLE_RECORDS:
        raise unacceptable(outgoing.tp, outgoing.batch, code, limits)
    error = codes.error(code, f"write to {outgoing.tp}")
    may_appear = isinstance(error, UnknownTopicError)  # whether the topic is gone, the metadata say
    if code in _ABORT or not (isinstance(error, RetriableError) or may_appear):
        raise error


def _cut(partitions: list[_Partition]) -> list[_Request]:
    """What goes to one leader in this wave: row by row, each row one batch per partition, cut to size."""
    requests: list[_Request] = []
    for row in range(_IN_FLIGHT):
        request: _Request = []
        size = 0
        for partition in partitions:
            if row >= len(partition.queue) or (row and not partition.is_known):
                continue
            outgoing = partition.queue[row]
            size += outgoing.batch.size_bytes
            if request and size > MAX_PRODUCE_BYTES:
                requests.append(request)
                request, size = [], outgoing.batch.size_bytes
            request.append(outgoing)
        if request:
            requests.append(request)
    return requests
