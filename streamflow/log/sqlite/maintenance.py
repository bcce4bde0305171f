"""What keeps a log small: retention, compaction, what is left of deleted topics, the write-ahead log.

One process does it, the one that holds the lease (a lock on a file beside the log, which the operating system takes
back when the process ends). It works in small transactions on a connection of its own and rests as long as it works.
Space that is freed is used again by later batches; what is more than they will soon need is given back.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import anyio

from streamflow.errors import RetriableError, StreamFlowError
from streamflow.log.sqlite import transactional_ids
from streamflow.log.sqlite.admin import purge_below, remove_deleted
from streamflow.log.sqlite.compaction import MOST_KEYS, Compactor, MovedError, Policy, Rewritten
from streamflow.log.sqlite.database import Database
from streamflow.log.sqlite.execution import Runner, Work
from streamflow.model.record import TopicPartition

INTERVAL_S = 30.0
BATCHES_AT_ONCE = 64
GIVE_BACK_PAGES = 256
"""Of the file, given back in one transaction: about 1 MiB."""
KEPT_FREE_PAGES = 4096
"""Free space that stays in the file for the next batches, or a quarter of the file where that is more: about 16 MiB."""
_PAGE_BYTES = 4096
_INCREMENTAL = 2
LOOK_SHARE = 20
"""A partition rests this many times as long as the look at it (or its compaction) took."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A partition to look after."""

    tp: TopicPartition
    id: int
    config: Mapping[str, str]


class Maintenance:
    """Looks after a database.

    Args:
        database: The database; open when there is something to do.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lane: Runner
        self._look_again: dict[int, float] = {}

    async def run(self) -> None:
        """Make a round every 30 s while this is the process to do it, for ever."""
        while True:
            await self._database.waits.sleep(INTERVAL_S)
            try:
                if self._database.take_lease():
                    await self.round()
            except RetriableError as error:
                logger.info("maintenance of the log waits: %s", error)
            except StreamFlowError:
                logger.exception("maintenance of the log %s failed; it is tried again", self._database.name)

    async def round(self, *, at_once: bool = False) -> None:
        """Do everything that is due now, on a connection of its own.

        Args:
            at_once: Also look at partitions that rest.
        """
        if at_once:
            self._look_again.clear()
        self._lane = await self._database.lane("maintenance")
        try:
            await self._round()
        finally:
            await self._lane.aclose()

    async def _round(self) -> None:
        while await self._step(remove_deleted):
            pass
        now_ms = self._database.clock.now_ms()
        await self._lane.write(lambda sql: transactional_ids.expire(sql, now_ms))
        for place in await self._lane.read(_places):
            policies = place.config.get("cleanup.policy", "delete")
            if "delete" in policies:
                while await self._step(lambda sql, place=place: self._retain(sql, place)):  # type: ignore[misc]
                    pass
            if "compact" in policies:
                try:
                    await self._compact(place)
                except MovedError as error:
                    logger.debug("%s", error)
        while await self._step(_give_back, adds_bytes=2 * GIVE_BACK_PAGES * _PAGE_BYTES):
            pass
        with suppress(RetriableError):  # somebody writes: then that one does it before long
            await self._lane.checkpoint()

    async def _step(self, work: Work[bool], adds_bytes: int = 0) -> bool:
        started = time.monotonic()
        more = await self._lane.write(work, adds_bytes=adds_bytes)
        await self._rest(started)
        return more

    async def _rest(self, started: float) -> None:
        # In memory there is nobody to leave the lock to, and time may stand still.
        await anyio.sleep(0 if self._database.members is not None else time.monotonic() - started)

    def _retain(self, sql: sqlite3.Connection, place: Place) -> bool:
        """Remove the oldest batches that are too old or too many; returns whether there may be more."""
        oldest_kept = None
        if (retention_ms := int(place.config.get("retention.ms", "-1"))) >= 0:
            oldest_kept = self._database.clock.now_ms() - retention_ms
        (size,) = sql.execute("SELECT size_bytes FROM partitions WHERE id = ?", (place.id,)).fetchone() or (0,)
        retention_bytes = int(place.config.get("retention.bytes", "-1"))
        excess = size - retention_bytes if retention_bytes >= 0 else 0
        start = looked_at = 0
        for last, timestamp, batch_bytes in sql.execute(
            "SELECT last_offset, max_timestamp_ms, size_bytes FROM batches WHERE partition_id = ? "
            "ORDER BY last_offset LIMIT ?",
            (place.id, BATCHES_AT_ONCE),
        ):
            too_old = oldest_kept is not None and timestamp < oldest_kept
            if not too_old and excess < batch_bytes:
                break
            start, looked_at, excess = last + 1, looked_at + 1, excess - batch_bytes
        if looked_at:
            purge_below(sql, place.id, start, BATCHES_AT_ONCE)
        return looked_at == BATCHES_AT_ONCE

    async def _compact(self, place: Place) -> None:
        policy = Policy.of(place.config)
        compactor = Compactor(place.tp, place.id, policy, self._database.name)
        now_ms = self._database.clock.now_ms()
        started = self._database.waits.monotonic()
        if started >= self._look_again.get(place.id, 0.0):
            if await self._lane.read(lambda sql: compactor.is_worth_it(sql, now_ms)):
                await self._clean(compactor, now_ms)
            # To look costs a scan of what is dirty: where that takes long, do it seldom.
            ended = self._database.waits.monotonic()
            self._look_again[place.id] = ended + LOOK_SHARE * (ended - started)
        while (late := await self._lane.read(lambda sql: compactor.overdue(sql, now_ms))) is not None:
            await self._replace(compactor, late)

    async def _clean(self, compactor: Compactor, now_ms: int) -> None:
        newest: dict[bytes, int] = {}
        end: int | None = await self._lane.read(compactor.clean_offset)
        first = position = end or 0
        while end is not None and len(newest) < MOST_KEYS:
            started, position = time.monotonic(), end
            end = await self._lane.read(lambda sql, at=position: compactor.newest(sql, at, now_ms, newest))  # type: ignore[misc]
            await self._rest(started)
        end = position if end is None else end
        if end == first:
            return
        position, clean_bytes = 0, 0
        while position < end:
            started = time.monotonic()
            rewritten = await self._lane.read(
                lambda sql, at=position: compactor.rewrite(sql, at, end, newest, now_ms)  # type: ignore[misc]
            )
            if rewritten is None:
                break
            await self._replace(compactor, rewritten)
            position, clean_bytes = rewritten.next_offset, clean_bytes + rewritten.clean_bytes
            await self._rest(started)
        await self._lane.write(lambda sql: compactor.finish(sql, end, clean_bytes))

    async def _replace(self, compactor: Compactor, rewritten: Rewritten) -> None:
        if rewritten.old:
            await self._lane.write(lambda sql: compactor.replace(sql, rewritten), adds_bytes=rewritten.clean_bytes)


def _give_back(sql: sqlite3.Connection) -> bool:
    """Move the last pages to free places and cut the file; returns whether there is more to give back.

    A file made by format 1 has no map of its pages, and stays as large as it is until somebody runs VACUUM.
    """
    free, pages = (sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count"))
    excess = int(free) - max(KEPT_FREE_PAGES, int(pages) // 4)
    if excess <= 0 or sql.execute("PRAGMA auto_vacuum").fetchone() != (_INCREMENTAL,):
        return False
    for _ in range(min(excess, GIVE_BACK_PAGES)):
        sql.execute("PRAGMA incremental_vacuum(1)")  # Python takes one step of it, whatever number stands there
    return excess > GIVE_BACK_PAGES


def _places(sql: sqlite3.Connection) -> list[Place]:
    rows = sql.execute(
        "SELECT t.name, p.partition, p.id, t.config FROM topics t JOIN partitions p ON p.topic_id = t.id "
        "WHERE t.config <> '{}' ORDER BY p.id"
    )
    return [Place(TopicPartition(topic, number), id_, json.loads(config)) for topic, number, id_, config in rows]
