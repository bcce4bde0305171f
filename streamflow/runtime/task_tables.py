"""The tables of one task: overlays over its store, sealed into changelog records at each commit.

Invariants: what is sealed together is committed together, in order; the store takes only what the log has committed,
with the changelog offsets that cover it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from streamflow.clock import Clock
from streamflow.errors import ClosedError, StateCorruptedError, StateFullError
from streamflow.log.api import OffsetMark
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.runtime.assignment.cluster import UNKNOWN_LAG
from streamflow.runtime.mark_check import incarnation_of, serializer_of
from streamflow.runtime.outputs import Outputs
from streamflow.runtime.status import RestoreStatus
from streamflow.state.overlay import Append, Overlay, Record
from streamflow.state.read_only_stage import ReadOnlyStage
from streamflow.state.shared_stage import SharedStage, Waiting
from streamflow.state.stage import PlainStage, Stage
from streamflow.state.store import Checkpoint, Store, StoreBatch
from streamflow.state.sweep import Sweep
from streamflow.state.undo import Undo
from streamflow.state.values import Values

logger = logging.getLogger("streamflow.tables")

CheckHome = Callable[[Table[Any, Any], Any, bytes], None]
SetAside = Callable[[str, str], object]

_STORE_EVERY_S = 5.0
_STORE_FROM_ENTRIES = 50_000
_MAX_UNSTORED = 400_000
_ROOM_POLL_S = 0.25
_MAX_KEY_BYTES = 64 * 1024


@dataclass(slots=True)
class Restoring:
    """How far a task's restore is.

    Attributes:
        since_s: Monotonic time at which it began.
        expected: Offsets that the store lacked when it was taken, as far as that was known.
        records: Changelog records read.
        remaining: Offsets that are still to be read; None until the log has been asked how many.
    """

    clock: Clock
    since_s: float
    expected: int = UNKNOWN_LAG
    records: int = 0
    remaining: int | None = None

    @property
    def lag(self) -> int:
        """How far behind the tables are, to say to others."""
        return self.expected if self.remaining is None else self.remaining

    def moved(self, offsets: int, records: int) -> None:
        """So many offsets were passed, and that many of them were records."""
        self.remaining = max(0, (self.remaining or 0) - offsets)
        self.records += records

    def status(self) -> RestoreStatus:
        """A snapshot."""
        per_s = self.records / max(1e-6, self.clock.monotonic() - self.since_s)
        return RestoreStatus(self.records, self.remaining, per_s)


def _is_in_source(_: Iterable[Record]) -> None:
    """What a topic fills has no changelog of its own."""


class TaskTables:
    """The tables of one task.

    Args:
        tables: Their declarations.
        partition: The task's partition.
        store: Its store, open.
        outputs: The task's outputs, which the changelog records join.
        clock: Time.
        live_entries: How many values each table keeps decoded, about.
        check_home: Told table and key, and the key's bytes, of keys that are new: raises for one of another partition.
        stale_after_ms: By table: how long the store may have been away from the changelog.
        set_aside: Moves the closed store away; takes a word and a text that say why.
        damaged: Told, once and from any thread, that the store cannot be used.

    Attributes:
        restoring: How far the restore is.
        damage: Why the store cannot be used any more; None while it can.
        is_pinned: Whether the last commit says how far each changelog is committed (at least once).
        overlays: By table name.
        sweeps: Of the tables whose values expire.
        incarnations: By table name: the beginning of its changelog's topic id.
        serializers: By table name: how its changelog is written, see `CommitMark`.
        positions: By table name: the offset of changelog or source that follows what is committed.
        ends: By table name: the offset that the next record of the changelog gets, unless others write there.
        is_level: Whether they were restored, so that the store's checkpoint may be written.
        left_at: How far the store was when it was closed; None before that, and where it cannot be used.
        undo: What the turn in progress has written straight into the tables.
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
        *,
        stale_after_ms: Mapping[str, int],
        set_aside: SetAside,
        damaged: Callable[[], None],
    ) -> None:
        self.stale_after_ms = stale_after_ms
        self.damage: StateCorruptedError | None = None
        self.restoring = Restoring(clock, clock.monotonic())
        self.is_pinned = False
        self._set_aside = set_aside
        self._damaged = damaged
        self.tables = {table.name: table for table in tables}
        self.partition = partition
        self.store = store
        self.overlays = {table.name: self._overlay(table, outputs, live_entries, check_home) for table in tables}
        self.sweeps = [Sweep(overlay) for overlay in self.overlays.values() if overlay.ttl_ms is not None]
        self.positions = dict(store.checkpoint.changelogs)
        self.ends: dict[str, int] = {}
        self._outputs = outputs
        self._clock = clock
        self._waiting = {name: Waiting(overlay) for name, overlay in self.overlays.items()}
        self._by_changelog = {
            TopicPartition(table.changelog.name, partition): table.name for table in tables if table.source is None
        }
        ids = store.identity.tables
        self.incarnations = {name: incarnation_of(ids[name]) for name in self._by_changelog.values()}
        self.serializers = {name: serializer_of(ids[name]) for name in self.incarnations}
        self._by_source: dict[TopicPartition, list[str]] = {}
        for table in tables:
            if table.source is not None:
                self._by_source.setdefault(TopicPartition(table.source.name, partition), []).append(table.name)
        # Which tables each commit that is under way holds, the oldest first.
        self._sealed: deque[list[Overlay]] = deque()
        self._stored_at_s = clock.monotonic()
        self._storing = anyio.Lock()
        self._closed = False
        self.left_at: Checkpoint | None = None
        self.undo = Undo()
        self._has_room = asyncio.Event()
        self.is_level = False

    def _overlay(self, table: Table[Any, Any], outputs: Outputs, live_entries: int, check_home: CheckHome) -> Overlay:
        max_record_bytes = outputs.to(table.changelog).target.max_record_bytes
        max_key_bytes = largest_key(max_record_bytes)
        return Overlay(
            table.name,
            self.partition,
            keys=table.keys_in_order,
            key_codec=table.key_codec,
            values=Values(table.name, table.changelog.value_codec, max_record_bytes - max_key_bytes),
            store=self.store,
            live_entries=live_entries,
            ttl_ms=None if table.ttl_s is None else round(table.ttl_s * 1000),
            check_home=partial(check_home, table),
            damaged=self.is_damaged,
            max_key_bytes=max_key_bytes,
        )

    def is_damaged(self, damage: StateCorruptedError) -> None:
        """The store cannot be used any more."""
        if self.damage is None:
            self.damage = damage
            self._damaged()

    def changelogs(self) -> Mapping[TopicPartition, str]:
        """The changelog partitions, with the names of their tables; those of tables that topics fill are none."""
        return self._by_changelog

    # --- turns -------------------------------------------------------------------------------------------------

    def stages(
        self, names: Sequence[str], touched: Callable[[Stage], None], number: Callable[[], int], *, shared: bool
    ) -> dict[str, Stage]:
        """What the turns of one feed see of the tables, by their full names.

        Args:
            names: The agent's tables.
            touched: See `Stage`.
            number: See `SharedStage`.
            shared: Whether several turns of the task may be in progress at once.
        """
        return {self.tables[each].full_name: self._stage_of(each, touched, number, shared=shared) for each in names}

    def _stage_of(
        self, name: str, touched: Callable[[Stage], None], number: Callable[[], int], *, shared: bool
    ) -> Stage:
        if self.tables[name].source is not None:
            return ReadOnlyStage(self._waiting[name], number)
        if shared:
            return SharedStage(self._waiting[name], touched, number)
        overlay = self.overlays[name]
        is_plain = overlay.values.are_objects and overlay.ttl_ms is None
        return PlainStage(overlay, self.undo) if is_plain else Stage(overlay, touched)

    def waiting_of(self, name: str) -> Waiting:
        """What the task's turns share of a table."""
        return self._waiting[name]

    @property
    def waits_for_turns(self) -> bool:
        """Whether turns that are in progress have written something, or done ones what has joined no table yet."""
        written = (each for name, each in self._waiting.items() if self.tables[name].source is None)
        return not all(waiting.is_empty for waiting in written)

    # --- commits -----------------------------------------------------------------------------------------------

    @property
    def dirty_entries(self) -> int:
        """How many keys were written and are in no commit yet."""
        return sum(len(overlay.dirty) for overlay in self.overlays.values()) - self.undo.new_keys

    def seal(self) -> bool:
        """Close what was written since the last commit and add it to the outputs as changelog records.

        Returns:
            Whether there was anything; then `settle` is owed.
        """
        now_ms = self._clock.now_ms()
        with self.undo.aside():
            sealed = [overlay for name, overlay in self.overlays.items() if overlay.seal(self._appender(name), now_ms)]
        if sealed:
            self._sealed.append(sealed)
        return bool(sealed)

    def _appender(self, name: str) -> Append:
        if self.tables[name].source is not None:
            return _is_in_source
        return self._outputs.to(self.tables[name].changelog).partitions[self.partition].extend

    def settle(self, ends: Mapping[TopicPartition, int], times: Mapping[str, int]) -> None:
        """The log has committed what was sealed first.

        Args:
            ends: The offset after the last record, per partition that was written.
            times: Stream times that were committed with it.
        """
        for overlay in self._sealed.popleft():
            overlay.settle()
        self.positions.update(self.positions_after(ends))
        for name, time_ms in times.items():
            self.overlays[name].committed_stream_time_ms = time_ms

    def reached(self, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        """The log has these offsets of the task: its source tables are what their topics say up to there."""
        for tp, names in self._by_source.items():
            if tp in offsets:
                self.positions.update(dict.fromkeys(names, offsets[tp].offset))

    def positions_after(self, ends: Mapping[TopicPartition, int]) -> dict[str, int]:
        """Where the changelogs stand once these offsets are committed; every table that has one is in it."""
        return {name: max(ends.get(tp, 0), self.positions.get(name, 0)) for tp, name in self._by_changelog.items()}

    def times(self) -> dict[str, int]:
        """Stream time of the tables whose values expire."""
        return {name: each.stream_time_ms for name, each in self.overlays.items() if each.ttl_ms is not None}

    def committed_times(self) -> dict[str, int]:
        """`times` as of the last commit."""
        return {name: each.committed_stream_time_ms for name, each in self.overlays.items() if each.ttl_ms is not None}

    # --- the store ---------------------------------------------------------------------------------------------

    @property
    def unstored_entries(self) -> int:
        """How many committed values wait for the store."""
        return sum(overlay.settled_entries for overlay in self.overlays.values())

    @property
    def is_backed_up(self) -> bool:
        """Whether so many committed values wait for the store that no more should come."""
        return self.unstored_entries >= _MAX_UNSTORED

    async def has_room(self) -> None:
        """Wait until the store has taken what waits for it, or a moment."""
        self._has_room.clear()
        with anyio.move_on_after(_ROOM_POLL_S):
            await self._has_room.wait()

    @property
    def is_due(self) -> bool:
        """Whether the store should be written now."""
        waiting = self.unstored_entries
        since_s = self._clock.monotonic() - self._stored_at_s
        return waiting >= _STORE_FROM_ENTRIES or (waiting > 0 and since_s > _STORE_EVERY_S)

    async def write_store(self, *, even_if_level: bool = False) -> None:
        """Write to the store what is committed and not there yet, in a thread.

        Args:
            even_if_level: Write the checkpoint also where nothing waits.

        Raises:
            StateFullError: No room; nothing is lost, and it may be tried again. A store that turns out to be damaged
                raises nothing: the task is told.
        """
        async with self._storing:
            if self._closed or self.damage is not None:
                return
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
            except BaseException as error:
                for overlay in taken:
                    overlay.not_stored()
                if not isinstance(error, StateCorruptedError):
                    raise
                self.is_damaged(error)
            else:
                for overlay in taken:
                    overlay.stored()
                self._has_room.set()

    async def level(self) -> None:
        """The tables are restored: note it in the store."""
        self.is_level = True
        try:
            await self.write_store(even_if_level=True)
        except StateFullError as error:
            logger.warning("%s; the store is written when there is room", error)

    async def close(self) -> None:
        """Write what is committed and let go of the store; one that is damaged is set aside."""
        with anyio.CancelScope(shield=True):
            try:
                if self.is_level:
                    await self.write_store(even_if_level=True)
            except StateFullError as error:
                logger.warning("%s; what is missing is restored from the changelogs", error)
            finally:
                async with self._storing:
                    self._closed = True
                    with suppress(ClosedError):  # a worker that ends has closed all stores that it did not wait for
                        self.left_at = self.store.checkpoint if self.damage is None else None
                    await anyio.to_thread.run_sync(self.store.close)
                    if self.damage is not None:
                        await anyio.to_thread.run_sync(self._set_aside, self.damage.reason, str(self.damage))


def largest_key(max_record_bytes: int) -> int:
    """How many bytes a table's key may have; the rest of a record is for the value.

    Args:
        max_record_bytes: What the changelog takes, key and value together.
    """
    return min(_MAX_KEY_BYTES, max_record_bytes // 2)
