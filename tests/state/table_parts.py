"""Overlays over a store in memory, for tests: a table of one task without log or runtime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import streamflow as sf
from streamflow.processing.table import Table
from streamflow.state.identity import Identity, TableIdentity
from streamflow.state.memory import MemoryStores
from streamflow.state.overlay import Overlay, Record
from streamflow.state.stage import PlainStage, Stage
from streamflow.state.store import Checkpoint, StoreBatch
from streamflow.state.undo import Undo
from streamflow.state.values import Values


class Parts:
    """One table of one task, with a changelog that is a dict.

    Args:
        key_type: Type of its keys.
        value_type: Type of its values.
        max_value_bytes: Largest encoded value.
        options: Of the table and of the overlay.
    """

    def __init__(
        self, key_type: Any, value_type: Any, *, max_value_bytes: int = 100_000, live_entries: int = 0, **options: Any
    ) -> None:
        self.table: Table[Any, Any] = Table(sf.App("a"), "t", key_type=key_type, value_type=value_type, **options)
        order = self.table.keys_in_order
        described = TableIdentity("t", "id", order.name, "k", "v")
        self.store = MemoryStores().open("p", Identity("a", "s", 0, {"t": described}))
        self.overlay = Overlay(
            "t",
            0,
            keys=order,
            key_codec=self.table.key_codec,
            values=Values("t", self.table.changelog.value_codec, max_value_bytes),
            store=self.store,
            live_entries=live_entries,
            ttl_ms=None if self.table.ttl_s is None else round(self.table.ttl_s * 1000),
        )
        self.undo = Undo()
        self.changelog: dict[bytes, bytes] = {}
        self.records: list[tuple[bytes, bytes | None, int]] = []

    def stage(self) -> Stage:
        """A stage as turns that follow one another have it."""
        if self.overlay.values.are_objects and self.overlay.ttl_ms is None:
            return PlainStage(self.overlay, self.undo)
        return Stage(self.overlay, lambda _: None)

    def done(self, stage: Stage) -> None:
        """The turn is done."""
        stage.join()
        self.undo.clear()

    def failed(self, stage: Stage) -> None:
        """The turn failed."""
        stage.drop()
        self.undo.take_out()

    def seal(self) -> bool:
        """Seal what was written; its records go to the changelog."""
        with self.undo.aside():
            return self.overlay.seal(self._append, 7)

    def _append(self, records: Iterable[Record]) -> None:
        for key, value, timestamp_ms in records:
            self.records.append((key, value, timestamp_ms))
            if value is None:
                self.changelog.pop(key, None)
            else:
                self.changelog[key] = value

    def write_store(self) -> None:
        """Write what is committed to the store."""
        batch = StoreBatch(Checkpoint())
        batch.changes["t"] = self.overlay.take_settled()
        self.store.write(batch)
        self.overlay.stored()

    def fold(self) -> dict[Any, Any]:
        """What the changelog holds."""
        log = self.table.changelog
        return {log.key_codec.decode(key): log.value_codec.decode(value) for key, value in self.changelog.items()}
