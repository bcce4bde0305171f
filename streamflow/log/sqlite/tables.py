"""Topics, partitions and batches as rows: the statements that more than one part of the log needs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from streamflow.errors import ConfigurationError, ProductionError, UnknownTopicError
from streamflow.log import codec
from streamflow.log.api import OffsetMark
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.model.topic_name import TOPIC_NAME_RULE, is_topic_name


def check_topic_name(name: str) -> None:
    """Refuse a topic name that Kafka would refuse.

    Raises:
        ConfigurationError: It is no topic name.
    """
    if not is_topic_name(name):
        raise ConfigurationError(f"topic {name!r}: a name has {TOPIC_NAME_RULE}")


@dataclass(slots=True)
class PartitionRow:
    """One partition's row."""

    id: int
    start_offset: int
    end_offset: int
    max_batch_bytes: int
    added_bytes: int = 0


def partition(sql: sqlite3.Connection, tp: TopicPartition) -> PartitionRow | None:
    """Read a partition's row, or None when the topic or the partition does not exist."""
    row = sql.execute(
        "SELECT p.id, p.start_offset, p.end_offset, t.max_batch_bytes FROM topics t "
        "JOIN partitions p ON p.topic_id = t.id WHERE t.name = ? AND p.partition = ?",
        tp,
    ).fetchone()
    return None if row is None else PartitionRow(*row)


def unknown(sql: sqlite3.Connection, tp: TopicPartition, name: str) -> UnknownTopicError:
    """Say what is missing: the topic, or only the partition."""
    row = sql.execute("SELECT partitions FROM topics WHERE name = ?", (tp.topic,)).fetchone()
    if row is None:
        return UnknownTopicError(f"topic {tp.topic!r} does not exist in log {name}")
    return UnknownTopicError(f"topic {tp.topic!r} has {row[0]} partitions in log {name}; there is no partition {tp}")


def topic_config(sql: sqlite3.Connection, topic: str) -> tuple[int, Mapping[str, str]] | None:
    """A topic's id and configuration, or None."""
    row = sql.execute("SELECT id, config FROM topics WHERE name = ?", (topic,)).fetchone()
    return None if row is None else (row[0], json.loads(row[1]))


def too_large(tp: TopicPartition, batch: SealedBatch, limit: int) -> ProductionError:
    """The error of a batch beyond its topic's limit."""
    return ProductionError(
        f"{tp}: a batch of {batch.num_records} records has {batch.size_bytes} bytes, more than the topic's "
        f"max.message.bytes of {limit}"
    )


class Appender:
    """Appends batches within one write transaction.

    Args:
        sql: The connection, inside a transaction.
        name: The log as messages name it.
        now_ms: Time of appending.
    """

    def __init__(self, sql: sqlite3.Connection, name: str, now_ms: int) -> None:
        self._sql = sql
        self._name = name
        self._now_ms = now_ms
        self._rows: dict[TopicPartition, PartitionRow] = {}

    def append(self, tp: TopicPartition, batch: SealedBatch) -> int:
        """Append a batch.

        Returns:
            Its base offset.

        Raises:
            UnknownTopicError: The partition does not exist.
            ProductionError: The batch is too large.
        """
        row = self._rows.get(tp) or partition(self._sql, tp)
        if row is None:
            raise unknown(self._sql, tp, self._name)
        data = bytearray(batch.unstamped())
        if len(data) > row.max_batch_bytes:
            raise too_large(tp, batch, row.max_batch_bytes)
        base = row.end_offset
        codec.set_base_offset(data, base)
        last = base + batch.num_records - 1
        self._sql.execute(
            "INSERT INTO batches "
            "(partition_id, base_offset, last_offset, max_timestamp_ms, appended_ms, size_bytes, data) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.id, base, last, batch.max_timestamp_ms, self._now_ms, len(data), data),
        )
        row.end_offset = last + 1
        row.added_bytes += len(data)
        self._rows[tp] = row
        return base

    def finish(self) -> None:
        """Write the partitions' new ends: once per partition, however many batches it got."""
        self._sql.executemany(
            "UPDATE partitions SET end_offset = ?, size_bytes = size_bytes + ? WHERE id = ?",
            [(row.end_offset, row.added_bytes, row.id) for row in self._rows.values()],
        )


def store_offsets(sql: sqlite3.Connection, group_id: str, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
    """Set a group's committed offsets."""
    sql.executemany(
        "INSERT OR REPLACE INTO offsets (group_id, topic, partition, offset, metadata) VALUES (?, ?, ?, ?, ?)",
        [(group_id, tp.topic, tp.partition, mark.offset, mark.metadata) for tp, mark in offsets.items()],
    )


def read_offsets(sql: sqlite3.Connection, group_id: str) -> dict[TopicPartition, OffsetMark]:
    """All committed offsets of a group."""
    rows = sql.execute("SELECT topic, partition, offset, metadata FROM offsets WHERE group_id = ?", (group_id,))
    return {TopicPartition(topic, number): OffsetMark(offset, metadata) for topic, number, offset, metadata in rows}
