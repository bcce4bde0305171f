"""The embedded log: one SQLite file that several processes share, or a database in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from streamflow.clock import Clock
from streamflow.errors import ConfigurationError
from streamflow.log.api import (
    Admin,
    Assignor,
    Group,
    GroupSettings,
    Isolation,
    Log,
    Producer,
    Reader,
    TransactionalProducer,
)
from streamflow.log.sqlite import process
from streamflow.log.sqlite.admin import SqliteAdmin
from streamflow.log.sqlite.database import Database, FileDatabase, MemoryDatabase, absolute
from streamflow.log.sqlite.execution import BUSY_TIMEOUT_S
from streamflow.log.sqlite.group import joined
from streamflow.log.sqlite.maintenance import Maintenance
from streamflow.log.sqlite.membership import Subscription
from streamflow.log.sqlite.producer import SqliteProducer, SqliteTransactionalProducer
from streamflow.log.sqlite.reader import SqliteReader
from streamflow.log.tasks import TaskOwner

_CHANGED_TIMEOUT_S = 0.1


class SqliteLog(Log):
    """A log on SQLite; made by `at_path` or `in_memory`.

    Args:
        database: Where it is.
        address: What people call it.
    """

    def __init__(self, database: Database, address: str) -> None:
        self._database = database
        self._address = address
        self._admin = SqliteAdmin(database)
        self._maintenance = Maintenance(database)
        self._stack = AsyncExitStack()

    @classmethod
    def at_path(cls, path: str, *, clock: Clock, busy_timeout_s: float = BUSY_TIMEOUT_S) -> SqliteLog:
        """A log in a file, which is made when it does not exist.

        Every commit is on the disk before it is acknowledged (`synchronous=FULL`), so that it survives a power cut.

        Args:
            path: The file; a relative path starts at the current directory.
            clock: Wall-clock time for retention; waiting is always in real time, as other processes share the file.
            busy_timeout_s: How long a write waits while another process keeps the file locked, seconds.

        Raises:
            ConfigurationError: The path is empty.
        """
        if not path:
            raise ConfigurationError("sqlite:// names no file: write sqlite:///PATH")
        path = absolute(path)
        return cls(FileDatabase(path, clock, busy_timeout_s=busy_timeout_s), f"sqlite:///{path}")

    @classmethod
    def in_memory(cls, name: str, *, clock: Clock) -> SqliteLog:
        """A log in memory, shared by all of this process with the same name, which lives while one of them is open.

        Args:
            name: May be empty.
            clock: All its time; a virtual clock drives heartbeats, retention and compaction.
        """
        return cls(MemoryDatabase(name, clock), f"memory://{name}")

    async def maintain(self) -> bool:
        """Do now what maintenance has to do (retention, compaction), as it is done every 30 s.

        Returns:
            False when another process holds the maintenance lease.
        """
        if not self._database.take_lease():
            return False
        await self._maintenance.round(at_once=True)
        return True

    @property
    def address(self) -> str:
        return self._address

    @property
    def admin(self) -> Admin:
        return self._admin

    async def __aenter__(self) -> SqliteLog:
        async with AsyncExitStack() as stack:
            await self._database.aopen()
            stack.push_async_callback(self._database.aclose)
            await stack.enter_async_context(TaskOwner("log maintenance", self._maintenance.run()))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def reader(self, lane: str, *, isolation: Isolation = "read_committed") -> AsyncGenerator[Reader]:
        runner = await self._database.lane(f"read-{lane}")
        try:
            # Nothing uncommitted is ever stored, so that both isolations read the same.
            yield SqliteReader(self._database, runner)
        finally:
            await runner.aclose()

    @asynccontextmanager
    async def producer(self, *, delivery_timeout_s: float = 120.0) -> AsyncGenerator[Producer]:
        producer = SqliteProducer(self._database, delivery_timeout_s)
        async with TaskOwner("log producer", producer.run()):
            try:
                yield producer
            finally:
                await producer.close()

    @asynccontextmanager
    async def transactional_producer(self, transactional_id: str) -> AsyncGenerator[TransactionalProducer]:
        producer = SqliteTransactionalProducer(self._database, transactional_id)
        await producer.begin()
        async with TaskOwner("log transactional id", producer.renew()):
            try:
                yield producer
            finally:
                await producer.end()

    def group(
        self,
        group_id: str,
        topics: frozenset[str],
        assignor: Assignor,
        settings: GroupSettings,
        says: bytes = b"",
    ) -> AbstractAsyncContextManager[Group]:
        mine = Subscription(group_id, topics, assignor, settings, process.identity(), self._database.new_id)
        return joined(self._database, mine, says)

    async def changed(self) -> None:
        changes = self._database.changes
        due: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def ring() -> None:
            await self._database.waits.sleep(_CHANGED_TIMEOUT_S)
            if not due.done():
                due.set_result(None)

        async with TaskOwner("log changed", ring()):
            with changes.waking(due):
                await due
