"""The words of a log in types: partitions, headers, where a record was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

Headers: TypeAlias = Sequence[tuple[str, bytes | None]]
"""Record headers in order; names may repeat, a value may be null."""


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}"


class RecordMetadata(NamedTuple):
    """Where the log put a record that was sent.

    Attributes:
        topic: Topic.
        partition: Partition.
        offset: Offset in the partition.
        timestamp_ms: The record's timestamp, milliseconds since the epoch, UTC.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int

    @property
    def position(self) -> str:
        """For `at=` of a table read: it then sees what agents that read this topic made of the record."""
        return f"{self.topic}:{self.partition}:{self.offset + 1}"
