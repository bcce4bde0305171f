"""The global tables of one worker: restored before anything else runs, then followed for as long as the worker lives.

They belong to no task and no commit. One fetch lane reads every partition of every source.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from streamflow.clock import Clock
from streamflow.errors import (
    RetriableError,
    StreamFlowError,
)
from streamflow.log.api import Admin, Fetched, Log, Reader, TopicDescription
from streamflow.processing.declarations import Declarations
from streamflow.processing.global_table import GlobalTable
from streamflow.runtime.global_copy import GlobalCopy
from streamflow.runtime.status import GlobalTableStatus
from streamflow.sensors import Sensors
from streamflow.state.format import FORMAT
from streamflow.state.identity import Identity, TableIdentity
from streamflow.state.slots import Slot
from streamflow.state.store import Store, Stores

logger = logging.getLogger("streamflow.tables")

_LOOK_EVERY_S = 30.0
_CACHE_SHARE = 8
_CACHED_VALUE_BYTES = 256
_LEAST_CACHED_VALUES = 2_048


class GlobalTables:
    """The global tables of one worker; made by `open`.

    Args:
        admin: The log's administration.
        clock: Time.
        fail: Told what stops the worker.
    """

    def __init__(self, admin: Admin, clock: Clock, fail: Callable[[StreamFlowError], None]) -> None:
        self._admin = admin
        self._clock = clock
        self._fail = fail
        self._receiving = anyio.CancelScope()
        self._is_look_due = False
        self.copies: dict[str, GlobalCopy] = {}

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        app: Declarations,
        descriptions: Mapping[str, TopicDescription],
        log: Log,
        stores: Stores,
        slot: Slot | None,
        memory_budget_bytes: int,
        clock: Clock,
        sensors: Sensors,
        fail: Callable[[StreamFlowError], None],
    ) -> AsyncGenerator[GlobalTables]:
        """Open the copies of all global tables and follow their sources while the block runs.

        Args:
            app: The app.
            descriptions: Its topics as they are in the log.
            log: The log.
            stores: Where stores come from.
            slot: The slot of the data directory; None where state is in memory only.
            memory_budget_bytes: The process's budget, of which an eighth is for decoded values.
            clock: Time.
            sensors: Metrics hooks.
            fail: Told what stops the worker.
        """
        opened = cls(log.admin, clock, fail)
        if not app.global_tables:
            yield opened
            return
        per_table = memory_budget_bytes // (_CACHE_SHARE * _CACHED_VALUE_BYTES * len(app.global_tables))
        async with log.reader("global") as reader:
            try:
                for name, table in app.global_tables.items():
                    source = descriptions[table.source.name]
                    store = await anyio.to_thread.run_sync(_open_store, app.id, table, source, stores, slot)
                    opened.copies[name] = GlobalCopy(
                        table,
                        source,
                        store,
                        max(_LEAST_CACHED_VALUES, per_table),
                        partial(stores.set_aside, store.path),
                        reader,
                        log.admin,
                        clock,
                        sensors,
                    )
                async with anyio.create_task_group() as group:
                    group.start_soon(opened._run, reader)
                    group.start_soon(opened._tick)
                    yield opened
                    group.cancel_scope.cancel()
            finally:
                for copy in opened.copies.values():
                    await copy.close()

    # --- following ---------------------------------------------------------------------------------------------

    async def _run(self, reader: Reader) -> None:
        """Follow the sources; one task does all of it, so nothing arrives while a table is begun anew."""
        by_topic = {copy.source.name: copy for copy in self.copies.values()}
        try:
            for copy in self.copies.values():
                await copy.begin()
            while True:
                arrived: list[Fetched] = []
                with anyio.CancelScope() as self._receiving:
                    arrived = await reader.receive()
                anew: set[str] = set()
                for fetched in arrived:
                    # What was fetched beside what has a table read anew is of before, and comes again.
                    topic = fetched.tp.topic
                    if topic not in anew and await by_topic[topic].take(fetched):
                        anew.add(topic)
                if self._is_look_due:
                    self._is_look_due = False
                    await self._look(by_topic)
        except StreamFlowError as error:
            self._fail(error)

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_EVERY_S)
            self._is_look_due = True
            self._receiving.cancel()

    async def _look(self, by_topic: Mapping[str, GlobalCopy]) -> None:
        """Look whether a source has more partitions, or was made anew."""
        try:
            found = await self._admin.describe(sorted(by_topic))
        except RetriableError:
            return  # the log is away; the reader waits for it
        for name, description in found.items():
            await by_topic[name].look(description)

    async def restored(self, stop: anyio.Event) -> bool:
        """Wait until all of every table is here, and let it be read.

        Args:
            stop: Ends the wait.

        Returns:
            Whether they are; False where a stop came first.

        Raises:
            FatalError: An `on_recover` raised.
        """
        if not self.copies:
            return True
        is_done = False
        started_s = self._clock.monotonic()
        async with anyio.create_task_group() as group:

            async def give_up() -> None:
                await stop.wait()
                group.cancel_scope.cancel()

            group.start_soon(give_up)
            for copy in self.copies.values():
                while not copy.positions or not copy.is_restored():
                    await copy.wait_moved()
            is_done = True
            group.cancel_scope.cancel()
        if not is_done:
            return False
        for copy in self.copies.values():
            await copy.complete()
        logger.info(
            "global tables are here: %s (%d records read, %.1f s)",
            ", ".join(sorted(self.copies)),
            sum(copy.records_read for copy in self.copies.values()),
            self._clock.monotonic() - started_s,
        )
        return True

    # --- what the worker asks ----------------------------------------------------------------------------------

    def status(self) -> tuple[GlobalTableStatus, ...]:
        """A snapshot of each, in order of name."""
        return tuple(self.copies[name].status() for name in sorted(self.copies))

    async def unsettled(self) -> str:
        """What has not arrived, in words; empty when everything that readers may see has."""
        for name, copy in self.copies.items():
            if copy.is_behind(await self._admin.end_offsets(list(copy.positions))):
                return f"records of {copy.source.name} are on their way into global table {name!r}"
        return ""


def _open_store(
    app: str, table: GlobalTable[Any, Any], source: TopicDescription, stores: Stores, slot: Slot | None
) -> Store:
    name = f"global:{table.name}"  # no task is called so: a topic's name has no colon
    identity = TableIdentity(
        source.name,
        source.topic_id,
        table.keys_in_order.name,
        table.source.key_codec.serializer,
        table.source.value_codec.serializer,
        FORMAT,
    )
    path = name if slot is None else slot.store_path(name)
    return stores.open(path, Identity(app, name, 0, {table.name: identity}))
