"""The tables of a worker's tasks, for code that stands in no record's turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streamflow.errors import ClosedError, NotHeld
from streamflow.model.position import text_of
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.homes import Homes
from streamflow.runtime.layout import Layout
from streamflow.runtime.task_manager import TaskManager
from streamflow.state.overlay import Overlay
from streamflow.state.stage import Stage


class HeldTables:
    """What one worker holds; a `processing.holding.Holder`.

    Args:
        manager: Its tasks.
        layout: How its work is cut into tasks.
        homes: Knows the partitions of table keys.
    """

    def __init__(self, manager: TaskManager, layout: Layout, homes: Homes) -> None:
        self._manager = manager
        self._layout = layout
        self._homes = homes
        self._loop = asyncio.get_running_loop()

    def overlays(self, table: str) -> Mapping[int, Overlay]:
        """The partitions of a table that are held here and restored, by number."""
        return {
            task.partition: task.tables.overlays[table]
            for task in self._manager.running()  # asked by other threads, too
            if task.is_readable and task.tables is not None and table in task.tables.overlays
        }

    def assigned(self, table: str) -> Iterable[int]:
        """The partitions of a table that are assigned here, restored or not; all where a stop came before any was."""
        manager, sub = self._manager, self._sub_topology(table)
        if manager.is_finishing and not manager.assigned_once.is_set():
            return range(max(self._layout.counts[topic] for topic in sub.topics))
        return manager.assigned_to(sub)

    def awaits(self, table: str) -> bool:
        """Whether partitions of a table may still come up here: none was assigned yet, or some are being restored."""
        manager = self._manager
        if not manager.assigned_once.is_set() or not manager.has_opened:
            return not manager.is_finishing
        return any(
            task.tables is not None and table in task.tables.overlays and task.state in ("created", "restoring")
            for task in manager.running()
        )

    def partition_of(self, table: Table[Any, Any], key: Any) -> int:
        """The partition of a key; see `processing.holding.Holder`."""
        return self._homes.of(self._sub_topology(table.name), table, key)

    def _sub_topology(self, table: str) -> SubTopology:
        return next(sub for sub in self._layout.sub_topologies if table in sub.tables)

    def position(self, table: str, partition: int) -> str:
        """How far a partition is committed; see `processing.holding.Holder`."""
        for task in self._manager.running():
            if (
                task.partition == partition
                and task.is_readable
                and task.tables is not None
                and table in task.tables.overlays
            ):
                return text_of(task.committed_positions(table))
        raise NotHeld(f"table {table!r}: partition {partition} has left this process")

    async def change(self, table: str, partition: int, work: Callable[[Stage], Any]) -> Any:
        """Run a function in a turn of the partition's task, between records; see `processing.holding.Holder`."""
        if asyncio.get_running_loop() is not self._loop:
            raise ClosedError(
                f"table {table!r}: the app runs on another event loop of this process; change tables there "
                "(`asyncio.run_coroutine_threadsafe`)"
            )
        for task in self._manager.running():
            if task.partition == partition and task.tables is not None and table in task.tables.overlays:
                return await task.change(table, work)
        raise NotHeld(f"table {table!r}: partition {partition} has left this process")
