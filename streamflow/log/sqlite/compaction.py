"""Compaction of one partition: of each key only the newest record stays, at its old offset.

As in Kafka: the part below `clean_offset` holds each key at most once; a pass takes the newest offset of every key in
the dirty part above it, then rewrites everything up to there without what is superseded. Batches are merged on the
way, because a changelog gets one small batch per commit. A batch that was rewritten with tombstones in it gets a
delete horizon (`delete.retention.ms` from now, KIP-534), after which they go too: every older record of their keys is
gone by then, because a pass goes from the oldest batch to the newest.

Every step is one small transaction, and a pass that is cut short anywhere leaves a correct log. Records without a key
stay (Kafka would have refused them).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from streamflow.errors import StreamFlowError
from streamflow.log import codec
from streamflow.log.batch import LogRecord
from streamflow.log.sqlite.reader import checked
from streamflow.model.record import TopicPartition

DIRTY_RATIO = 0.5
"""Kafka's default of `min.cleanable.dirty.ratio`."""
MOST_KEYS = 200_000
"""Keys of one pass, about 35 MB; a pass over more ends earlier and another one follows."""
RUN_BYTES = 512 * 1024
RUN_BATCHES = 500
_LARGEST_DELTA = 2**31 - 1


class MovedError(StreamFlowError):
    """Somebody purged what was being rewritten; the next round starts anew."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a topic is compacted.

    Attributes:
        min_lag_ms: Records younger than this (by the time of appending) are left alone.
        delete_retention_ms: How long tombstones stay after they were first compacted.
        dirty_ratio: Share of what could be compacted that has to be dirty before a pass starts.
    """

    min_lag_ms: int = 0
    delete_retention_ms: int = 86_400_000
    dirty_ratio: float = DIRTY_RATIO

    @classmethod
    def of(cls, config: Mapping[str, str]) -> Policy:
        """The policy in a topic's configuration."""
        return cls(
            int(config.get("min.compaction.lag.ms", "0")),
            int(config.get("delete.retention.ms", "86400000")),
            float(config.get("min.cleanable.dirty.ratio", str(DIRTY_RATIO))),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """A stored batch."""

    id: int
    base_offset: int
    last_offset: int
    appended_ms: int
    delete_horizon_ms: int | None
    data: bytes


_Row: TypeAlias = tuple[int, int, int, int, int, int | None, int, bytes]
"""Partition, base and last offset, greatest timestamp, time of appending, delete horizon, size, data."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What takes the place of a run of batches.

    Attributes:
        next_offset: Where the next run starts.
        clean_bytes: Size of the run afterwards.
        old: Ids of the batches that go; empty when the run stays as it is.
        old_bytes: Their size.
        new: Rows that come.
    """

    next_offset: int
    clean_bytes: int
    old: list[int] = field(default_factory=list)
    old_bytes: int = 0
    new: list[_Row] = field(default_factory=list)


class Compactor:
    """Reads and rewrites one partition; each method is the work of one transaction.

    Args:
        tp: The partition.
        partition_id: Its row.
        policy: The topic's.
        name: The log as messages name it.
    """

    def __init__(self, tp: TopicPartition, partition_id: int, policy: Policy, name: str) -> None:
        self.tp = tp
        self.partition_id = partition_id
        self.policy = policy
        self._name = name

    def is_worth_it(self, sql: sqlite3.Connection, now_ms: int) -> bool:
        """Whether enough of what may be compacted is dirty."""
        clean_offset, clean_bytes, size = sql.execute(
            "SELECT clean_offset, clean_bytes, size_bytes FROM partitions WHERE id = ?", (self.partition_id,)
        ).fetchone()
        ratio = self.policy.dirty_ratio
        needed = clean_bytes * ratio / (1 - ratio) if ratio < 1 else float("inf")
        if size - clean_bytes < needed:
            return False
        dirty = 0
        for appended_ms, batch_bytes in sql.execute(
            "SELECT appended_ms, size_bytes FROM batches WHERE partition_id = ? AND last_offset >= ? "
            "ORDER BY last_offset",
            (self.partition_id, clean_offset),
        ):
            if appended_ms > now_ms - self.policy.min_lag_ms:
                break
            dirty += batch_bytes
            if dirty > needed:
                return True
        return 0 < dirty >= needed

    def clean_offset(self, sql: sqlite3.Connection) -> int:
        """Where the dirty part starts."""
        (offset,) = sql.execute("SELECT clean_offset FROM partitions WHERE id = ?", (self.partition_id,)).fetchone()
        return int(offset)

    def newest(self, sql: sqlite3.Connection, start: int, now_ms: int, into: dict[bytes, int]) -> int | None:
        """Note the newest offset of each key in the next run of dirty batches.

        Args:
            sql: The connection.
            start: Where the run starts.
            now_ms: Time; younger batches than the lag end the dirty part.
            into: Key to offset.

        Returns:
            Where the next run starts, or None at the end of the dirty part.
        """
        oldest_kept = now_ms - self.policy.min_lag_ms
        next_offset = None
        for batch in self._run(sql, start, None):
            if batch.appended_ms > oldest_kept:
                break
            for record in self._open(batch):
                if record.key is not None:
                    into[record.key] = record.offset
            next_offset = batch.last_offset + 1
        return next_offset

    def rewrite(
        self, sql: sqlite3.Connection, start: int, end: int, newest: Mapping[bytes, int], now_ms: int
    ) -> Rewritten | None:
        """Read a run of batches and build what takes their place.

        Args:
            sql: The connection.
            start: Where the run starts.
            end: Where the pass ends.
            newest: Key to newest offset in the dirty part.
            now_ms: Time.

        Returns:
            The run's replacement, or None when there is nothing before `end`.
        """
        run = list(self._run(sql, start, end))
        return self._rewritten(run, newest, now_ms) if run else None

    def overdue(self, sql: sqlite3.Connection, now_ms: int) -> Rewritten | None:
        """Build the replacement of one batch whose tombstones have been kept for long enough, or None."""
        row = sql.execute(
            "SELECT id, base_offset, last_offset, appended_ms, delete_horizon_ms, data FROM batches "
            "WHERE partition_id = ? AND delete_horizon_ms <= ? LIMIT 1",
            (self.partition_id, now_ms),
        ).fetchone()
        return None if row is None else self._rewritten([Batch(*row)], {}, now_ms)

    def replace(self, sql: sqlite3.Connection, rewritten: Rewritten) -> None:
        """Put a replacement into the log.

        Raises:
            MovedError: The old batches are not all there any more; nothing is changed.
        """
        gone = 0
        for old in rewritten.old:
            gone += sql.execute("DELETE FROM batches WHERE id = ?", (old,)).rowcount
        if gone != len(rewritten.old):
            raise MovedError(f"{self.tp}: purged while it was being compacted")
        sql.executemany(
            "INSERT INTO batches (partition_id, base_offset, last_offset, max_timestamp_ms, appended_ms, "
            "delete_horizon_ms, size_bytes, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rewritten.new,
        )
        sql.execute(
            "UPDATE partitions SET size_bytes = size_bytes + ? WHERE id = ?",
            (rewritten.clean_bytes - rewritten.old_bytes, self.partition_id),
        )

    def finish(self, sql: sqlite3.Connection, clean_offset: int, clean_bytes: int) -> None:
        """Note that everything below an offset is clean."""
        sql.execute(
            "UPDATE partitions SET clean_offset = max(clean_offset, ?), clean_bytes = ? WHERE id = ?",
            (clean_offset, clean_bytes, self.partition_id),
        )

    def _run(self, sql: sqlite3.Connection, start: int, end: int | None) -> Iterator[Batch]:
        size = 0
        cursor = sql.execute(
            "SELECT id, base_offset, last_offset, appended_ms, delete_horizon_ms, data FROM batches "
            "WHERE partition_id = ? AND last_offset >= ? AND base_offset < ? ORDER BY last_offset LIMIT ?",
            (self.partition_id, start, 2**62 if end is None else end, RUN_BATCHES),
        )
        for row in cursor:
            batch = Batch(*row)
            yield batch
            size += len(batch.data)
            if size >= RUN_BYTES:
                break
        cursor.close()

    def _open(self, batch: Batch) -> Iterator[LogRecord]:
        return iter(checked(batch.data, self.tp, batch.base_offset, batch.last_offset, self._name))

    def _rewritten(self, run: list[Batch], newest: Mapping[bytes, int], now_ms: int) -> Rewritten:
        kept: list[LogRecord] = []
        has_dropped = has_tombstones = False
        for batch in run:
            is_overdue = batch.delete_horizon_ms is not None and batch.delete_horizon_ms <= now_ms
            for record in self._open(batch):
                key, value = record.key, record.value
                if key is not None and (newest.get(key, -1) > record.offset or (is_overdue and value is None)):
                    has_dropped = True
                else:
                    has_tombstones |= key is not None and value is None
                    kept.append(record)
        next_offset, size = run[-1].last_offset + 1, sum(len(batch.data) for batch in run)
        if not has_dropped and len(run) == 1 and not (has_tombstones and run[0].delete_horizon_ms is None):
            return Rewritten(next_offset, size)
        horizon = self._horizon(run, now_ms) if has_tombstones else None
        appended_ms = max(batch.appended_ms for batch in run)
        new = [
            (self.partition_id, base, last, timestamp, appended_ms, horizon, len(data), data)
            for base, last, timestamp, data in encode(kept, codec.Batch(run[-1].data).compression_type)
        ]
        return Rewritten(next_offset, sum(row[6] for row in new), [batch.id for batch in run], size, new)

    def _horizon(self, run: list[Batch], now_ms: int) -> int:
        """Until when merged tombstones stay: as long as the one that stays longest."""
        fresh = now_ms + self.policy.delete_retention_ms
        return max(fresh if batch.delete_horizon_ms is None else batch.delete_horizon_ms for batch in run)


def encode(kept: Iterable[LogRecord], compression: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Put records into batches, at their offsets.

    Args:
        kept: The records in order.
        compression: The codec's number.

    Yields:
        Base offset, last offset, greatest timestamp and bytes of each batch.
    """
    builder, base, last, timestamp = None, 0, 0, -1
    for record in kept:
        if builder is not None and not _append(builder, record, base):
            yield base, last, timestamp, _sealed(builder, base)
            builder = None
        if builder is None:
            builder, base, timestamp = codec.new_builder(compression, RUN_BYTES), record.offset, -1
            _append(builder, record, base)
        last, timestamp = record.offset, max(timestamp, record.timestamp)
    if builder is not None:
        yield base, last, timestamp, _sealed(builder, base)


def _append(builder: codec.Builder, record: LogRecord, base: int) -> bool:
    delta = record.offset - base
    if delta > _LARGEST_DELTA:
        return False
    return builder.append(delta, record.timestamp, record.key, record.value, record.headers) is not None


def _sealed(builder: codec.Builder, base: int) -> bytes:
    data = builder.build()
    codec.set_base_offset(data, base)
    return bytes(data)
