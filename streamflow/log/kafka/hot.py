"""Fetch and Produce packed by hand: the two requests that are sent for every batch (25 us by schema, 5 by hand).

Fetch v13 (KIP-516: topics by id; v11 for brokers before Kafka 3.1; whole batches, no session), Produce v7 (KIP-110; one
batch per partition and request).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple, TypedDict, Unpack

from streamflow.log.kafka.wire import Call
from streamflow.model.record import TopicPartition

MAX_PRODUCE_BYTES = 4 << 20
"""Of batches in one produce request; a single batch may be larger."""

_COUNT = struct.Struct(">i")
_LENGTH = struct.Struct(">h")


def _text(value: str) -> bytes:
    data = value.encode()
    return _LENGTH.pack(len(data)) + data


# --- fetch -------------------------------------------------------------------------------------------------------


class FetchedPartition(NamedTuple):
    """One partition's part of a fetch response.

    Attributes:
        tp: The partition.
        error_code: 0 or what went wrong.
        high_watermark: End offset; -1 with an error.
        log_start: First offset; -1 with an error.
        aborted: (producer id, first offset) of aborted transactions among the records.
        records: Record batches, the last one possibly cut off.
    """

    tp: TopicPartition
    error_code: int
    high_watermark: int
    log_start: int
    aborted: Sequence[tuple[int, int]]
    records: bytes


@dataclass(slots=True)
class FetchResponse:
    """A fetch response.

    Attributes:
        throttle_time_ms: How long the broker mutes this client.
        error_code: Of the whole request.
        partitions: Those that were asked for.
    """

    throttle_time_ms: int
    error_code: int
    partitions: list[FetchedPartition]

    def __repr__(self) -> str:
        return f"FetchResponse({len(self.partitions)} partitions)"


class FetchLimits(TypedDict):
    """How much is to come, and when.

    Attributes:
        max_wait_ms: How long the broker may wait for the first byte.
        max_bytes: Of the response (a first batch that is larger comes all the same).
        max_partition_bytes: Of one partition.
        read_committed: Up to the last stable offset only.
    """

    max_wait_ms: int
    max_bytes: int
    max_partition_bytes: int
    read_committed: bool


_HEAD = struct.Struct(">iiiibii")
_PARTITION_HEAD = struct.Struct(">ihqqq")


def _head_of(limits: FetchLimits) -> bytes:
    return _HEAD.pack(-1, limits["max_wait_ms"], 1, limits["max_bytes"], limits["read_committed"], 0, -1)


class _Fetch:
    name, key, version, flexible = "Fetch", 1, 11, False

    _partition = struct.Struct(">iiqqi")
    _aborted = struct.Struct(">qq")

    def __call__(self, positions: Iterable[tuple[TopicPartition, int]], **limits: Unpack[FetchLimits]) -> Call:
        """Ask for batches from these offsets on.

        Args:
            positions: Partition and offset; the order is the order in which the broker fills the response.
            limits: See `FetchLimits`.
        """
        size = limits["max_partition_bytes"]
        topics: dict[str, list[bytes]] = {}
        for (topic, partition), offset in positions:
            topics.setdefault(topic, []).append(self._partition.pack(partition, -1, offset, -1, size))
        parts = [_head_of(limits), _COUNT.pack(len(topics))]
        for topic, packed in topics.items():
            parts += (_text(topic), _COUNT.pack(len(packed)), *packed)
        parts.append(b"\0\0\0\0\0\0")  # no forgotten topics, no rack
        return Call(self, b"".join(parts))

    def decode(self, buffer: BytesIO) -> FetchResponse:
        """Read a response; each partition's records become bytes of their own."""
        data, at = buffer.getvalue(), buffer.tell()
        throttle, error, _session, topic_count = struct.unpack_from(">ihii", data, at)
        at += 14
        partitions: list[FetchedPartition] = []
        for _ in range(topic_count):
            (length,) = _LENGTH.unpack_from(data, at)
            topic = data[at + 2 : at + 2 + length].decode()
            (count,) = _COUNT.unpack_from(data, at + 2 + length)
            at += 6 + length
            for _ in range(count):
                at = self._read_partition(data, at, topic, partitions)
        return FetchResponse(throttle, error, partitions)

    def _read_partition(self, data: bytes, at: int, topic: str, into: list[FetchedPartition]) -> int:
        partition, error, high_watermark, _stable, log_start = _PARTITION_HEAD.unpack_from(data, at)
        (aborted_count,) = _COUNT.unpack_from(data, at + 30)
        at += 34
        aborted = []
        for _ in range(aborted_count):
            aborted.append(self._aborted.unpack_from(data, at))
            at += 16
        (size,) = _COUNT.unpack_from(data, at + 4)  # after the preferred replica
        at += 8
        end: int = at + max(size, 0)
        tp = TopicPartition(topic, partition)
        into.append(FetchedPartition(tp, error, high_watermark, log_start, aborted, data[at:end]))
        return end


FETCH = _Fetch()


class FetchById:
    """Fetch v13 (KIP-516): a topic by its id, so that one that was deleted and made anew is another one to the broker.

    Args:
        ids: By name, of all topics that are asked for.
    """

    name, key, version, flexible = "Fetch", 1, 13, True

    _partition = struct.Struct(">iiqiqi")
    _aborted = struct.Struct(">qq")

    def __init__(self, ids: Mapping[str, bytes]) -> None:
        self._ids = ids
        self._names = {topic_id: name for name, topic_id in ids.items()}

    def __call__(self, positions: Iterable[tuple[TopicPartition, int]], **limits: Unpack[FetchLimits]) -> Call:
        """Ask for batches from these offsets on; see `FETCH`."""
        topics: dict[str, list[bytes]] = {}
        size = limits["max_partition_bytes"]
        for (topic, partition), offset in positions:
            packed = self._partition.pack(partition, -1, offset, -1, -1, size) + b"\0"
            topics.setdefault(topic, []).append(packed)
        parts = [_head_of(limits), _compact(len(topics))]
        for topic, each in topics.items():
            parts += (self._ids[topic], _compact(len(each)), *each, b"\0")
        parts.append(b"\1\1\0")  # no forgotten topics, no rack, no tags
        return Call(self, b"".join(parts))

    def decode(self, buffer: BytesIO) -> FetchResponse:
        """Read a response; each partition's records become bytes of their own."""
        data, at = buffer.getvalue(), buffer.tell()
        throttle, error, _session = struct.unpack_from(">ihi", data, at)
        topic_count, at = _varint(data, at + 10)
        partitions: list[FetchedPartition] = []
        for _ in range(topic_count - 1):
            topic = self._names[data[at : at + 16]]
            count, at = _varint(data, at + 16)
            for _ in range(count - 1):
                at = self._read_partition(data, at, topic, partitions)
            at = _behind_tags(data, at)
        return FetchResponse(throttle, error, partitions)

    def _read_partition(self, data: bytes, at: int, topic: str, into: list[FetchedPartition]) -> int:
        partition, error, high_watermark, _stable, log_start = _PARTITION_HEAD.unpack_from(data, at)
        aborted_count, at = _varint(data, at + 30)
        aborted = []
        for _ in range(aborted_count - 1):
            aborted.append(self._aborted.unpack_from(data, at))
            at = _behind_tags(data, at + 16)
        size, at = _varint(data, at + 4)  # after the preferred replica
        end: int = at + max(size - 1, 0)
        tp = TopicPartition(topic, partition)
        into.append(FetchedPartition(tp, error, high_watermark, log_start, aborted, data[at:end]))
        return _behind_tags(data, end)


def _compact(count: int) -> bytes:
    """The length of a compact array."""
    count += 1
    out = bytearray()
    while count > 0x7F:
        out.append(count & 0x7F | 0x80)
        count >>= 7
    out.append(count)
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of 7 bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _behind_tags(data: bytes, at: int) -> int:
    """Where tagged fields end; none of them is read."""
    count, at = _varint(data, at)
    for _ in range(count):
        _, at = _varint(data, at)
        size, at = _varint(data, at)
        at += size
    return at


# --- produce -----------------------------------------------------------------------------------------------------


class ProducedPartition(NamedTuple):
    """One partition's part of a produce response.

    Attributes:
        tp: The partition.
        error_code: 0 or what went wrong.
        base_offset: Offset of the batch's first record; -1 with an error, or for a duplicate that is long past.
        log_start: First offset of the partition; -1 when not told.
    """

    tp: TopicPartition
    error_code: int
    base_offset: int
    log_start: int


@dataclass(slots=True)
class ProduceResponse:
    """A produce response.

    Attributes:
        throttle_time_ms: How long the broker mutes this client.
        partitions: What became of each batch.
    """

    throttle_time_ms: int
    partitions: list[ProducedPartition]

    def __repr__(self) -> str:
        return f"ProduceResponse({len(self.partitions)} partitions)"


class _Produce:
    name, key, version, flexible = "Produce", 0, 7, False

    _head = struct.Struct(">hi")
    _partition_head = struct.Struct(">ii")
    _partition = struct.Struct(">ihqqq")

    def __call__(
        self, batches: Iterable[tuple[TopicPartition, bytes]], *, timeout_ms: int, transactional_id: str | None = None
    ) -> Call:
        """Write batches, acknowledged by all in-sync replicas.

        Args:
            batches: At most one stamped batch per partition.
            timeout_ms: How long the broker may wait for the replicas.
            transactional_id: Of the transaction they belong to.
        """
        topics: dict[str, list[tuple[int, bytes]]] = {}
        for (topic, partition), data in batches:
            topics.setdefault(topic, []).append((partition, data))
        name = b"\xff\xff" if transactional_id is None else _text(transactional_id)
        parts = [name, self._head.pack(-1, timeout_ms), _COUNT.pack(len(topics))]
        for topic, packed in topics.items():
            parts += (_text(topic), _COUNT.pack(len(packed)))
            for partition, data in packed:
                parts += (self._partition_head.pack(partition, len(data)), data)
        return Call(self, b"".join(parts))

    def decode(self, buffer: BytesIO) -> ProduceResponse:
        """Read a response."""
        data, at = buffer.getvalue(), buffer.tell()
        (topic_count,) = _COUNT.unpack_from(data, at)
        at += 4
        partitions: list[ProducedPartition] = []
        for _ in range(topic_count):
            (length,) = _LENGTH.unpack_from(data, at)
            topic = data[at + 2 : at + 2 + length].decode()
            (count,) = _COUNT.unpack_from(data, at + 2 + length)
            at += 6 + length
            for _ in range(count):
                partition, error, base_offset, _append_time, log_start = self._partition.unpack_from(data, at)
                at += 30
                partitions.append(ProducedPartition(TopicPartition(topic, partition), error, base_offset, log_start))
        (throttle,) = _COUNT.unpack_from(data, at)
        return ProduceResponse(throttle, partitions)


PRODUCE = _Produce()
