"""Which partition a key goes to: Kafka's default partitioner, so that Java and StreamFlow agree (co-partitioning).

`(murmur2(key) & 0x7fffffff) % n`, as `org.apache.kafka.clients.producer.internals.BuiltInPartitioner` does.
"""

from __future__ import annotations

import struct

_SEED = 0x9747B28C
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """Kafka's 32-bit murmur2.

    Args:
        data: Any bytes.

    Returns:
        The hash, unsigned.
    """
    length = len(data)
    h = (_SEED ^ length) & _MASK
    words = length >> 2
    for k in struct.unpack_from(f"<{words}I", data):
        k = (k * _M) & _MASK
        k ^= k >> 24
        h = ((h * _M) & _MASK) ^ ((k * _M) & _MASK)
    tail = data[words << 2 :]
    if tail:
        h = ((h ^ int.from_bytes(tail, "little")) * _M) & _MASK
    h ^= h >> 13
    h = (h * _M) & _MASK
    return h ^ (h >> 15)


def partition_for(key: bytes, partitions: int) -> int:
    """The partition of a key.

    Args:
        key: Encoded key.
        partitions: Partition count, >= 1.

    Returns:
        0..partitions-1.
    """
    return (murmur2(key) & 0x7FFFFFFF) % partitions
