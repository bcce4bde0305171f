"""One global table in one worker: where its source is gone on with, and what becomes of what arrives.

What arrives is written to the table's store together with the position it reaches, so a restart reads only what is new.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import anyio
import anyio.to_thread

from streamflow.clock import Clock
from streamflow.errors import (
    FatalError,
    OffsetOutOfRangeError,
    RetriableError,
    StateFullError,
    StreamFlowError,
    UnknownTopicError,
)
from streamflow.log.api import Admin, Fetched, Reader, TopicDescription
from streamflow.model.record import TopicPartition
from streamflow.processing.global_table import GlobalTable
from streamflow.runtime.cancellation import call_user
from streamflow.runtime.changelogs import stale_after_ms
from streamflow.runtime.source_records import SourceRecords
from streamflow.runtime.status import GlobalTableStatus
from streamflow.sensors import Sensors
from streamflow.state.replica import Replica
from streamflow.state.store import Checkpoint, Store

logger = logging.getLogger("streamflow.tables")

_RETRY_S = 0.2
_RETRY_FULL_S = 2.0
_ANEW_POLLS = 10
_ANEW_POLL_S = 0.1
_TOLD_EVERY_S = 5.0
_MARK_EVERY_MS = 600_000


class GlobalCopy:
    """All of one global table in this worker; implements `processing.global_table.Copy`.

    Args:
        table: Its declaration.
        source: Its topic as it is in the log.
        store: Its store, open.
        cached_values: See `Replica`.
        set_aside: Moves the closed store away; takes a word and a text that say why.
        reader: The lane of all global tables.
        admin: For offsets.
        clock: Time.
        sensors: Metrics hooks.
    """

    def __init__(
        self,
        table: GlobalTable[Any, Any],
        source: TopicDescription,
        store: Store,
        cached_values: int,
        set_aside: Callable[[str, str], object],
        reader: Reader,
        admin: Admin,
        clock: Clock,
        sensors: Sensors,
    ) -> None:
        self.table = table
        self.source = source
        self.replica = Replica(
            table.name,
            keys=table.keys_in_order,
            values=table.held_values,
            store=store,
            cached_values=cached_values,
        )
        self.records = SourceRecords(table.name, table.source, table.keys_in_order, sensors)
        self.get = self.replica.get
        self.entries = self.replica.entries
        self.positions: dict[TopicPartition, int] = {}
        self.is_complete = False
        self._targets: dict[TopicPartition, int] = {}
        self._set_aside = set_aside
        self._reader = reader
        self._admin = admin
        self._clock = clock
        self._sensors = sensors
        self._level_at_ms = store.checkpoint.caught_up_at_ms
        self._moved = asyncio.Event()
        self.records_read = 0
        self._told_s = clock.monotonic()

    # --- what the table asks -----------------------------------------------------------------------------------

    @property
    def partitions(self) -> frozenset[int]:
        """The partitions of the source."""
        return frozenset(tp.partition for tp in self.positions)

    @property
    def lag(self) -> int:
        """Records between what is here and the known end of the source."""
        return sum(max(0, end - at) for at, end in self._known_ends())

    def _known_ends(self) -> Iterator[tuple[int, int]]:
        for tp, position in list(self.positions.items()):
            end = self._reader.end_offset(tp)
            yield position, self._targets.get(tp, position) if end is None else end

    async def caught_up(self, timeout_s: float) -> None:
        """Wait until everything that readers may see of the source now is here."""
        with anyio.fail_after(timeout_s):
            partitions = list(self.positions)
            while True:
                try:
                    ends = await self._admin.end_offsets(partitions)
                    break
                except RetriableError:
                    await anyio.sleep(_RETRY_S)
            while self.is_behind(ends):
                await self._moved.wait()

    def is_behind(self, ends: Mapping[TopicPartition, int]) -> bool:
        """Whether something below these offsets has not arrived."""
        return any(self.positions.get(tp, end) < end for tp, end in ends.items())

    def status(self) -> GlobalTableStatus:
        """A snapshot."""
        return GlobalTableStatus(
            self.table.name, self.table.source.name, self.is_complete, self.lag, self.records.passed_over
        )

    # --- where it starts ---------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Find out where to go on, drop what cannot be gone on from, and start to read."""
        partitions = [TopicPartition(self.source.name, number) for number in range(self.source.partitions)]
        starts, targets = await self._offsets(partitions)
        stored = self.replica.checkpoint.inputs
        positions = {tp: stored.get(str(tp), 0) for tp in partitions}
        why = self._unusable(positions, starts, targets)
        if why:
            logger.warning("global table %r: the local copy is not used: %s; it is read anew", self.table.name, why)
        # Schemas are loaded as records are read, so what was read with some is read again.
        if why or self.records.load_schemas or not any(positions.values()):
            positions = dict.fromkeys(partitions, 0)
            self._level_at_ms = self._clock.now_ms()
            await anyio.to_thread.run_sync(self.replica.clear, self._checkpoint({}))
        self._targets = targets
        self.positions = {tp: max(position, starts[tp]) for tp, position in positions.items()}
        for tp, position in self.positions.items():
            self._reader.add(tp, position)
            self._reader.ask(tp)
        self._wake()

    async def _offsets(
        self, partitions: Sequence[TopicPartition]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
        while True:
            try:
                return (
                    dict(await self._admin.start_offsets(partitions)),
                    dict(await self._admin.high_watermarks(partitions)),
                )
            except RetriableError as error:
                logger.warning("looking for the ends of %s: %s; trying again", self.source.name, error)
                await self._clock.sleep(_RETRY_S)

    def _unusable(
        self,
        positions: Mapping[TopicPartition, int],
        starts: Mapping[TopicPartition, int],
        targets: Mapping[TopicPartition, int],
    ) -> str:
        """Why the copy cannot be gone on with, in words; empty where it can."""
        if not any(positions.values()):
            return ""
        for tp, position in positions.items():
            if position > targets[tp]:
                return f"it reaches offset {position} of {tp}, which ends at {targets[tp]}"
            if 0 < position < starts[tp]:
                return f"it reaches offset {position} of {tp}, which begins at {starts[tp]}"
        away_ms = self._clock.now_ms() - self._level_at_ms
        behind = any(position < targets[tp] for tp, position in positions.items())
        if behind and away_ms > stale_after_ms(self.source):
            return f"it was last level with its source {away_ms / 3_600_000:.0f} h ago and may have missed deletions"
        return ""

    def is_restored(self) -> bool:
        """Whether everything that was in the source at the start is here."""
        return not self.is_behind(self._targets)

    # --- what arrives ------------------------------------------------------------------------------------------

    async def take(self, fetched: Fetched) -> bool:
        """Take what was fetched of a partition.

        Returns:
            Whether the table is read anew from here on.

        Raises:
            StreamFlowError: The table cannot be followed any further.
        """
        tp = fetched.tp
        if isinstance(fetched.error, OffsetOutOfRangeError):
            await self.start_anew(f"{fetched.error}")
            return True
        if isinstance(fetched.error, UnknownTopicError):
            if (found := await self._made_anew()) is not None:
                self.source = found
                await self.start_anew(f"topic {tp.topic!r} was made anew")
                return True
            raise UnknownTopicError(
                f"{fetched.error}: topic {tp.topic!r}, the source of global table {self.table.name!r}, was deleted "
                "while this worker followed it. If it shall be there, start the worker again: it makes the topic "
                "anew, empty; else take the table out of the app"
            ) from fetched.error
        if fetched.error is not None:
            raise fetched.error
        self._reader.ask(tp)  # the next one is fetched while this one is written
        if fetched.batches:
            changes = await self.records.read(tp, fetched.batches)
            await self._write(tp, fetched.next_offset, changes.by_key)
            if not self.is_complete:
                self._tell(changes.records)
        self.positions[tp] = fetched.next_offset
        self._wake()
        return False

    async def _made_anew(self) -> TopicDescription | None:
        """The topic that has the name now; None where there is none, a moment after the old one was deleted."""
        name = self.source.name
        looks, told = 0, False
        while looks < _ANEW_POLLS:
            try:
                found = (await self._admin.describe([name])).get(name)
            except RetriableError as error:
                if not told:
                    logger.warning("looking whether topic %s was made anew: %s; trying until it succeeds", name, error)
                told = True
                await self._clock.sleep(_RETRY_S)
                continue
            if found is not None:
                return found
            looks += 1
            await anyio.sleep(_ANEW_POLL_S)
        return None

    async def _write(self, tp: TopicPartition, position: int, changes: Mapping[bytes, bytes | None]) -> None:
        reached = {**self.positions, tp: position}
        ends = {each: self._reader.end_offset(each) for each in reached}
        if all(end is not None and reached[each] >= end for each, end in ends.items()):
            self._level_at_ms = self._clock.now_ms()
        await self._patiently(lambda: self.replica.write(changes, self._checkpoint(reached)))

    async def _patiently(self, write: Callable[[], None]) -> None:
        """Write, and wait for room where there is none: the table is then behind, and nothing is lost."""
        told = False
        while True:
            try:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(write)
                return
            except StateFullError as error:
                if not told:
                    logger.warning("%s; global table %r is not kept up to date until then", error, self.table.name)
                told = True
                await self._clock.sleep(_RETRY_FULL_S)

    def _checkpoint(self, positions: Mapping[TopicPartition, int]) -> Checkpoint:
        return Checkpoint(
            inputs={str(tp): position for tp, position in positions.items()}, caught_up_at_ms=self._level_at_ms
        )

    def _tell(self, records: int) -> None:
        self.records_read += records
        self._sensors.restored(self.table.name, records)
        if self._clock.monotonic() - self._told_s > _TOLD_EVERY_S:
            self._told_s = self._clock.monotonic()
            logger.info("global table %r: %d records read, %d to go", self.table.name, self.records_read, self.lag)

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def wait_moved(self) -> None:
        """Wait until something has arrived."""
        await self._moved.wait()

    # --- changes of the topic ----------------------------------------------------------------------------------

    async def start_anew(self, why: str) -> None:
        """Drop everything and read the source from its beginning; readers see it fill."""
        logger.error("global table %r is read anew, and incomplete until then: %s", self.table.name, why)
        for tp in self.positions:
            self._reader.remove(tp)
        self.positions = dict.fromkeys(self.positions, 0)  # so that nobody takes it for caught up, and says so on disk
        self._level_at_ms = self._clock.now_ms()
        await self._patiently(lambda: self.replica.clear(self._checkpoint({})))
        await self.begin()

    async def look(self, found: TopicDescription) -> None:
        """Follow partitions that were added, a topic that was made anew, and time."""
        if found.topic_id != self.source.topic_id:
            self.source = found
            await self.start_anew(f"topic {found.name!r} was made anew")
            return
        for number in range(self.source.partitions, found.partitions):
            tp = TopicPartition(found.name, number)
            self.positions[tp] = 0
            self._reader.add(tp, 0)
            self._reader.ask(tp)
        self.source = found
        now_ms = self._clock.now_ms()
        if self.is_complete and not self.lag and now_ms - self._level_at_ms > _MARK_EVERY_MS:
            self._level_at_ms = now_ms
            await self._patiently(lambda: self.replica.write({}, self._checkpoint(self.positions)))

    # --- life --------------------------------------------------------------------------------------------------

    async def complete(self) -> None:
        """All of it is here: it may be read.

        Raises:
            FatalError: The app's `on_recover` raised.
        """
        self.is_complete = True
        self.table.copies.insert(0, self)
        if self.table.on_recover is None:
            return
        try:
            await call_user(self.table.on_recover)
        except StreamFlowError:
            raise
        except Exception as exc:
            raise FatalError(
                f"on_recover of global table {self.table.name!r} raised {type(exc).__name__}: {exc}"
            ) from exc

    async def close(self) -> None:
        """Let go of it, with a note of how far it is; a damaged copy is set aside, and read anew by the next start."""
        if self in self.table.copies:
            self.table.copies.remove(self)
        with anyio.CancelScope(shield=True):
            try:
                if self.is_complete and not self.lag and self.replica.damage is None:
                    self._level_at_ms = self._clock.now_ms()
                    checkpoint = self._checkpoint(self.positions)
                    await anyio.to_thread.run_sync(self.replica.write, {}, checkpoint)
            except StateFullError as error:
                logger.warning("%s; global table %r reads a little more at the next start", error, self.table.name)
            finally:
                await anyio.to_thread.run_sync(self.replica.close)
                if (damage := self.replica.damage) is not None:
                    await anyio.to_thread.run_sync(self._set_aside, damage.reason, str(damage))
