"""The database behind a log: a file with its connections and threads, or one in memory that logs of a name share.

What is where: one connection writes, one reads for administration, each fetch lane, group and the maintenance have
their own, and one that never writes is asked for `PRAGMA data_version`. In memory there is one connection for all.

`synchronous=FULL`: SQLite flushes its write-ahead log to the disk before a commit is acknowledged, so that what was
acknowledged survives a power cut, as the contract promises. It costs about 0.15 ms a commit on a solid-state disk;
group commit shares it among everything that waits. (`NORMAL` would survive `kill -9`, not the power cut.) Heartbeats
need no such promise and use `NORMAL`.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import IO

from streamflow.clock import Clock, SystemClock
from streamflow.errors import ConfigurationError
from streamflow.log.sqlite import faults, schema
from streamflow.log.sqlite.changes import Changes
from streamflow.log.sqlite.execution import (
    BUSY_TIMEOUT_S,
    InlineRunner,
    Runner,
    Session,
    ThreadRunner,
)
from streamflow.log.sqlite.faults import prepare_directory, refuse_network_file_system
from streamflow.log.tasks import TaskOwner

OLDEST_SQLITE = (3, 35, 0)  # INSERT ... RETURNING
_PRAGMAS = (
    "temp_store = MEMORY",
    "cache_size = -8192",
    "wal_autocheckpoint = 0",  # see Session.checkpoint
    "journal_size_limit = 33554432",
)
_PEEK_TIMEOUT_S = 0.25
"""The event loop itself waits no longer than this for a reader's lock (which only a recovery takes)."""


class Database(ABC):
    """What the parts of a log share.

    Attributes:
        name: The log as messages name it.
        clock: What time it is.
        waits: The clock to wait by: real time for a file, because other processes share it.
        changes: Wakes who waits for records.
        members: Wakes who waits for changes of groups; None where that is polled (files).
        writer: Runs write transactions.
        reader: Runs administration's reads.
    """

    name: str
    clock: Clock
    waits: Clock
    changes: Changes
    members: Changes | None
    writer: Runner
    reader: Runner

    @abstractmethod
    async def aopen(self) -> None:
        """Open it; raises what `Log.__aenter__` raises."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close it: all its threads and connections end."""

    @abstractmethod
    async def lane(self, name: str) -> Runner:
        """A runner of its own, to be closed by the caller."""

    @abstractmethod
    def session(self, *, durable: bool, busy_timeout_s: float | None = None) -> Session:
        """A session of its own, to be closed by the caller; in memory the shared one, which is not."""

    @abstractmethod
    def new_id(self) -> str:
        """An id that nobody else has; in memory the same ones in every run, for simulations."""

    @abstractmethod
    def take_lease(self) -> bool:
        """Become the one that maintains the database, until it is closed; False while another one is."""

    @abstractmethod
    def wrote(self, *, members: bool = False) -> None:
        """Tell the others that records (or members) changed."""


class FileDatabase(Database):
    """A file, its connections and threads.

    Args:
        path: Absolute path.
        clock: Time.
        busy_timeout_s: How long a transaction waits for another process's.
    """

    def __init__(self, path: str, clock: Clock, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.name = path
        self.clock = clock
        self.waits = SystemClock()
        self.members = None
        self._busy_timeout_s = busy_timeout_s
        self._identity: tuple[int, int] | None = None
        self._lease: IO[bytes] | None = None
        self._stack = AsyncExitStack()

    async def aopen(self) -> None:
        async with AsyncExitStack() as stack:
            self.changes = Changes()
            self.writer = await ThreadRunner(self._open_first, "streamflow-log-write").start()
            stack.push_async_callback(self.writer.aclose)
            self.reader = await self.lane("read")
            stack.push_async_callback(self.reader.aclose)
            self._watch = self.session(durable=False, busy_timeout_s=_PEEK_TIMEOUT_S)
            stack.callback(self._watch.close)
            await stack.enter_async_context(TaskOwner("log changes", self.changes.poll(self._data_version)))
            self._stack = stack.pop_all()

    async def aclose(self) -> None:
        self._lease = None
        await self._stack.aclose()

    def new_id(self) -> str:
        return uuid.uuid4().hex

    def take_lease(self) -> bool:
        if self._lease is not None:
            return True
        # The operating system gives the lock back when its process ends, however it ends.
        try:
            lease = open(f"{self.name}-maintenance", "ab")  # noqa: SIM115
        except OSError:
            return False  # a full disk, or somebody else's file: another process may have more luck
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lease.close()
            return False
        self._lease = self._stack.enter_context(lease)
        return True

    async def lane(self, name: str) -> Runner:
        return await ThreadRunner(lambda: self.session(durable=False), f"streamflow-log-{name}").start()

    def session(self, *, durable: bool, busy_timeout_s: float | None = None) -> Session:
        session = self._connect(busy_timeout_s)
        try:
            session.direct(lambda sql: _configure(sql, durable=durable))
        except BaseException:
            session.close()
            raise
        return session

    def wrote(self, *, members: bool = False) -> None:
        if not members:
            self.changes.active()
            self.changes.notify()

    def _data_version(self) -> int:
        return self._watch.direct(_data_version)

    def _open_first(self) -> Session:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise ConfigurationError(
                f"log {self.name}: this Python comes with SQLite {sqlite3.sqlite_version}; "
                f"{'.'.join(map(str, OLDEST_SQLITE))} or newer is needed"
            )
        prepare_directory(self.name)
        refuse_network_file_system(self.name)
        session = self._connect()
        try:
            # Looked at before anything is changed: somebody else's file stays as it is.
            # In one snapshot: another process may be making the tables.
            if not session.read(self._is_current):
                session.direct(_let_shrink)
                session.direct(self._use_write_ahead_log)
                session.write(self._create)
            session.direct(self._use_write_ahead_log)
            session.direct(lambda sql: _configure(sql, durable=True))
            self._identity = faults.identity(self.name)
        except BaseException:
            session.close()
            raise
        return session

    def _connect(self, busy_timeout_s: float | None = None) -> Session:
        timeout_s = self._busy_timeout_s if busy_timeout_s is None else busy_timeout_s
        return _connect(self.name, self.name, timeout_s, check=self._check_place)

    def _check_place(self) -> None:
        if self._identity is not None:
            faults.check_identity(self.name, self._identity)

    def _is_current(self, sql: sqlite3.Connection) -> bool:
        return schema.is_current(sql, self.name)

    def _create(self, sql: sqlite3.Connection) -> None:
        if not self._is_current(sql):  # another process may have been first
            schema.create(sql, self.clock.now_ms())

    def _use_write_ahead_log(self, sql: sqlite3.Connection) -> None:
        (mode,) = sql.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError("this file system does not allow the write-ahead log")


class Memory:
    """A database in memory that lives while a log has it open.

    Attributes:
        session: The one connection.
        users: Logs that have it open.
        ids: Gives each id once.
        maintainer: The one of them that maintains it.
    """

    def __init__(self, name: str, now_ms: int) -> None:
        self.session = _connect(":memory:", f"memory://{name}", BUSY_TIMEOUT_S, threading.RLock())
        self.session.write(lambda sql: schema.create(sql, now_ms))
        self.users: list[MemoryDatabase] = []
        self.ids = itertools.count(1)
        self.maintainer: MemoryDatabase | None = None


_memories: dict[str, Memory] = {}
_memories_lock = threading.Lock()


class MemoryDatabase(Database):
    """One log's share of a database in memory.

    Args:
        name: All logs of this name in this process share one.
        clock: Time.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self._key = name
        self.name = f"memory://{name}"
        self.clock = self.waits = clock

    async def aopen(self) -> None:
        self.changes, self.members = Changes(), Changes()
        with _memories_lock:
            memory = _memories.get(self._key)
            if memory is None:
                memory = _memories[self._key] = Memory(self._key, self.clock.now_ms())
            memory.users.append(self)
        self.memory = memory
        self.writer = self.reader = InlineRunner(memory.session)

    async def aclose(self) -> None:
        with _memories_lock:
            self.memory.users.remove(self)
            last = not self.memory.users
            if self.memory.maintainer is self:
                self.memory.maintainer = None
            if last:
                del _memories[self._key]
        if last:
            self.memory.session.close()

    def new_id(self) -> str:
        return f"{next(self.memory.ids):08x}".ljust(32, "0")  # told apart by its beginning, as random ones are

    def take_lease(self) -> bool:
        with _memories_lock:
            self.memory.maintainer = self.memory.maintainer or self
            return self.memory.maintainer is self

    async def lane(self, name: str) -> Runner:
        return self.writer

    def session(self, *, durable: bool, busy_timeout_s: float | None = None) -> Session:
        return self.memory.session

    def wrote(self, *, members: bool = False) -> None:
        for user in list(self.memory.users):
            changes = user.members if members else user.changes
            if changes is not None:
                changes.notify()


def _connect(
    target: str,
    name: str,
    busy_timeout_s: float,
    lock: threading.RLock | None = None,
    check: Callable[[], None] | None = None,
) -> Session:
    def connect() -> sqlite3.Connection:
        return sqlite3.connect(target, timeout=0, isolation_level=None, check_same_thread=False, cached_statements=256)

    return Session.opened_by(connect, name, busy_timeout_s=busy_timeout_s, lock=lock, check=check)


def _let_shrink(sql: sqlite3.Connection) -> None:
    # Of effect before the first write to a new file only; an older file gets it with its next VACUUM.
    sql.execute("PRAGMA auto_vacuum = INCREMENTAL")


def _configure(sql: sqlite3.Connection, *, durable: bool) -> None:
    for pragma in _PRAGMAS:
        sql.execute(f"PRAGMA {pragma}")
    sql.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    # On macOS, fsync leaves data in the drive's cache; elsewhere this changes nothing.
    sql.execute(f"PRAGMA fullfsync = {'ON' if durable else 'OFF'}")


def _data_version(sql: sqlite3.Connection) -> int:
    (version,) = sql.execute("PRAGMA data_version").fetchone()
    return int(version)


def absolute(path: str) -> str:
    """A log's path as everybody names it."""
    return os.path.abspath(os.path.expanduser(path))
