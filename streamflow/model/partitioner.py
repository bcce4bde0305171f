"""Which partition a key goes to: Kafka's default partitioner, so that Java and StreamFlow agree (co-partitioning).

`(murmur2(key) & 0x7fffffff) % n`, as `org.apache.kafka.clients.producer.internals.BuiltInPartitioner` does.
"""

from __future__ import annotations

from murmurhash2 import murmurhash2

SEED = 0x9747B28C
"""What Kafka gives `murmurhash2` beside the key."""
POSITIVE = 0x7FFFFFFF
"""Bits of the hash that count."""


def murmur2(data: bytes) -> int:
    """Kafka's 32-bit murmur2.

    Args:
        data: Any bytes.

    Returns:
        The hash, unsigned.
    """
    return murmurhash2(data, SEED)


def partition_for(key: bytes, partitions: int) -> int:
    """The partition of a key.

    Args:
        key: Encoded key.
        partitions: Partition count, >= 1.

    Returns:
        0..partitions-1.
    """
    return (murmurhash2(key, SEED) & POSITIVE) % partitions
