"""Kafka v2 record batches: what every log stores, and what everything above hop 1 reads and writes.

Read and written with aiokafka's compiled codec (`aiokafka.record`), reached through `log/codec.py` only.

Invariants: a `RecordBatch` is read once (the codec is single pass); a `SealedBatch` is unstamped (no producer id,
epoch, sequence) and can be stamped any number of times, so that the same records can be sent again after a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Protocol

from streamflow.log import codec
from streamflow.model.record import Headers

DEFAULT_MAX_BATCH_BYTES = 1_048_588
"""Kafka's default of `max.message.bytes`, which SQLite shares."""


class LogRecord(Protocol):
    """One record as the codec reads it (aiokafka's `DefaultRecord`)."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> list[tuple[str, bytes | None]]: ...


class RecordBatch:
    """One batch as read from the log, not yet opened.

    Args:
        records: The codec's batch.
        first_offset: Records below it are skipped (a log returns whole batches; the position may lie inside one).
        size_bytes: Stored size.
    """

    __slots__ = ("_records", "first_offset", "next_offset", "size_bytes")

    def __init__(self, records: codec.Batch, first_offset: int, size_bytes: int) -> None:
        self._records = records
        self.first_offset = first_offset
        self.next_offset: int = records.next_offset
        self.size_bytes = size_bytes

    @property
    def max_timestamp_ms(self) -> int:
        """Greatest timestamp in the batch."""
        latest: int = self._records.max_timestamp
        return latest

    @property
    def base_offset(self) -> int:
        """Offset of the batch's first record, before `first_offset` is applied."""
        base_offset: int = self._records.base_offset
        return base_offset

    def open(self) -> Iterator[LogRecord]:
        """Iterate over the records from `first_offset` on, once; decompression happens here."""
        # The chain ends for good: the codec's own iterator raises when it is asked again after its end.
        records: Iterator[LogRecord] = chain(self._records)
        if self._records.base_offset >= self.first_offset:
            return records
        first = self.first_offset
        return (record for record in records if record.offset >= first)


class SealedBatch:
    """A finished batch, compressed, without producer id, epoch, sequence or base offset.

    Args:
        data: The encoded batch.
        num_records: How many records it holds.
        max_timestamp_ms: Their greatest timestamp.
    """

    __slots__ = ("_data", "max_timestamp_ms", "num_records")

    def __init__(self, data: bytearray, num_records: int, max_timestamp_ms: int) -> None:
        self._data = data
        self.num_records = num_records
        self.max_timestamp_ms = max_timestamp_ms

    @property
    def size_bytes(self) -> int:
        """Encoded size."""
        return len(self._data)

    def unstamped(self) -> bytes:
        """The batch as it is: producer id -1, base offset 0 (what SQLite stores before it sets the base offset)."""
        return bytes(self._data)

    def stamped(
        self, producer_id: int, producer_epoch: int, base_sequence: int, *, transactional: bool = False
    ) -> bytes:
        """A copy with the producer's identity and a new checksum.

        Args:
            producer_id: From InitProducerId.
            producer_epoch: Its epoch.
            base_sequence: Sequence number of the first record, 0..2^31-1.
            transactional: Set the transactional attribute.

        Returns:
            Bytes for a produce request.
        """
        return codec.stamp(self._data, producer_id, producer_epoch, base_sequence, transactional=transactional)


class BatchBuilder:
    """Collects records for one partition until it is sealed.

    Args:
        compression: `codec.NONE`, `GZIP`, `SNAPPY`, `LZ4` or `ZSTD`.
        max_bytes: Size before compression at which `append` refuses; a first record always fits.
    """

    __slots__ = ("_builder", "append_numbered", "num_records")

    def __init__(self, compression: int, max_bytes: int) -> None:
        self._builder = codec.new_builder(compression, max_bytes)
        # The codec's own append, for the hot path: takes the record's number in the batch first, returns None when the
        # batch is full. Who calls it counts, and gives the count to `seal`.
        # The codec takes headers as a list only.
        self.append_numbered: Callable[[int, int, bytes | None, bytes | None, Any], Any] = self._builder.append
        self.num_records = 0

    @property
    def size_bytes(self) -> int:
        """Size so far, before compression."""
        size: int = self._builder.size()
        return size

    def append(self, timestamp_ms: int, key: bytes | None, value: bytes | None, headers: Headers) -> bool:
        """Add a record.

        Args:
            timestamp_ms: Milliseconds since the epoch.
            key: Encoded key or None.
            value: Encoded value or None (a tombstone).
            headers: Record headers.

        Returns:
            False when the batch is full: the record was not added; seal, open a new builder, append there.
        """
        if self.append_numbered(self.num_records, timestamp_ms, key, value, list(headers)) is None:
            return False
        self.num_records += 1
        return True

    def seal(self, num_records: int | None = None) -> SealedBatch:
        """Encode and compress; the builder must not be used again.

        Args:
            num_records: How many records were appended, where `append_numbered` was called directly.
        """
        data = self._builder.build()
        return SealedBatch(data, self.num_records if num_records is None else num_records, codec.max_timestamp_ms(data))
