"""Transactional ids as rows: the newest producer of an id fences those before it, and ids that nobody uses expire.

An id is in use while a producer with it is open. Its row then names the process, which is looked up when ids expire,
and its time is renewed every hour, for processes that cannot be looked up (in another container, before a restart of
the machine). No epoch is given twice, whatever expired: who comes back late is always told apart from who came after.
"""

from __future__ import annotations

import sqlite3

from streamflow.errors import ProducerFencedError
from streamflow.log.sqlite import process

LIFETIME_MS = 7 * 24 * 3600 * 1000
"""How long an id is kept after its last use; as long as Kafka's `transactional.id.expiration.ms`."""
RENEW_S = 3600.0
_COUNTER = ""
"""The row that holds the newest epoch of all; it never expires."""


def take_over(sql: sqlite3.Connection, transactional_id: str, now_ms: int) -> int:
    """Fence earlier producers of an id; returns the epoch to commit with."""
    (epoch,) = sql.execute("SELECT coalesce(max(epoch), -1) + 1 FROM transactional_ids").fetchone()
    sql.executemany(
        "INSERT OR REPLACE INTO transactional_ids (id, epoch, process, used_ms) VALUES (?, ?, ?, ?)",
        [(_COUNTER, epoch, "", now_ms), (transactional_id, epoch, process.identity(), now_ms)],
    )
    return int(epoch)


def fence(sql: sqlite3.Connection, transactional_id: str, now_ms: int) -> None:
    """Fence the producers of an id; nobody uses it then. One that was never used, or has expired, needs no fence."""
    (epoch,) = sql.execute("SELECT coalesce(max(epoch), -1) + 1 FROM transactional_ids").fetchone()
    fenced = sql.execute(
        "UPDATE transactional_ids SET epoch = ?, process = '', used_ms = ? WHERE id = ?",
        (epoch, now_ms, transactional_id),
    )
    if fenced.rowcount:
        sql.execute("UPDATE transactional_ids SET epoch = ?, used_ms = ? WHERE id = ?", (epoch, now_ms, _COUNTER))


def check(sql: sqlite3.Connection, transactional_id: str, epoch: int) -> None:
    """Refuse a commit of a producer that was fenced.

    Raises:
        ProducerFencedError: A later producer took the id over, another worker fenced it, or it expired.
    """
    row = sql.execute("SELECT epoch FROM transactional_ids WHERE id = ?", (transactional_id,)).fetchone()
    if row is None:
        raise ProducerFencedError(
            f"transactional id {transactional_id!r} expired: its process was stopped for more than 7 days; nothing was "
            "stored. Start it again"
        )
    if row[0] != epoch:
        raise ProducerFencedError(
            f"transactional id {transactional_id!r} was taken over by a later producer (epoch {row[0]}, ours {epoch}): "
            "another worker has taken this one for dead, or has its slot; nothing was stored"
        )


def renew(sql: sqlite3.Connection, transactional_id: str, epoch: int, now_ms: int) -> None:
    """Say that the id is still in use."""
    sql.execute(
        "UPDATE transactional_ids SET used_ms = ? WHERE id = ? AND epoch = ?", (now_ms, transactional_id, epoch)
    )


def release(sql: sqlite3.Connection, transactional_id: str, epoch: int, now_ms: int) -> None:
    """The producer is closed: its process may live on, and the id expires all the same."""
    sql.execute(
        "UPDATE transactional_ids SET process = '', used_ms = ? WHERE id = ? AND epoch = ?",
        (now_ms, transactional_id, epoch),
    )


def expire(sql: sqlite3.Connection, now_ms: int) -> None:
    """Remove what has not been in use for `LIFETIME_MS`."""
    # A clock that was ahead when an id was used would keep it for ever.
    sql.execute("UPDATE transactional_ids SET used_ms = ? WHERE used_ms > ?", (now_ms, now_ms))
    rows = sql.execute(
        "SELECT id, process FROM transactional_ids WHERE used_ms < ? AND id <> ?", (now_ms - LIFETIME_MS, _COUNTER)
    ).fetchall()
    unused = [(id_,) for id_, user in rows if not process.is_alive(user)]
    sql.executemany("DELETE FROM transactional_ids WHERE id = ?", unused)
