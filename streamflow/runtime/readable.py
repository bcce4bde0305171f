"""One partition of a table as it may be read from outside: by its owner, or as a standby has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import anyio.from_thread

from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.runtime.standby import Standby
from streamflow.runtime.task import Task
from streamflow.state.format import unpack
from streamflow.state.overlay import Overlay
from streamflow.state.store import Store
from streamflow.state.values import MISSING

Row = tuple[bytes, bytes]
"""A stored key, and a value as the changelog has it."""

_TRIES = 3


class Readable(Protocol):
    """What is read; made for one read."""

    @property
    def holder(self) -> Task | Standby:
        """Whose it is."""
        ...

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        """What it had come to when this was made."""
        ...

    @property
    def lag(self) -> int | None:
        """Records that it may lack; None where it is the owner's."""
        ...

    def behind(self, at: Mapping[TopicPartition, int]) -> TopicPartition | None:
        """A position it has not come to, or does not know about; None where it has come to all of its partition."""
        ...

    def value(self, key: Any, store_key: bytes) -> bytes | None:
        """The value of a key; None where there is none."""
        ...

    def entries(self, low: bytes, high: bytes | None, count: int) -> Iterator[Row]:
        """The first rows of a range in key order, as at one moment: at least `count`, or all; called in a thread."""
        ...


class Owned:
    """A table of a task that is this worker's.

    Args:
        task: The task, whose tables are restored.
        table: The table.
    """

    lag: int | None = None

    def __init__(self, task: Task, table: Table[Any, Any]) -> None:
        assert task.tables is not None
        self.holder = task
        self.positions = task.committed_positions(table.name)
        self._overlay: Overlay = task.tables.overlays[table.name]

    def behind(self, at: Mapping[TopicPartition, int]) -> TopicPartition | None:
        return next((tp for tp, offset in at.items() if self.positions.get(tp, offset) < offset), None)

    def value(self, key: Any, store_key: bytes) -> bytes | None:
        held = self._overlay.committed(key)
        return None if held is MISSING else self._overlay.values.payload(held)

    def entries(self, low: bytes, high: bytes | None, count: int) -> Iterator[Row]:
        overlay = self._overlay
        for _ in range(_TRIES):
            before = overlay.settling
            found = overlay.first_committed(low, high, count)
            if overlay.settling == before and not before % 2:
                return found
        # Commits come too fast: between two steps of the event loop there are none.
        return anyio.from_thread.run_sync(overlay.first_committed, low, high, count)


class Copied:
    """A table of a task that runs elsewhere.

    Args:
        standby: Follows the task.
        table: The table.
        store: The standby's.
        lag: How far it is behind.
    """

    def __init__(self, standby: Standby, table: Table[Any, Any], store: Store, lag: int) -> None:
        self.holder = standby
        self.lag: int | None = lag
        self._tp = TopicPartition(table.changelog.name, standby.partition)
        self.positions = {self._tp: standby.positions[table.name]}
        self._name = table.name
        self._store = store
        self._now_ms = standby.times.get(table.name, -1)

    def behind(self, at: Mapping[TopicPartition, int]) -> TopicPartition | None:
        """How far the task's other sources are in the table is told by the changelog alone, where that is asked for."""
        if self._tp in at:
            return self._tp if self.positions[self._tp] < at[self._tp] else None
        return next((tp for tp in at if tp.partition == self._tp.partition), None)

    def value(self, key: Any, store_key: bytes) -> bytes | None:
        data = self._store.get(self._name, store_key)
        return None if data is None else self._unexpired(data)

    def entries(self, low: bytes, high: bytes | None, count: int) -> Iterator[Row]:
        for store_key, data in self._store.scan(self._name, low, high):
            payload = self._unexpired(data)
            if payload is not None:
                yield store_key, payload

    def _unexpired(self, data: bytes) -> bytes | None:
        payload, expires_ms = unpack(data, table=self._name)
        return payload if expires_ms is None or expires_ms > self._now_ms else None
