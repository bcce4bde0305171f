"""Where tables are held in this process, for code that stands in no record's turn: timers, tasks, HTTP handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from streamflow.processing.context import RunningApp
from streamflow.state.overlay import Overlay


class Holder(Protocol):
    """A worker, as far as its tables go."""

    def overlays(self, table: str) -> Mapping[int, Overlay]:
        """The partitions of a table that are held here and restored, by number."""
        ...

    def assigned(self, table: str) -> Iterable[int]:
        """The partitions of a table that are assigned here, restored or not; all where a stop came before any was."""
        ...

    def awaits(self, table: str) -> bool:
        """Whether partitions of a table may still come up here: none was assigned yet, or some are being restored."""
        ...

    def partition_of(self, table: Any, key: Any) -> int:
        """The partition of a key of a `Table`.

        Raises:
            ProductionError: It is no key of the table.
        """
        ...

    def position(self, table: str, partition: int) -> str:
        """How far a partition that is held here is committed, as text for `at=`.

        Raises:
            NotHeld: It is not held here any more.
        """
        ...

    def change(self, table: str, partition: int, work: Callable[[Any], Any]) -> Awaitable[Any]:
        """Run a function in a turn of the partition's task, between records; its writes commit like a record's.

        Args:
            table: The table.
            partition: Its partition.
            work: Called with the table's stage in that turn.

        Returns:
            What the function returned, once its writes are committed.
        """
        ...


_holders: WeakKeyDictionary[RunningApp, list[Holder]] = WeakKeyDictionary()


def holders_of(app: RunningApp) -> list[Holder]:
    """The workers of an app that run in this process, the newest first."""
    return _holders.get(app, [])


@contextmanager
def registered_holder(app: RunningApp, holder: Holder) -> Generator[None]:
    """Make a worker's tables readable by the process while the block runs."""
    holders = _holders.setdefault(app, [])
    holders.insert(0, holder)
    try:
        yield
    finally:
        holders.remove(holder)
