"""The tables of one task: overlays over its store, sealed into changelog records at each commit.

Invariants: what is sealed together is committed together, in order; the store takes only what the log has committed,
with the changelog offsets that cover it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from streamflow.clock import Clock
from streamflow.errors import StateFullError
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.runtime.outputs import Outputs
from streamflow.state.overlay import Append, Overlay
from streamflow.state.stage import PlainStage, SharedStage, Stage, Waiting
from streamflow.state.store import Store, StoreBatch
from streamflow.state.values import Values

logger = logging.getLogger("streamflow.tables")

CheckHome = Callable[[str, bytes, Any], None]

_STORE_EVERY_S = 5.0
_STORE_FROM_ENTRIES = 50_000
_RETRY_FULL_S = 5.0


def _stage(overlay: Overlay, touched: Callable[[Stage], None]) -> Stage:
    kind = PlainStage if overlay.values.are_objects and overlay.ttl_ms is None else Stage
    return kind(overlay, touched)


class TaskTables:
    """The tables of one task.

    Args:
        tables: Their declarations.
        partition: The task's partition.
        store: Its store, open.
        outputs: The task's outputs, which the changelog records join.
        clock: Time.
        live_entries: How many values each table keeps decoded, about.
        check_home: Told table, key bytes and key of keys that are new: raises for one of another partition.

    Attributes:
        overlays: By table name.
        positions: By table name: the changelog offset that follows what is committed.
        is_level: Whether they were restored, so that the store's checkpoint may be written.
    """

    def __init__(
        self,
        tables: Sequence[Table[Any, Any]],
        partition: int,
        store: Store,
        outputs: Outputs,
        clock: Clock,
        live_entries: int,
        check_home: CheckHome,
    ) -> None:
        self.tables = {table.name: table for table in tables}
        self.partition = partition
        self.store = store
        self.overlays = {table.name: self._overlay(table, outputs, live_entries, check_home) for table in tables}
        self.positions = dict(store.checkpoint.changelogs)
        self._outputs = outputs
        self._clock = clock
        self._waiting = {name: Waiting(overlay) for name, overlay in self.overlays.items()}
        self._by_changelog = {TopicPartition(table.changelog.name, partition): table.name for table in tables}
        # Which tables each commit that is under way holds, the oldest first.
        self._sealed: deque[list[Overlay]] = deque()
        self._stored_at_s = clock.monotonic()
        self._storing = anyio.Lock()
        self.is_level = False

    def _overlay(self, table: Table[Any, Any], outputs: Outputs, live_entries: int, check_home: CheckHome) -> Overlay:
        target = outputs.to(table.changelog).target
        return Overlay(
            table.name,
            self.partition,
            keys=table.keys_in_order,
            key_codec=table.key_codec,
            values=Values(table.name, table.changelog.value_codec, target.max_record_bytes),
            store=self.store,
            live_entries=live_entries,
            ttl_ms=None if table.ttl_s is None else round(table.ttl_s * 1000),
            check_home=partial(check_home, table.name),
        )

    def changelogs(self) -> Mapping[TopicPartition, str]:
        """The changelog partitions, with the names of their tables."""
        return self._by_changelog

    # --- turns -------------------------------------------------------------------------------------------------

    def stages(self, names: Sequence[str], touched: Callable[[Stage], None], *, shared: bool) -> dict[str, Stage]:
        """What the turns of one feed see of the tables.

        Args:
            names: The agent's tables.
            touched: See `Stage`.
            shared: Whether several turns of the task may be in progress at once.
        """
        if shared:
            return {name: SharedStage(self._waiting[name], touched) for name in names}
        return {name: _stage(self.overlays[name], touched) for name in names}

    def waiting_of(self, name: str) -> Waiting:
        """What the task's turns share of a table."""
        return self._waiting[name]

    # --- commits -----------------------------------------------------------------------------------------------

    @property
    def dirty_entries(self) -> int:
        """How many keys were written and are in no commit yet."""
        return sum(len(overlay.dirty) for overlay in self.overlays.values())

    def seal(self) -> bool:
        """Close what was written since the last commit and add it to the outputs as changelog records.

        Returns:
            Whether there was anything; then `settle` is owed.
        """
        now_ms = self._clock.now_ms()
        sealed = [overlay for name, overlay in self.overlays.items() if overlay.seal(self._appender(name), now_ms)]
        if sealed:
            self._sealed.append(sealed)
        return bool(sealed)

    def _appender(self, name: str) -> Append:
        out = self._outputs.to(self.tables[name].changelog).partitions[self.partition]

        def append(key: bytes, value: bytes | None, timestamp_ms: int) -> None:
            if out.append(out.count, timestamp_ms, key, value, []) is None:
                out.roll(timestamp_ms, key, value, [])
            else:
                out.count += 1

        return append

    def settle(self, ends: Mapping[TopicPartition, int], times: Mapping[str, int]) -> None:
        """The log has committed what was sealed first.

        Args:
            ends: The offset after the last record, per partition that was written.
            times: Stream times that were committed with it.
        """
        for overlay in self._sealed.popleft():
            overlay.settle()
        self.positions = self.positions_after(ends)
        for name, time_ms in times.items():
            self.overlays[name].committed_stream_time_ms = time_ms

    def positions_after(self, ends: Mapping[TopicPartition, int]) -> dict[str, int]:
        """Where the changelogs stand once these offsets are committed; every table is in it."""
        return {name: ends.get(tp, self.positions.get(name, 0)) for tp, name in self._by_changelog.items()}

    def times(self) -> dict[str, int]:
        """Stream time of the tables whose values expire."""
        return {name: each.stream_time_ms for name, each in self.overlays.items() if each.ttl_ms is not None}

    # --- the store ---------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether the store should be written now."""
        waiting = sum(overlay.settled_entries for overlay in self.overlays.values())
        since_s = self._clock.monotonic() - self._stored_at_s
        return waiting >= _STORE_FROM_ENTRIES or (waiting > 0 and since_s > _STORE_EVERY_S)

    async def write_store(self, *, even_if_level: bool = False) -> None:
        """Write to the store what is committed and not there yet, in a thread.

        Args:
            even_if_level: Write the checkpoint also where nothing waits.

        Raises:
            StateFullError: No room; nothing is lost, and it may be tried again.
        """
        async with self._storing:
            self._stored_at_s = self._clock.monotonic()
            batch = StoreBatch(
                msgspec.structs.replace(
                    self.store.checkpoint, changelogs=dict(self.positions), caught_up_at_ms=self._clock.now_ms()
                )
            )
            taken = [overlay for overlay in self.overlays.values() if overlay.settled_entries]
            for overlay in taken:
                batch.changes[overlay.name] = overlay.take_settled()
            if not taken and not even_if_level:
                return
            try:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self.store.write, batch)
            except BaseException:
                for overlay in taken:
                    overlay.not_stored()
                raise
            for overlay in taken:
                overlay.stored()

    async def level(self) -> None:
        """The tables are restored: note it in the store."""
        self.is_level = True
        await self.write_store(even_if_level=True)

    async def close(self) -> None:
        """Write what is committed and let go of the store."""
        with anyio.CancelScope(shield=True):
            try:
                if self.is_level:
                    await self.write_store(even_if_level=True)
            except StateFullError as error:
                logger.warning("%s; what is missing is restored from the changelogs", error)
            await anyio.to_thread.run_sync(self.store.close)
