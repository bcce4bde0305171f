"""The tables, and which versions of them this code reads.

A row of `batches` is a Kafka v2 record batch with its base offset in its header; `last_offset` finds the batch a
position lies in. Offsets of a partition never overlap, so that order by last offset is the log's order. Small columns
stand before the blob: SQLite reads them without touching the blob's pages.
"""

from __future__ import annotations

import sqlite3

from streamflow.errors import ConfigurationError

APPLICATION_ID = 0x53464C47  # "SFLG"
VERSION = 3
"""2: transactional ids have a process and a time. 3: members say and are told words, and may have an instance id."""

_STATEMENTS = (
    """CREATE TABLE topics (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        uuid TEXT NOT NULL,
        partitions INTEGER NOT NULL,
        max_batch_bytes INTEGER NOT NULL,
        config TEXT NOT NULL
    )""",
    """CREATE TABLE partitions (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        topic_id INTEGER NOT NULL REFERENCES topics (id),
        partition INTEGER NOT NULL,
        start_offset INTEGER NOT NULL DEFAULT 0,
        end_offset INTEGER NOT NULL DEFAULT 0,
        clean_offset INTEGER NOT NULL DEFAULT 0,
        clean_bytes INTEGER NOT NULL DEFAULT 0,
        size_bytes INTEGER NOT NULL DEFAULT 0,
        UNIQUE (topic_id, partition)
    )""",
    """CREATE TABLE batches (
        id INTEGER PRIMARY KEY,
        partition_id INTEGER NOT NULL,
        base_offset INTEGER NOT NULL,
        last_offset INTEGER NOT NULL,
        max_timestamp_ms INTEGER NOT NULL,
        appended_ms INTEGER NOT NULL,
        delete_horizon_ms INTEGER,
        size_bytes INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
    "CREATE UNIQUE INDEX batches_by_offset ON batches (partition_id, last_offset)",
    """CREATE INDEX batches_with_tombstones ON batches (partition_id, delete_horizon_ms)
        WHERE delete_horizon_ms IS NOT NULL""",
    """CREATE TABLE groups (
        id TEXT PRIMARY KEY,
        generation INTEGER NOT NULL DEFAULT 0,
        version INTEGER NOT NULL DEFAULT 0,
        assigned_for TEXT NOT NULL DEFAULT '',
        told_generation INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID""",
    """CREATE TABLE members (
        group_id TEXT NOT NULL,
        member_id TEXT NOT NULL,
        topics TEXT NOT NULL,
        process TEXT NOT NULL,
        session_timeout_ms INTEGER NOT NULL,
        beat INTEGER NOT NULL DEFAULT 0,
        instance_id TEXT,
        says BLOB NOT NULL DEFAULT x'',
        told BLOB NOT NULL DEFAULT x'',
        PRIMARY KEY (group_id, member_id)
    ) WITHOUT ROWID""",
    """CREATE TABLE owners (
        group_id TEXT NOT NULL,
        topic TEXT NOT NULL,
        partition INTEGER NOT NULL,
        member_id TEXT,
        generation INTEGER NOT NULL DEFAULT 0,
        target TEXT,
        PRIMARY KEY (group_id, topic, partition)
    ) WITHOUT ROWID""",
    """CREATE TABLE offsets (
        group_id TEXT NOT NULL,
        topic TEXT NOT NULL,
        partition INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        metadata TEXT NOT NULL,
        PRIMARY KEY (group_id, topic, partition)
    ) WITHOUT ROWID""",
    """CREATE TABLE transactional_ids (
        id TEXT PRIMARY KEY,
        epoch INTEGER NOT NULL,
        process TEXT NOT NULL DEFAULT '',
        used_ms INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID""",
)
_SINCE = {
    1: (
        "ALTER TABLE transactional_ids ADD COLUMN process TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE transactional_ids ADD COLUMN used_ms INTEGER NOT NULL DEFAULT 0",
    ),
    2: (
        "ALTER TABLE groups ADD COLUMN told_generation INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE members ADD COLUMN instance_id TEXT",
        "ALTER TABLE members ADD COLUMN says BLOB NOT NULL DEFAULT x''",
        "ALTER TABLE members ADD COLUMN told BLOB NOT NULL DEFAULT x''",
    ),
}
"""What changed after each version."""


def is_current(sql: sqlite3.Connection, path: str) -> bool:
    """Whether the tables are there as this code wants them; a file of another kind or a newer version is refused.

    Args:
        sql: A connection.
        path: The file as messages name it.

    Raises:
        ConfigurationError: The file is no log, or of a newer StreamFlow.
    """
    (application,) = sql.execute("PRAGMA application_id").fetchone()
    (version,) = sql.execute("PRAGMA user_version").fetchone()
    if application == APPLICATION_ID:
        if version > VERSION:
            raise ConfigurationError(
                f"log {path}: written by a newer StreamFlow (format {version}; this one reads up to {VERSION}). "
                "Upgrade StreamFlow, or choose another data_dir"
            )
        return bool(version == VERSION)
    if application or version or sql.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        raise ConfigurationError(
            f"log {path}: this SQLite file belongs to something else (application id {application:#x}); "
            "choose another data_dir or broker"
        )
    return False


def create(sql: sqlite3.Connection, now_ms: int) -> None:
    """Make the tables, or bring those of an older version up to date, inside the caller's transaction.

    Args:
        sql: A connection to a file that is not current.
        now_ms: The time.
    """
    (version,) = sql.execute("PRAGMA user_version").fetchone()
    changes = [each for since, them in _SINCE.items() if since >= version for each in them] if version else _STATEMENTS
    for statement in changes:
        sql.execute(statement)
    if version < 2:
        sql.execute("UPDATE transactional_ids SET used_ms = ?", (now_ms,))
    sql.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    sql.execute(f"PRAGMA user_version = {VERSION}")
