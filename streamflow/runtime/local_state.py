"""Where the tasks of one worker keep their tables: a slot of the data directory, or memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio.to_thread

from streamflow.clock import Clock
from streamflow.errors import TopologyError
from streamflow.log.api import TopicDescription
from streamflow.processing.declarations import Declarations
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.changelogs import stale_after_ms
from streamflow.runtime.commit_mark import CommitMark, check_mark
from streamflow.runtime.mark_check import check_mark_of
from streamflow.runtime.outputs import Outputs
from streamflow.runtime.restore import Restorer
from streamflow.runtime.task_tables import CheckHome, SetAside, TaskTables
from streamflow.state.format import FORMAT
from streamflow.state.identity import Identity, TableIdentity
from streamflow.state.slots import Slot
from streamflow.state.store import Checkpoint, Store, Stores

logger = logging.getLogger("streamflow.tables")

_LIVE_SHARE = 4
_LIVE_ENTRY_BYTES = 256
_LEAST_LIVE_ENTRIES = 2_048


@dataclass(frozen=True, slots=True)
class LocalState:
    """The tables of a task, before it runs.

    Attributes:
        tables: Their declarations.
        by_agent: The names of the tables that each agent may touch.
        store: The open store.
        restorer: Brings it level with the log.
        live_entries: See `Overlay`.
        stale_after_ms: See `TaskTables`.
        set_aside: See `TaskTables`.
    """

    tables: Sequence[Table[Any, Any]]
    by_agent: Mapping[str, Sequence[str]]
    store: Store
    restorer: Restorer
    live_entries: int
    stale_after_ms: Mapping[str, int]
    set_aside: SetAside

    def open_tables(
        self,
        partition: int,
        outputs: Outputs,
        clock: Clock,
        check_home: CheckHome,
        damaged: Callable[[], None],
    ) -> TaskTables:
        """The tables in the hands of a task; see `TaskTables` for what they need of it."""
        return TaskTables(
            self.tables,
            partition,
            self.store,
            outputs,
            clock,
            self.live_entries,
            check_home,
            stale_after_ms=self.stale_after_ms,
            set_aside=self.set_aside,
            damaged=damaged,
        )


class LocalStates:
    """Opens the local state of tasks.

    Args:
        app: The app.
        descriptions: Topics as they are in the log, for the ids of changelogs.
        stores: Where stores come from.
        slot: The slot of the data directory; None where state is in memory only.
        restorer: Brings stores level with the log.
        memory_budget_bytes: The process's budget, of which a quarter is for decoded values.
        partitions: How many tasks there may be.
    """

    def __init__(
        self,
        app: Declarations,
        descriptions: Mapping[str, TopicDescription],
        stores: Stores,
        slot: Slot | None,
        restorer: Restorer,
        memory_budget_bytes: int,
        partitions: int,
    ) -> None:
        self._app = app
        self._descriptions = dict(descriptions)
        self._stores = stores
        self._slot = slot
        self._restorer = restorer
        self._by_agent = {name: tuple(table.name for table in agent.tables()) for name, agent in app.agents.items()}
        entries = memory_budget_bytes // (_LIVE_SHARE * _LIVE_ENTRY_BYTES * max(1, partitions * len(app.tables)))
        self._live_entries = max(_LEAST_LIVE_ENTRIES, entries)

    async def open(
        self, sub: SubTopology, partition: int, mark: CommitMark | None, held: LocalState | None = None
    ) -> LocalState | None:
        """Open what a task keeps; None where it has no tables.

        Args:
            sub: Its sub-topology.
            partition: Its partition.
            mark: What its last commit says; None where there was none.
            held: It, where it is open already; closed where this raises.

        Raises:
            TopologyError: The last commit stands for other tables than these; nothing was opened.
            StateError: It cannot be opened.
        """
        if not sub.tables:
            return None
        try:
            self.check(sub, partition, mark)
        except TopologyError:
            if held is not None:
                await anyio.to_thread.run_sync(held.store.close)
            raise
        if held is not None:
            return held
        tables = self.tables_of(sub)
        store = await anyio.to_thread.run_sync(self._open, sub, partition, tables)
        return LocalState(
            tables,
            self._by_agent,
            store,
            self._restorer,
            self._live_entries,
            {table.name: self.stale_after_ms(table) for table in tables},
            partial(self._stores.set_aside, store.path),
        )

    def check(self, sub: SubTopology, partition: int, mark: CommitMark | None) -> None:
        """Make sure that a task's last commit stands for the tables of today.

        Raises:
            TopologyError: It does not.
        """
        if mark is not None:
            kept = {table.name: self._described(table) for table in self.tables_of(sub) if table.source is None}
            check_mark_of(f"{sub.name}-{partition}", mark, kept)

    def changelogs(self, subs: Iterable[SubTopology]) -> list[str]:
        """Names of the changelogs of sub-topologies that are the app's own."""
        return sorted({each.changelog.name for sub in subs for each in self.tables_of(sub) if each.source is None})

    def know(self, changelogs: Mapping[str, TopicDescription]) -> None:
        """Note what changelogs are now: who made one anew while workers run is found out when a task is opened."""
        self._descriptions.update({name: each for name, each in changelogs.items() if each.topic_id})

    def tables_of(self, sub: SubTopology) -> list[Table[Any, Any]]:
        """The tables of a sub-topology."""
        return [self._app.tables[name] for name in sub.tables]

    def stale_after_ms(self, table: Table[Any, Any]) -> int:
        """How long a store may have been away from the table's changelog, milliseconds."""
        return stale_after_ms(self._descriptions[table.changelog.name])

    def peek(self, sub: SubTopology, partition: int) -> Checkpoint | None:
        """How far a task's store in this slot is, which nobody may have open; None where there is none; blocks."""
        task = f"{sub.name}-{partition}"
        return self._stores.peek(task if self._slot is None else self._slot.store_path(task))

    def _open(self, sub: SubTopology, partition: int, tables: Sequence[Table[Any, Any]]) -> Store:
        task = f"{sub.name}-{partition}"
        check_mark(sub.tables, [table.name for table in tables if table.ttl_s is not None])
        path = task
        if self._slot is not None:
            self._slot.adopt(task, self._stores)
            path = self._slot.store_path(task)
        described = {table.name: self._described(table) for table in tables}
        return self._stores.open(path, Identity(self._app.id, sub.name, partition, described))

    def _described(self, table: Table[Any, Any]) -> TableIdentity:
        changelog = table.changelog
        return TableIdentity(
            changelog.name,
            self._descriptions[changelog.name].topic_id,
            table.keys_in_order.name,
            changelog.key_codec.serializer,
            changelog.value_codec.serializer,
            FORMAT,
            "" if table.ttl_s is None else "stream time",
        )
