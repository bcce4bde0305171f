"""Topics, offsets and groups of a SQLite log, for people and for the start of a worker."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping, Sequence

from streamflow.errors import ConfigurationError, GroupInUseError
from streamflow.log.api import Admin, NewTopic, OffsetMark, TopicDescription
from streamflow.log.batch import DEFAULT_MAX_BATCH_BYTES
from streamflow.log.sqlite import membership, process, tables, transactional_ids
from streamflow.log.sqlite.database import Database
from streamflow.model.record import TopicPartition

_NUMBERS = {
    "retention.ms": -1,
    "retention.bytes": -1,
    "min.compaction.lag.ms": 0,
    "delete.retention.ms": 0,
    "max.message.bytes": 0,
}
"""Configuration that is honoured, with the least value of each."""
_POLICIES = frozenset({"delete", "compact"})
_DELETED = "/deleted/"
_LOOK_S = 0.3
_PURGED_AT_ONCE = 64
"""Batches removed in one transaction, so that writers never wait long."""


class SqliteAdmin(Admin):
    """Administration of a SQLite log.

    Args:
        database: The open database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def describe(self, topics: Sequence[str]) -> Mapping[str, TopicDescription]:
        def work(sql: sqlite3.Connection) -> dict[str, TopicDescription]:
            found: dict[str, TopicDescription] = {}
            for topic in topics:
                row = sql.execute("SELECT partitions, config, uuid FROM topics WHERE name = ?", (topic,)).fetchone()
                if row is not None:
                    found[topic] = TopicDescription(topic, row[0], json.loads(row[1]), row[2])
            return found

        return await self._database.reader.read(work)

    async def topics(self) -> Sequence[str]:
        def work(sql: sqlite3.Connection) -> list[str]:
            return [name for (name,) in sql.execute("SELECT name FROM topics WHERE name NOT GLOB '/*' ORDER BY name")]

        return await self._database.reader.read(work)

    async def create(self, topics: Sequence[NewTopic]) -> None:
        for topic in topics:
            check_new_topic(topic)

        def work(sql: sqlite3.Connection) -> None:
            for topic in topics:
                _create(sql, topic, self._database.new_id())

        await self._database.writer.write(work)
        self._database.wrote()
        self._database.wrote(members=True)

    async def delete(self, topics: Sequence[str]) -> None:
        def work(sql: sqlite3.Connection) -> None:
            for topic in topics:
                _hide(sql, topic)

        await self._database.writer.write(work)
        self._database.wrote()
        self._database.wrote(members=True)
        while await self._database.writer.write(remove_deleted):
            pass

    async def start_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return {tp: row.start_offset for tp, row in (await self._rows(partitions)).items()}

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return {tp: row.end_offset for tp, row in (await self._rows(partitions)).items()}

    async def high_watermarks(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self.end_offsets(partitions)  # nothing uncommitted is ever stored

    async def delete_records(self, before: Mapping[TopicPartition, int]) -> None:
        for tp, offset in before.items():
            while await self._database.writer.write(lambda sql, tp=tp, offset=offset: self._purge(sql, tp, offset)):  # type: ignore[misc]
                pass

    async def groups(self) -> Sequence[str]:
        def work(sql: sqlite3.Connection) -> list[str]:
            return [name for (name,) in sql.execute("SELECT id FROM groups ORDER BY id")]

        return await self._database.reader.read(work)

    async def group_offsets(self, group_id: str, *, stable: bool = False) -> Mapping[TopicPartition, OffsetMark]:
        return await self._database.reader.read(lambda sql: tables.read_offsets(sql, group_id))

    async def group_members(self, group_id: str) -> Sequence[str]:
        rows = await self._members(group_id)
        return [row.told() for row in await self._live(group_id, rows)]

    async def delete_group(self, group_id: str) -> None:
        rows = await self._members(group_id)
        if live := await self._live(group_id, rows):
            raise _in_use(group_id, live)
        dead = {row.member_id for row in rows}

        def work(sql: sqlite3.Connection) -> None:
            if came := [row for row in membership.members(sql, group_id) if row.member_id not in dead]:
                raise _in_use(group_id, came)
            membership.delete_group(sql, group_id)

        await self._database.writer.write(work)
        self._database.wrote(members=True)

    async def fence_producer(self, transactional_id: str) -> bool:
        await self._database.writer.write(
            lambda sql: transactional_ids.fence(sql, transactional_id, self._database.clock.now_ms())
        )
        return False  # a commit is one transaction of SQLite: there is none between two writes

    async def _members(self, group_id: str) -> list[membership.MemberRow]:
        return await self._database.reader.read(lambda sql: membership.members(sql, group_id))

    async def _live(self, group_id: str, rows: Sequence[membership.MemberRow]) -> list[membership.MemberRow]:
        """The members that are not certainly gone, and whose hearts beat where their processes cannot be looked at."""
        rows = [row for row in rows if not process.is_gone(row.process)]
        doubtful = [row for row in rows if not process.is_alive(row.process)]
        silent = await self._silent(group_id, doubtful)
        return [row for row in rows if row.member_id not in silent]

    async def _silent(self, group_id: str, rows: Sequence[membership.MemberRow]) -> set[str]:
        """Those whose heartbeat counts stand still for a session, in which the log could be written throughout."""
        watched = {row.member_id: row for row in rows}
        silence_s = 0.0
        clock = self._database.waits
        last_s = clock.monotonic()
        while any(silence_s * 1000 <= row.session_timeout_ms for row in watched.values()):
            await clock.sleep(_LOOK_S)
            # Written, not read: while the log is locked nobody's heart can beat, and that time does not count.
            now = await self._database.writer.write(lambda sql: membership.members(sql, group_id))
            now_s = clock.monotonic()
            silence_s, last_s = silence_s + min(now_s - last_s, 2 * _LOOK_S), now_s
            beats = {row.member_id: row.beat for row in now}
            watched = {id_: row for id_, row in watched.items() if beats.get(id_, row.beat) == row.beat}
        return set(watched)

    async def _rows(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, tables.PartitionRow]:
        def work(sql: sqlite3.Connection) -> dict[TopicPartition, tables.PartitionRow]:
            return {tp: self._existing(sql, tp) for tp in partitions}

        return await self._database.reader.read(work)

    def _existing(self, sql: sqlite3.Connection, tp: TopicPartition) -> tables.PartitionRow:
        row = tables.partition(sql, tp)
        if row is None:
            raise tables.unknown(sql, tp, self._database.name)
        return row

    def _purge(self, sql: sqlite3.Connection, tp: TopicPartition, before: int) -> bool:
        row = self._existing(sql, tp)
        before = row.end_offset if before < 0 else min(before, row.end_offset)  # -1 is Kafka's word for "all"
        return purge_below(sql, row.id, before)


def _in_use(group_id: str, members: Sequence[membership.MemberRow]) -> GroupInUseError:
    return GroupInUseError(
        f"group {group_id!r} has live members: {', '.join(row.told() for row in members)}; nothing was deleted. Stop "
        "them first"
    )


def purge_below(sql: sqlite3.Connection, partition_id: int, before: int, limit: int = _PURGED_AT_ONCE) -> bool:
    """Move a partition's start and remove some of the batches that lie wholly below it.

    Args:
        sql: The connection, inside a write transaction.
        partition_id: Which partition.
        before: The new first offset; a lower one than now changes nothing.
        limit: How many batches to remove at most.

    Returns:
        Whether batches are left to be removed.
    """
    rows = sql.execute(
        "SELECT id, size_bytes FROM batches WHERE partition_id = ? AND last_offset < ? ORDER BY last_offset LIMIT ?",
        (partition_id, before, limit),
    ).fetchall()
    sql.executemany("DELETE FROM batches WHERE id = ?", [(row[0],) for row in rows])
    removed = sum(row[1] for row in rows)
    sql.execute(
        "UPDATE partitions SET start_offset = max(start_offset, ?), clean_offset = max(clean_offset, ?), "
        "size_bytes = size_bytes - ?, clean_bytes = max(0, clean_bytes - ?) WHERE id = ?",
        (before, before, removed, removed, partition_id),
    )
    return len(rows) == limit


def check_new_topic(topic: NewTopic) -> None:
    """Refuse what cannot be created.

    Raises:
        ConfigurationError: The name, the partition count or a configuration value is not usable.
    """
    tables.check_topic_name(topic.name)
    if topic.partitions < 1:
        raise ConfigurationError(f"topic {topic.name!r}: {topic.partitions} partitions; a topic has at least one")
    for key, least in _NUMBERS.items():
        text = topic.config.get(key)
        if text is None:
            continue
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise ConfigurationError(f"topic {topic.name!r}: {key} is {text!r}; use a whole number of at least {least}")
    ratio = topic.config.get("min.cleanable.dirty.ratio", "0.5")
    if not re.fullmatch(r"0|1|[01]?\.\d+", ratio) or float(ratio) > 1:
        raise ConfigurationError(f"topic {topic.name!r}: min.cleanable.dirty.ratio is {ratio!r}; use 0 to 1")
    policies = set(topic.config.get("cleanup.policy", "delete").replace(" ", "").split(","))
    if not policies <= _POLICIES:
        raise ConfigurationError(
            f"topic {topic.name!r}: cleanup.policy is {topic.config['cleanup.policy']!r}; use delete, compact or both"
        )


def _create(sql: sqlite3.Connection, topic: NewTopic, uuid: str) -> None:
    limit = int(topic.config.get("max.message.bytes", DEFAULT_MAX_BATCH_BYTES))
    config = json.dumps(dict(topic.config), sort_keys=True)
    row = sql.execute(
        "INSERT OR IGNORE INTO topics (name, uuid, partitions, max_batch_bytes, config) "
        "VALUES (?, ?, ?, ?, ?) RETURNING id",
        (topic.name, uuid, topic.partitions, limit, config),
    ).fetchone()
    if row is not None:
        sql.executemany(
            "INSERT INTO partitions (topic_id, partition) VALUES (?, ?)",
            [(row[0], number) for number in range(topic.partitions)],
        )


def _hide(sql: sqlite3.Connection, topic: str) -> None:
    """Take a topic away at once; the rows that hold its batches live on, under no legal name, until they are empty."""
    found = sql.execute("SELECT id FROM topics WHERE name = ?", (topic,)).fetchone()
    if found is None:
        return
    sql.execute("UPDATE topics SET name = ? WHERE id = ?", (f"{_DELETED}{found[0]}/{topic}", found[0]))
    sql.execute("DELETE FROM offsets WHERE topic = ?", (topic,))
    # Made anew with as many partitions before anybody looks, it would be what the last target was set for.
    sql.execute(
        "UPDATE groups SET assigned_for = '' WHERE id IN (SELECT group_id FROM owners WHERE topic = ?)", (topic,)
    )
    sql.execute("DELETE FROM owners WHERE topic = ?", (topic,))
    sql.execute("UPDATE groups SET version = version + 1")


def remove_deleted(sql: sqlite3.Connection) -> bool:
    """Remove some batches of deleted topics.

    Returns:
        Whether more are left; maintenance goes on where a killed process stopped.
    """
    rows = sql.execute(
        "SELECT p.id, p.topic_id FROM topics t JOIN partitions p ON p.topic_id = t.id WHERE t.name GLOB ?",
        (f"{_DELETED}*",),
    ).fetchall()
    for partition_id, topic_id in rows:
        batches = sql.execute(
            "SELECT id FROM batches WHERE partition_id = ? LIMIT ?", (partition_id, _PURGED_AT_ONCE)
        ).fetchall()
        sql.executemany("DELETE FROM batches WHERE id = ?", batches)
        if len(batches) == _PURGED_AT_ONCE:
            return True
        sql.execute("DELETE FROM partitions WHERE id = ?", (partition_id,))
        sql.execute(
            "DELETE FROM topics WHERE id = ? AND NOT EXISTS (SELECT 1 FROM partitions WHERE topic_id = ?)",
            (topic_id, topic_id),
        )
    return False
