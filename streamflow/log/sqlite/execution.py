"""Where statements run: inline on the loop (memory), or in one thread per connection (files).

A `Session` is one SQLite connection with its transactions; it is used by one thread at a time. A `Runner` is what the
event loop talks to.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar, cast

import anyio
import anyio.lowlevel

from streamflow.errors import ClosedError, LogUnavailableError, StreamFlowError
from streamflow.log.sqlite.faults import held_by, locked_too_long, translated
from streamflow.log.tasks import cancel_again

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

BUSY_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
CHECKPOINT_BYTES = 8 * 1024 * 1024
"""The write-ahead log is copied into the database after so much; about 20 ms under the write lock."""
_ROWS_BYTES = 16 * 1024
"""What a transaction puts into the write-ahead log for its rows and index entries: a few pages."""
TELL_WAITING_S = 2.0
"""Whoever has waited for the lock so long says so, before it gives up after `BUSY_TIMEOUT_S`."""
_TELL_FROM_S = 0.25
"""A write that waited less for the lock before it was given up waited for nobody in particular."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.005

logger = logging.getLogger(__name__)


class Order:
    """A write that waits, or has begun: either its transaction begins, or it is given up, never both.

    Attributes:
        waits_since: Since when it has waited for the write lock, as `time.monotonic` says; None before its turn.
    """

    __slots__ = ("_begun", "_given_up", "_lock", "waits_since")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = self._given_up = False
        self.waits_since: float | None = None

    @property
    def given_up(self) -> bool:
        """Whether nobody wants it any more."""
        return self._given_up

    def begin(self) -> bool:
        """The write lock is held; returns False when it was given up before that."""
        with self._lock:
            self._begun = not self._given_up
            return self._begun

    def give_up(self) -> bool:
        """Have it not done; returns False when it has begun: then its outcome is near."""
        with self._lock:
            self._given_up = not self._begun
            return self._given_up


class Session:
    """One connection and its transactions; SQLite's errors never leave it.

    Args:
        sql: The connection, in autocommit mode.
        path: The log as messages name it.
        busy_timeout_s: How long a transaction waits for the write lock.
        lock: Held during a transaction where threads share the connection (memory).
        check: Called before each commit; what it raises rolls the transaction back.
    """

    __slots__ = ("_busy_timeout_s", "_check", "_lock", "_sql", "_uncopied_bytes", "path", "stopping")

    def __init__(
        self,
        sql: sqlite3.Connection,
        path: str,
        *,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        lock: threading.RLock | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._sql = sql
        self._check = check
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._lock = lock or threading.RLock()
        self._uncopied_bytes = 0
        self.stopping = False

    @classmethod
    def opened_by(
        cls,
        connect: Callable[[], sqlite3.Connection],
        path: str,
        *,
        busy_timeout_s: float,
        lock: threading.RLock | None = None,
        check: Callable[[], None] | None = None,
    ) -> Session:
        """Open the connection and wrap it; its errors are translated like all others."""
        with translated(path):
            return cls(connect(), path, busy_timeout_s=busy_timeout_s, lock=lock, check=check)

    def write(self, work: Work[T], adds_bytes: int = 0, order: Order | None = None) -> T:
        """Run `work` in one `BEGIN IMMEDIATE ... COMMIT`; it is stored whole, or (an exception) not at all.

        Args:
            work: What to do.
            adds_bytes: About how much it stores beside a few rows.
            order: Lets it be given up until it holds the write lock; it then raises `LogUnavailableError`.
        """
        with self._lock, translated(self.path):
            self._patiently(_begin_immediate, order)
            try:
                if order is not None and not order.begin():
                    raise LogUnavailableError(f"log {self.path}: a write was given up before it began")
                result = work(self._sql)
                if self._check is not None:
                    self._check()
                self._sql.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise
            self._uncopied_bytes += adds_bytes + _ROWS_BYTES
            return result

    def read(self, work: Work[T]) -> T:
        """Run `work` on one snapshot, which is closed before this returns; it may run more than once."""
        with self._lock, translated(self.path):
            return self._patiently(lambda sql: self._on_snapshot(work))

    def direct(self, work: Work[T]) -> T:
        """Run `work` outside any transaction (pragmas, checkpoints); it may run more than once."""
        with self._lock, translated(self.path):
            return self._patiently(work)

    def is_checkpoint_due(self) -> bool:
        """Whether this session has written so much that the write-ahead log should be copied into the database."""
        return self._uncopied_bytes >= CHECKPOINT_BYTES

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database, so that it can start anew; nothing is lost where that fails.

        SQLite 3.7.0 to 3.51.2 (most that Python comes with today) may lose committed data when a checkpoint in one
        connection races with a commit in another that starts the log anew (sqlite.org/wal.html, "The WAL-Reset Bug").
        So no connection of ours checkpoints by itself (`wal_autocheckpoint` is 0): it is done here, by a second
        connection while this one holds the write lock, so that nobody can commit meanwhile.
        """
        with self._lock, translated(self.path):
            _begin_immediate(self._sql)
            try:
                second = sqlite3.connect(self.path, timeout=0, isolation_level=None)
                try:
                    second.execute("PRAGMA checkpoint_fullfsync = ON")  # of use on macOS only
                    _, frames, copied = second.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                finally:
                    second.close()
            finally:
                self._roll_back()
        # What a reader still needs cannot be copied yet: try again before long.
        self._uncopied_bytes = 0 if frames == copied else CHECKPOINT_BYTES - CHECKPOINT_BYTES // 8

    def close(self) -> None:
        """Close the connection."""
        with self._lock, translated(self.path):
            self._sql.close()

    def _on_snapshot(self, work: Work[T]) -> T:
        self._sql.execute("BEGIN")
        try:
            return work(self._sql)
        finally:
            self._roll_back()

    def _patiently(self, work: Work[T], order: Order | None = None) -> T:
        # SQLite's own busy handler sleeps up to 100 ms a time and cannot be told to stop; writers here hold the lock
        # for a fraction of a millisecond as a rule. A reader meets a lock only while a crashed writer's log is
        # recovered.
        started = time.monotonic()
        if order is not None:
            order.waits_since = started
        pause, told = _FIRST_PAUSE_S, False
        while True:
            try:
                return work(self._sql)
            except sqlite3.OperationalError as exc:
                if (exc.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY:
                    raise
                waited = time.monotonic() - started
                if waited >= self._busy_timeout_s or self.stopping or (order is not None and order.given_up):
                    raise locked_too_long(self.path, waited) from exc
                if waited >= TELL_WAITING_S and not told:
                    told = True
                    logger.warning("log %s: waiting for another process to unlock it%s", self.path, held_by(self.path))
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(_LONGEST_PAUSE_S, pause * 1.3)

    def _roll_back(self) -> None:
        if self._sql.in_transaction:
            self._sql.execute("ROLLBACK")


def _begin_immediate(sql: sqlite3.Connection) -> None:
    sql.execute("BEGIN IMMEDIATE")


class Runner(ABC):
    """Runs work on one session, in order."""

    @abstractmethod
    async def read(self, work: Work[T]) -> T:
        """Run `work` on one snapshot.

        Cancellation: at once; the answer is dropped.
        """

    @abstractmethod
    async def write(self, work: Work[T], *, adds_bytes: int = 0) -> T:
        """Run `work` as one write transaction that stores about `adds_bytes` beside a few rows.

        Cancellation: while it waits for its turn or for the write lock, it is given up and nothing is stored; once it
        has begun, its outcome is waited for, and the cancellation is seen by what is awaited next.
        """

    @abstractmethod
    async def checkpoint(self) -> None:
        """Copy the write-ahead log into the database now; raises `RetriableError` when the lock is taken."""

    @abstractmethod
    async def aclose(self) -> None:
        """Finish what is under way and end."""


class InlineRunner(Runner):
    """Runs on the caller's thread: no other order than the event loop's own, so a simulation can repeat it.

    Args:
        session: The shared in-memory session; whoever opened it closes it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    async def read(self, work: Work[T]) -> T:
        await anyio.lowlevel.checkpoint()
        return self._session.read(work)

    async def write(self, work: Work[T], *, adds_bytes: int = 0) -> T:
        await anyio.lowlevel.checkpoint()
        return self._session.write(work)

    async def checkpoint(self) -> None:
        return  # there is none in memory

    async def aclose(self) -> None:
        return


class ThreadRunner(Runner):
    """Runs in a thread of its own, which opens, uses and closes the connection.

    Args:
        open_session: Opens the session; called in the thread.
        name: The thread's name.
    """

    def __init__(self, open_session: Callable[[], Session], name: str) -> None:
        self._open_session = open_session
        self._queue: queue.SimpleQueue[tuple[Callable[[Session], object], asyncio.Future[object]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._session: Session | None = None
        self._closed = False

    async def start(self) -> ThreadRunner:
        """Start the thread and open the session.

        Raises:
            StreamFlowError: It cannot be opened.
        """
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        with anyio.CancelScope(shield=True):
            try:
                await self._opened
            except BaseException:
                await self._ended
                raise
        return self

    async def read(self, work: Work[T]) -> T:
        return cast("T", await self._submit(lambda session: session.read(work)))

    async def write(self, work: Work[T], *, adds_bytes: int = 0) -> T:
        order = Order()
        done = self._submit(lambda session: session.write(work, adds_bytes, order))
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            if order.give_up():
                self._tell_why(order)
                raise
            with anyio.CancelScope(shield=True):
                await asyncio.wait([done])
            cancel_again()
        return cast("T", done.result())

    async def checkpoint(self) -> None:
        await self._submit(lambda session: session.checkpoint())

    async def aclose(self) -> None:
        """Finish what is queued and end the thread, within 5 s: one that waits for a lock gives up."""
        if self._closed:
            return
        self._closed = True
        if self._session is not None:
            self._session.stopping = True
        self._queue.put(None)
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._ended], timeout=CLOSE_TIMEOUT_S)
        if self._ended.done():
            self._thread.join()
        else:
            logger.error("thread %s hangs in the file system; it is left behind", self._thread.name)

    def _tell_why(self, order: Order) -> None:
        """Say who kept a write waiting that was given up: whoever gave it up knows only that it took too long."""
        waited_s = 0.0 if order.waits_since is None else time.monotonic() - order.waits_since
        if waited_s >= _TELL_FROM_S and self._session is not None:
            logger.warning("%s", locked_too_long(self._session.path, waited_s))

    def _submit(self, work: Callable[[Session], object]) -> asyncio.Future[object]:
        if self._closed:
            raise ClosedError("the log is closed")
        future: asyncio.Future[object] = self._loop.create_future()
        self._queue.put((work, future))
        return future

    def _main(self) -> None:
        try:
            session = self._session = self._open_session()
        except BaseException as exc:
            self._tell(self._opened, None, exc)
            self._tell(self._ended, None, None)
            return
        self._tell(self._opened, None, None)
        while (item := self._queue.get()) is not None:
            work, future = item
            try:
                self._tell(future, work(session), None)
            except BaseException as exc:
                self._tell(future, None, exc)
            # What was read may be megabytes, and the next item may be long in coming.
            del item, work, future
            if session.is_checkpoint_due():
                try:
                    session.checkpoint()
                except StreamFlowError as error:  # the next write tries again
                    logger.info("%s", error)
        try:
            session.close()
        finally:
            self._tell(self._ended, None, None)

    def _tell(self, future: asyncio.Future[T], result: T, error: BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(_settle, future, result, error)
        except RuntimeError:  # the loop is closed: its owner left without closing the log
            self._closed = True


def _settle(future: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        future.exception()  # somebody may have stopped waiting
