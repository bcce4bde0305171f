"""The record-batch codec: aiokafka's compiled v2 builder and reader, and the byte positions inside a batch header.

A seam into aiokafka (see `log/kafka/wire.py` for the others): names are checked at import, with the version to pin.
"""

from __future__ import annotations

import struct
from importlib.metadata import version

try:
    from aiokafka.codec import has_zstd
    from aiokafka.record._crecords.cutil import crc32c_cython as crc32c
    from aiokafka.record._crecords.default_records import DefaultRecordBatch as Batch
    from aiokafka.record._crecords.default_records import DefaultRecordBatchBuilder as Builder
except ImportError as exc:  # pragma: no cover - depends on the installation
    raise ImportError(
        "StreamFlow needs aiokafka>=0.14,<0.15 with its compiled extension (aiokafka.record._crecords); "
        f"installed: aiokafka {version('aiokafka')}. Install a wheel of that version for this platform, "
        "and unset AIOKAFKA_NO_EXTENSIONS."
    ) from exc

__all__ = [
    "COMPRESSIONS",
    "GZIP",
    "HEADER_BYTES",
    "LZ4",
    "NONE",
    "SNAPPY",
    "ZSTD",
    "Batch",
    "Builder",
    "compression_number",
    "crc32c",
    "new_builder",
    "set_base_offset",
    "stamp",
]

NONE, GZIP, SNAPPY, LZ4, ZSTD = 0, 1, 2, 3, 4
COMPRESSIONS = {"none": NONE, "gzip": GZIP, "snappy": SNAPPY, "lz4": LZ4, "zstd": ZSTD}
HEADER_BYTES = 61

_BASE_OFFSET = struct.Struct(">q")
_CRC = struct.Struct(">I")
_PRODUCER = struct.Struct(">qhi")
_CRC_AT, _ATTRIBUTES_AT, _MAX_TIMESTAMP_AT, _PRODUCER_AT = 17, 21, 35, 43
_TRANSACTIONAL = 0x10


def compression_number(name: str | None) -> int:
    """The codec's number for a compression.

    Args:
        name: `none`, `gzip`, `snappy`, `lz4` or `zstd`; None is zstd where cramjam is installed, else none.
    """
    if name is None:
        return ZSTD if has_zstd() else NONE
    return COMPRESSIONS[name]


def new_builder(compression: int, max_bytes: int) -> Builder:
    """A builder for an unstamped batch."""
    return Builder(
        magic=2,
        compression_type=compression,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=max_bytes,
    )


def stamp(
    data: bytearray, producer_id: int, producer_epoch: int, base_sequence: int, *, transactional: bool = False
) -> bytes:
    """Copy a batch and set producer id, epoch, sequence, the transactional bit and the checksum."""
    copy = bytearray(data)
    if transactional:
        copy[_ATTRIBUTES_AT + 1] |= _TRANSACTIONAL
    _PRODUCER.pack_into(copy, _PRODUCER_AT, producer_id, producer_epoch, base_sequence)
    _CRC.pack_into(copy, _CRC_AT, crc32c(memoryview(copy)[_ATTRIBUTES_AT:]))
    return bytes(copy)


def max_timestamp_ms(data: bytearray) -> int:
    """The greatest timestamp, from a batch's header."""
    (timestamp_ms,) = _BASE_OFFSET.unpack_from(data, _MAX_TIMESTAMP_AT)
    return int(timestamp_ms)


def set_base_offset(data: bytearray, base_offset: int) -> None:
    """Write the base offset into a batch (it lies outside the checksum)."""
    _BASE_OFFSET.pack_into(data, 0, base_offset)
