"""Writing: batches with group commit, and atomic commits of outputs and offsets."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio

from streamflow.errors import (
    ClosedError,
    InternalError,
    LogUnavailableError,
    RetriableError,
    StreamFlowError,
    TaskMigratedError,
)
from streamflow.log.api import AtomicCommit, Producer, TransactionalProducer
from streamflow.log.batch import SealedBatch
from streamflow.log.sqlite import tables, transactional_ids
from streamflow.log.sqlite.database import Database
from streamflow.log.sqlite.membership import check_membership
from streamflow.model.record import TopicPartition

BUFFER_BYTES = 32 * 1024 * 1024
TRANSACTION_BYTES = 4 * 1024 * 1024
"""Of what waits, this much goes into one transaction: about 20 ms under the write lock."""
FLUSH_ON_EXIT_S = 5.0
_RETRY_S = 0.05
_RELEASE_S = 1.0


@dataclass(slots=True, eq=False)
class _Entry:
    tp: TopicPartition
    batch: SealedBatch
    stored: asyncio.Future[int]
    deadline: float


class SqliteProducer(Producer):
    """Stores batches; those that come while a transaction is under way share the next one.

    Args:
        database: The open database.
        delivery_timeout_s: How long a locked or full log is tried again.
    """

    def __init__(self, database: Database, delivery_timeout_s: float) -> None:
        self._database = database
        self._delivery_timeout_s = delivery_timeout_s
        self._waiting: deque[_Entry] = deque()
        self._buffered_bytes = 0
        self._unsettled: set[asyncio.Future[int]] = set()
        self._room: deque[tuple[asyncio.Future[None], int]] = deque()
        self._work = asyncio.Event()
        self._failed: dict[TopicPartition, StreamFlowError] = {}
        self._closed = False

    async def enqueue(self, tp: TopicPartition, batch: SealedBatch) -> asyncio.Future[int]:
        if self._closed:
            raise ClosedError("the producer is closed")
        await self._reserve(batch.size_bytes)
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stored.add_done_callback(self._settled)
        self._unsettled.add(stored)
        deadline = self._database.waits.monotonic() + self._delivery_timeout_s
        self._waiting.append(_Entry(tp, batch, stored, deadline))
        self._work.set()
        return stored

    async def flush(self) -> None:
        if pending := list(self._unsettled):
            await asyncio.wait(pending)
            for stored in pending:
                stored.result()

    def reset(self, tp: TopicPartition) -> None:
        self._failed.pop(tp, None)

    async def run(self) -> None:
        """Store what is enqueued, for ever."""
        while True:
            await self._work.wait()
            entries = self._take()
            if not entries:
                self._work.clear()
                continue
            await self._store(entries)

    async def close(self) -> None:
        """Give what is enqueued 5 s, and fail the rest."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            if pending := list(self._unsettled):
                await asyncio.wait(pending, timeout=FLUSH_ON_EXIT_S)
        for stored in list(self._unsettled):
            _fail(stored, LogUnavailableError(f"log {self._database.name}: closed before the batch was stored"))
        for waiter, _ in self._room:
            if not waiter.done():
                waiter.set_exception(ClosedError("the producer is closed"))

    async def _reserve(self, size: int) -> None:
        """Takes a share of the memory bound, in the order of asking."""
        if not self._room and self._fits(size):
            self._buffered_bytes += size
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room.append((waiter, size))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._room.remove((waiter, size))
                self._grant()
            else:  # granted in the same turn
                self._release(size)
            raise

    def _fits(self, size: int) -> bool:
        return not self._buffered_bytes or self._buffered_bytes + size <= BUFFER_BYTES

    def _release(self, size: int) -> None:
        self._buffered_bytes -= size
        self._grant()

    def _grant(self) -> None:
        while self._room and self._fits(self._room[0][1]) and not self._room[0][0].cancelled():
            waiter, size = self._room.popleft()
            self._buffered_bytes += size
            waiter.set_result(None)

    def _settled(self, stored: asyncio.Future[int]) -> None:
        self._unsettled.discard(stored)
        if not stored.cancelled():
            stored.exception()  # looked at, so that a future nobody awaits makes no noise

    def _take(self) -> list[_Entry]:
        entries: list[_Entry] = []
        size = 0
        while self._waiting and (not entries or size + self._waiting[0].batch.size_bytes <= TRANSACTION_BYTES):
            entry = self._waiting.popleft()
            size += entry.batch.size_bytes
            entries.append(entry)
        return entries

    async def _store(self, entries: list[_Entry]) -> None:
        try:
            while entries := self._without_failed(entries):
                try:
                    answers = await self._database.writer.write(
                        lambda sql, entries=entries: self._insert(sql, entries),  # type: ignore[misc]
                        adds_bytes=sum(entry.batch.size_bytes for entry in entries),
                    )
                except RetriableError as error:
                    entries = self._in_time(entries, error)
                    await self._database.waits.sleep(_RETRY_S)
                except Exception as error:
                    known = error if isinstance(error, StreamFlowError) else InternalError(repr(error))
                    known.__cause__ = error if known is not error else error.__cause__
                    self._settle(entries, [known] * len(entries))
                    return
                else:
                    self._settle(entries, answers)
                    self._database.wrote()
                    return
        except asyncio.CancelledError:
            for entry in entries:
                _fail(entry.stored, LogUnavailableError(f"log {self._database.name}: closed before it was stored"))
            raise

    def _without_failed(self, entries: list[_Entry]) -> list[_Entry]:
        """Fails those of partitions that have failed, at once; returns the others."""
        if not self._failed:
            return entries
        refused = [entry for entry in entries if entry.tp in self._failed]
        self._settle(refused, [self._failed[entry.tp] for entry in refused])
        return [entry for entry in entries if entry.tp not in self._failed]

    def _insert(self, sql: sqlite3.Connection, entries: list[_Entry]) -> list[int | StreamFlowError]:
        appender = tables.Appender(sql, self._database.name, self._database.clock.now_ms())
        answers: list[int | StreamFlowError] = []
        failed: dict[TopicPartition, StreamFlowError] = {}
        for entry in entries:
            if entry.tp in failed:
                answers.append(failed[entry.tp])
                continue
            try:
                answers.append(appender.append(entry.tp, entry.batch))
            except StreamFlowError as error:  # this batch only: too large, or a topic that does not exist
                failed[entry.tp] = error
                answers.append(error)
        appender.finish()
        return answers

    def _in_time(self, entries: list[_Entry], error: RetriableError) -> list[_Entry]:
        """Fails those whose time is over; nothing was stored, so that the others can go into the next transaction."""
        now = self._database.waits.monotonic()
        late = [entry for entry in entries if entry.deadline <= now]
        self._settle(late, [error] * len(late))
        return [entry for entry in entries if entry.deadline > now]

    def _settle(self, entries: list[_Entry], answers: Sequence[int | StreamFlowError]) -> None:
        for entry, answer in zip(entries, answers, strict=True):
            self._release(entry.batch.size_bytes)
            if isinstance(answer, StreamFlowError):
                self._failed.setdefault(entry.tp, answer)
                _fail(entry.stored, answer)
            elif not entry.stored.done():
                entry.stored.set_result(answer)


def _fail(stored: asyncio.Future[int], error: StreamFlowError) -> None:
    if not stored.done():
        stored.set_exception(error)


class SqliteTransactionalProducer(TransactionalProducer):
    """Stores outputs and offsets in one transaction.

    Args:
        database: The open database.
        transactional_id: A later producer with the same id fences this one.
    """

    def __init__(self, database: Database, transactional_id: str) -> None:
        self._database = database
        self._id = transactional_id
        self._epoch = -1

    async def begin(self) -> None:
        """Take the id over."""
        self._epoch = await self._database.writer.write(
            lambda sql: transactional_ids.take_over(sql, self._id, self._database.clock.now_ms())
        )

    async def renew(self) -> None:
        """Keep the id from expiring, for ever."""
        while True:
            await self._database.waits.sleep(transactional_ids.RENEW_S)
            with suppress(StreamFlowError):  # a commit says what is wrong; the next hour will do
                await self._touch(transactional_ids.renew)

    async def end(self) -> None:
        """Let the id expire, if the log answers within a second; else it does when the process has ended."""
        with anyio.move_on_after(_RELEASE_S), suppress(StreamFlowError):
            await self._touch(transactional_ids.release)

    async def _touch(self, touch: Callable[[sqlite3.Connection, str, int, int], None]) -> None:
        await self._database.writer.write(lambda sql: touch(sql, self._id, self._epoch, self._database.clock.now_ms()))

    async def commit(self, commit: AtomicCommit) -> Mapping[TopicPartition, int]:
        def work(sql: sqlite3.Connection) -> dict[TopicPartition, int]:
            transactional_ids.check(sql, self._id, self._epoch)
            if commit.membership is not None:
                check_membership(sql, commit.membership, commit.offsets)
            elif commit.offsets:
                raise TaskMigratedError("a commit of offsets needs the membership under which they are owned")
            appender = tables.Appender(sql, self._database.name, self._database.clock.now_ms())
            ends: dict[TopicPartition, int] = {}
            for tp, batch in commit.outputs:
                ends[tp] = appender.append(tp, batch) + batch.num_records
            appender.finish()
            if commit.membership is not None:
                tables.store_offsets(sql, commit.membership.group_id, commit.offsets)
            return ends

        ends = await self._database.writer.write(work, adds_bytes=sum(batch.size_bytes for _, batch in commit.outputs))
        self._database.wrote()
        return ends
