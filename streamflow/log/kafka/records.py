"""From the bytes of a fetch response to whole record batches: no I/O.

Checksums, aborted transactions (the algorithm of Kafka's own consumer), control batches, the first batch that starts
before the position, batches that compaction has emptied.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamflow.errors import LogCorruptedError
from streamflow.log import codec
from streamflow.log.batch import RecordBatch
from streamflow.model.record import TopicPartition

# base offset, length, leader epoch, magic, crc, attributes, last offset delta, first and max timestamp,
# producer id, epoch, base sequence, number of records
_HEADER = struct.Struct(">qiibIhiqqqhii")
_LENGTH_END = 12
_MAGIC_AT = 16
_MAGIC = 2
_TRANSACTIONAL, _CONTROL = 0x10, 0x20
_ABORT = b"\x00\x00\x00\x00"  # version 0, type 0: the key of an abort marker


@dataclass(slots=True)
class Opened:
    """What a partition's bytes held.

    Attributes:
        batches: Whole batches to hand out.
        next_offset: Position after them, after skipped batches too.
        size_bytes: Stored size of `batches`.
        error: The batch at `next_offset` cannot be read; those before it can.
    """

    batches: list[RecordBatch] = field(default_factory=list)
    next_offset: int = 0
    size_bytes: int = 0
    error: LogCorruptedError | None = None


def open_records(tp: TopicPartition, data: bytes, position: int, aborted: Sequence[tuple[int, int]]) -> Opened:
    """Split bytes into batches.

    Args:
        tp: Where they come from, for messages.
        data: Record batches; the last one may be cut off.
        position: The offset asked for; the first batch may begin before it.
        aborted: (producer id, first offset) of the aborted transactions among them; empty when uncommitted records
            are wanted.

    Returns:
        The batches, and where to go on.
    """
    opened = Opened(next_offset=position)
    view = memoryview(data)
    filter_ = _AbortedTransactions(aborted) if aborted else None
    at, end = 0, len(data)
    while at + _MAGIC_AT < end:
        if data[at + _MAGIC_AT] != _MAGIC:
            opened.error = _unreadable(tp, opened.next_offset, f"has message format {data[at + _MAGIC_AT]}, not 2")
            break
        if at + _HEADER.size > end:
            break
        header = _HEADER.unpack_from(data, at)
        base_offset, attributes, next_offset = header[0], header[5], header[0] + header[6] + 1
        size = _LENGTH_END + header[1]
        if at + size > end:
            break
        raw = view[at : at + size]
        at += size
        if codec.crc32c(raw[21:]) != header[4]:
            opened.error = _unreadable(tp, base_offset, "does not match its checksum")
            break
        if next_offset <= position:
            continue
        opened.next_offset = next_offset
        if header[12] <= 0 or (filter_ is not None and filter_.skips(header, raw)) or attributes & _CONTROL:
            continue
        batch = codec.Batch(raw)  # pyright: ignore[reportArgumentType]  # any buffer will do
        opened.batches.append(RecordBatch(batch, position, size))
        opened.size_bytes += size
    return opened


class _AbortedTransactions:
    """Which batches belong to aborted transactions: from the first offset told to the producer's abort marker."""

    def __init__(self, aborted: Sequence[tuple[int, int]]) -> None:
        self._to_come = sorted(aborted, key=lambda entry: entry[1], reverse=True)
        self._open: set[int] = set()

    def skips(self, header: tuple[int, ...], raw: memoryview) -> bool:
        last_offset, producer_id = header[0] + header[6], header[9]
        while self._to_come and self._to_come[-1][1] <= last_offset:
            self._open.add(self._to_come.pop()[0])
        if not header[5] & _TRANSACTIONAL or producer_id not in self._open:
            return False
        if header[5] & _CONTROL and _is_abort_marker(raw):
            self._open.discard(producer_id)
        return True


def _is_abort_marker(raw: memoryview) -> bool:
    for record in codec.Batch(raw):  # pyright: ignore[reportArgumentType]
        return bool(record.key == _ABORT)
    return False


def _unreadable(tp: TopicPartition, offset: int, why: str) -> LogCorruptedError:
    return LogCorruptedError(
        f"{tp}: the batch at offset {offset} {why}; restore it from a replica, or move the group past it"
    )
