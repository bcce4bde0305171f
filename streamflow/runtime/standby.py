"""One standby: the store of a task that runs elsewhere follows its changelogs, so that the task can go on here at once.

It never runs ahead of what a restore can go on from. Changelogs that are committed together with the offsets (exactly
once) are followed as far as readers see them; others up to where the task's last commit says that they are committed,
since what lies behind may be taken back; topics that fill tables up to the task's committed offsets.

The store is where the task's would be, and has one user: a task that comes is handed the open store.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from streamflow.clock import Clock
from streamflow.errors import (
    OffsetOutOfRangeError,
    RetriableError,
    StateCorruptedError,
    StateError,
    StateFullError,
    StreamFlowError,
    TopologyError,
)
from streamflow.log.api import Admin, Fetched, Reader
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.changelog_records import ChangelogRecords, check_position, pieces
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.fetch_places import FetchPlaces
from streamflow.runtime.followed import Filled, Marks, Span, is_followed, limit_of
from streamflow.runtime.local_state import LocalState, LocalStates
from streamflow.runtime.source_records import SourceRecords
from streamflow.runtime.status import StandbyStatus
from streamflow.sensors import Sensors
from streamflow.state.store import Checkpoint, StoreBatch

logger = logging.getLogger("streamflow.standbys")

_RETRY_S = 0.2
_RETRY_FULL_S = 1.0
_FULL_FOR_S = 60.0
_TRY_AGAIN_S = 60.0
_PAUSE_S = 0.2
"""Pause of one that is level: many small commits of the task are then one fetch and one write here."""
_LOOK_S = 30.0
_NOTE_EVERY_MS = 600_000
_NEAR = 1_000
"""Who lacks no more offsets than this needs no place: such fetches are small, and mostly wait for what comes."""
_PARKED_S = 5.0
_LOOKS = 5
"""Commits of transactions are seen a moment later: how often it is looked whether a table is ahead of its source."""
_SILENT_MS = 15_000
"""Three times as long as the ends of changelogs are looked up apart from one another."""
_MAX_REBUILDS = 3
_REBUILDS_WITHIN_S = 600.0


@dataclass(frozen=True, slots=True)
class StandbySurroundings:
    """What the standbys of a worker share.

    Attributes:
        local: Opens stores.
        reader: The lane of all standbys.
        places: For fetches of what they lack.
        admin: For offsets.
        clock: Time.
        sensors: Metrics hooks.
        fail: Told what stops the worker.
    """

    local: LocalStates
    reader: Reader
    places: FetchPlaces
    admin: Admin
    clock: Clock
    sensors: Sensors
    fail: Callable[[StreamFlowError], None]


class Standby:
    """Follows the changelogs of one task; `run` does, until it is cancelled by `close` or `hand_over`.

    Args:
        sub: The task's sub-topology, which has tables.
        partition: The task's partition.
        sources: The task's source partitions.
        shared: What all standbys share.

    Attributes:
        name: The task's name.
        is_warm_up: Whether the task is to move here as soon as this is level.
        records: How many records were applied.
        given_up: Why nothing is followed at present, which is tried again from time to time; empty while it is.
        state: The store, while it is open here.
        rebuilds: How often its store was set aside.
        left_at: How far it was when it was closed; None before that, and where there is none.
    """

    def __init__(
        self,
        sub: SubTopology,
        partition: int,
        sources: Sequence[TopicPartition],
        shared: StandbySurroundings,
    ) -> None:
        self.sub_topology = sub
        self.partition = partition
        self.name = f"{sub.name}-{partition}"
        self.is_warm_up = False
        self.records = 0
        self.rebuilds = 0
        self.given_up = ""
        self.state: LocalState | None = None
        self.left_at: Checkpoint | None = None
        self._sources = list(sources)
        self._local = shared.local
        self._reader = shared.reader
        self._places = shared.places
        self._admin = shared.admin
        self._clock = shared.clock
        self._sensors = shared.sensors
        self._fail = shared.fail
        self._mark: CommitMark | None = None
        self._marks: Marks | None = None
        self._marks_at_ms = 0
        self._spans: dict[TopicPartition, Span] = {}
        self._fetched: deque[Fetched] = deque()
        self._news = anyio.Event()
        self._rebuilt: deque[float] = deque(maxlen=_MAX_REBUILDS)
        self._full_since_s: float | None = None
        self._is_handed_over = False
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()

    # --- what others ask ---------------------------------------------------------------------------------------

    @property
    def partitions(self) -> Iterator[TopicPartition]:
        """What is followed now."""
        return iter(self._spans)

    @property
    def unlimited(self) -> Iterator[TopicPartition]:
        """What is followed as far as it goes: where that is, is to be looked up for it."""
        return (span.tp for span in self._spans.values() if span.limit is None)

    @property
    def is_limited(self) -> bool:
        """Whether it waits for the task's commits to say how far to follow."""
        return self._mark is None or not self._spans or any(span.limit is not None for span in self._spans.values())

    @property
    def lag(self) -> int | None:
        """Offsets between what is here and what the task has committed; None while that is not known."""
        if self._marks is None or self.given_up:
            return None
        if self._mark is None:
            return 0  # nothing was committed yet: there is nothing to have
        if self.state is None or not self._spans:
            return 0 if self.state is not None and not any(map(is_followed, self.state.tables)) else None
        return sum(max(0, self._end(span) - each.position) for span, each in self._each())

    def _end(self, span: Span) -> int:
        if span.limit is not None:
            return span.limit
        return max(span.end, self._reader.end_offset(span.tp) or 0)

    @property
    def has_no_room(self) -> bool:
        """Whether it has been waiting for room on the disk for long."""
        since_s = self._full_since_s
        return since_s is not None and self._clock.monotonic() - since_s >= _FULL_FOR_S

    @property
    def is_stuck(self) -> bool:
        """Whether it does not get on, and others had better have the task."""
        return bool(self.given_up) or self.has_no_room

    @property
    def is_silent(self) -> bool:
        """Whether nothing has been heard for long, so that nobody knows how far this is behind."""
        heard_at_ms = min((span.heard_at_ms for span in self._spans.values()), default=self._marks_at_ms)
        return self._clock.now_ms() - heard_at_ms > _SILENT_MS

    @property
    def positions(self) -> dict[str, int]:
        """By table: the offset that follows what the store has."""
        return {each.table.name: each.position for _, each in self._each()}

    @property
    def times(self) -> Mapping[str, int]:
        """By table whose values expire: the task's stream time, as of the commit that was heard of last."""
        return {} if self._mark is None else self._mark.times

    def status(self) -> StandbyStatus:
        """A snapshot."""
        return StandbyStatus(self.name, self.is_warm_up, self.lag, self.records, self.given_up)

    # --- what it is told ---------------------------------------------------------------------------------------

    def heard(self, marks: Marks, at_ms: int) -> None:
        """Take note of what the group has committed; it was looked up after this standby was made.

        Args:
            marks: Its committed offsets.
            at_ms: When they were looked up; wall clock.
        """
        mark = CommitMark.of_task({tp: marks.get(tp) for tp in self._sources})
        if mark is not None:  # one that was there and is not any more expired, which says nothing about the changelogs
            self._mark, self._marks_at_ms = mark, at_ms
        self._marks = marks
        self._set_limits()
        self._news.set()

    def ends_seen(self, ends: Mapping[TopicPartition, int], at_ms: int) -> None:
        """Take note of where what it follows ends.

        Args:
            ends: High watermarks.
            at_ms: When they were looked up; wall clock.
        """
        for tp, end in ends.items():
            span = self._spans.get(tp)
            if span is not None:
                span.end = max(span.end, end)
                if span.limit is None:
                    span.seen(end, at_ms)

    def _set_limits(self) -> None:
        mark, marks = self._mark, self._marks
        if mark is None or marks is None:
            return
        for span in self._spans.values():
            span.limit = limit_of(span.filled[0].table, self.partition, mark, marks)
            if span.limit is not None:
                span.seen(span.limit, self._marks_at_ms)

    def take(self, fetched: Fetched) -> None:
        """What was fetched of a partition that it follows."""
        self._fetched.append(fetched)
        self._news.set()

    # --- life --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow until cancelled; what goes wrong with this store alone is told, and tried again after a while."""
        try:
            with self._scope:
                while True:
                    try:
                        await self._follow_on()
                    except (TopologyError, StateError) as error:
                        await self._give_up(error)
                    await self._clock.sleep(_TRY_AGAIN_S)
        except StreamFlowError as error:
            self.given_up = str(error)
            self._fail(error)
        finally:
            with anyio.CancelScope(shield=True):
                await self._end_following()
            self._ended.set()

    async def _follow_on(self) -> None:
        while True:
            try:
                await self._follow()
            except StateCorruptedError as error:
                self.rebuilds += 1
                await self._set_aside(error)
                now_s = self._clock.monotonic()
                if len(self._rebuilt) == _MAX_REBUILDS and now_s - self._rebuilt[0] < _REBUILDS_WITHIN_S:
                    raise
                self._rebuilt.append(now_s)

    async def _give_up(self, error: StreamFlowError) -> None:
        if self.given_up != str(error):
            logger.warning(
                "standby of task %s is given up, and tried again every %.0f s: %s", self.name, _TRY_AGAIN_S, error
            )
        self.given_up = str(error)
        with anyio.CancelScope(shield=True):
            await self._end_following()

    async def hand_over(self) -> LocalState | None:
        """End the following, and give the open store to the task; None where it cannot be used."""
        self._is_handed_over = True
        await self._cancelled()
        state, self.state = self.state, None
        return state

    async def close(self) -> None:
        """End the following and let go of the store."""
        await self._cancelled()

    async def _cancelled(self) -> None:
        self._scope.cancel()
        with anyio.CancelScope(shield=True):
            await self._ended.wait()

    async def _end_following(self) -> None:
        """Note how far the store is, and close it unless it is handed over."""
        if self.state is None:
            return
        damage: StateCorruptedError | None = None
        try:
            if self._spans:
                await self._write_once({}, {})
        except StateCorruptedError as error:
            damage = error
        except StateError as error:
            logger.warning("%s; a little more is restored from the changelogs", error)
        self._let_go()
        if damage is not None:
            await self._set_aside(damage)
        elif not self._is_handed_over:
            self.left_at = self.state.store.checkpoint
            await self._close_store()

    async def _close_store(self) -> LocalState | None:
        state, self.state = self.state, None
        if state is not None:
            await anyio.to_thread.run_sync(state.store.close)
        return state

    async def _set_aside(self, damage: StateCorruptedError) -> None:
        logger.warning("standby of task %s: %s; its store is set aside", self.name, damage)
        self._let_go()
        with anyio.CancelScope(shield=True):
            state, self.left_at = await self._close_store(), None
            if state is not None:
                await anyio.to_thread.run_sync(state.set_aside, damage.reason, str(damage))

    def _let_go(self) -> None:
        for tp, span in self._spans.items():
            self._reader.remove(tp)
            self._leave_place(span)
        self._fetched.clear()
        self._spans = {}

    # --- following ---------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while self._mark is None or self._marks is None:
            await self._wait()
        await self._open(self._mark)
        await self._begin()
        self.given_up = ""
        while True:
            self._ask()
            await self._wait()
            self._local.check(self.sub_topology, self.partition, self._mark)
            self._check_limits()
            while self._fetched:
                await self._take(self._fetched.popleft())
            self._leave_parked()
            if not self.lag:
                await self._note_level()
                await anyio.sleep(_PAUSE_S)

    async def _wait(self) -> None:
        """Wait for what is fetched or heard, or for a while."""
        if not self._news.is_set():
            with anyio.move_on_after(_LOOK_S):
                await self._news.wait()
        self._news = anyio.Event()

    def _ask(self) -> None:
        for span in self._spans.values():
            is_wanted = span.limit is None or span.position < span.limit
            if is_wanted and (span.asked_at_ms is not None or self._has_place(span)):
                if span.asked_at_ms is None:
                    span.asked_at_ms = self._clock.now_ms()
                self._reader.ask(span.tp)

    def _has_place(self, span: Span) -> bool:
        """Whether one more fetch may be asked for now."""
        if self._end(span) - span.position <= _NEAR:
            return True
        if span.place_since_s is None and self._places.take(self._wake):
            span.place_since_s = self._clock.monotonic()
        return span.place_since_s is not None

    def _leave_place(self, span: Span) -> None:
        if span.place_since_s is not None:
            span.place_since_s = None
            self._places.give_back()

    def _leave_parked(self) -> None:
        """What waits for the end of a transaction has nothing on its way that takes a place."""
        due_s = self._clock.monotonic() - _PARKED_S
        for span in self._spans.values():
            if span.asked_at_ms is not None and span.place_since_s is not None and span.place_since_s < due_s:
                self._leave_place(span)

    def _wake(self) -> None:
        self._news.set()

    async def _open(self, mark: CommitMark) -> None:
        async def attempt() -> None:
            with anyio.CancelScope(shield=True):
                self.state = await self._local.open(self.sub_topology, self.partition, mark)

        await self._until_there_is_room(attempt)

    async def _until_there_is_room(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Do what needs room on the disk; a full one is waited out."""
        try:
            while True:
                try:
                    return await attempt()
                except StateFullError as error:
                    if self._full_since_s is None:
                        self._full_since_s = self._clock.monotonic()
                        logger.warning("%s; the standby of task %s goes on when there is room", error, self.name)
                await self._clock.sleep(_RETRY_FULL_S)
        finally:
            self._full_since_s = None

    async def _begin(self) -> None:
        """Find out where to go on, drop what cannot be gone on from, and start to read."""
        state, mark = self.state, self._mark
        assert state is not None
        assert mark is not None
        now_ms = self._clock.now_ms()
        level_at_ms = min(now_ms, state.store.checkpoint.caught_up_at_ms)
        tables = {table.name: table for table in state.tables if is_followed(table)}
        sources = {name: TopicPartition(table.changelog.name, self.partition) for name, table in tables.items()}
        starts, ends = await self._offsets(list(set(sources.values())))
        spans: dict[TopicPartition, Span] = {}
        for name, table in tables.items():
            tp = sources[name]
            limit = await self._believed_limit(table, mark)
            position = await self._checked(table, tp, starts[tp], ends[tp], limit)
            span = spans.setdefault(tp, Span(tp, [], ends[tp], limit))
            reads, first = self._reads(table), max(position, starts[tp])
            # An empty one has nothing that may have been deleted.
            span.filled.append(Filled(table, reads, first, level_at_ms if position else now_ms, not position))
        for span in spans.values():
            if span.limit is None:
                span.seen(span.end, now_ms)
        self._spans = spans
        self._set_limits()
        for span in spans.values():
            self._reader.add(span.tp, span.position)

    async def _believed_limit(self, table: Table[Any, Any], mark: CommitMark) -> int | None:
        """The limit of a table, after some more looks where the store is ahead of its source.

        The task that has just left may have committed what those who look do not see yet.
        """
        assert self.state is not None
        position = self.state.store.checkpoint.changelogs.get(table.name, 0)
        looks = 0
        while True:
            seen = self._marks
            assert seen is not None
            limit = limit_of(table, self.partition, mark, seen)
            if table.source is None or limit is None or position <= limit or looks == _LOOKS:
                return limit
            looks += 1
            while self._marks is seen:
                await self._wait()

    def _reads(self, table: Table[Any, Any]) -> ChangelogRecords | SourceRecords:
        if table.source is None:
            return ChangelogRecords(table)
        return SourceRecords(table.name, table.source, table.keys_in_order, self._sensors)

    async def _checked(
        self, table: Table[Any, Any], tp: TopicPartition, start: int, end: int, limit: int | None
    ) -> int:
        """Where a table can go on, 0 where it is filled anew.

        Raises:
            StateCorruptedError: The store cannot go on; see `check_position`.
        """
        state = self.state
        assert state is not None
        position = state.store.checkpoint.changelogs.get(table.name, 0)
        stale_after_ms = state.stale_after_ms[table.name]
        away_ms = self._clock.now_ms() - state.store.checkpoint.caught_up_at_ms
        committed = end if limit is None else limit
        try:
            check_position(tp, position, start, end, away_ms, stale_after_ms, committed=committed)
        except StateCorruptedError as error:
            if table.source is None:
                raise
            logger.warning("standby of task %s: table %r is filled anew: %s", self.name, table.name, error)
            await anyio.to_thread.run_sync(state.store.clear, table.name)
            return 0
        return position

    async def _offsets(
        self, partitions: Sequence[TopicPartition]
    ) -> tuple[Mapping[TopicPartition, int], Mapping[TopicPartition, int]]:
        while True:
            try:
                return await self._admin.start_offsets(partitions), await self._admin.high_watermarks(partitions)
            except RetriableError as error:
                logger.warning("looking for the ends of changelogs: %s; trying again", error)
                await self._clock.sleep(_RETRY_S)

    def _check_limits(self) -> None:
        """A changelog that was committed with the offsets may not be so any more, from where it was known to be on."""
        for span, each in self._each():
            if each.table.source is None and span.limit is not None and each.position > span.limit:
                raise StateCorruptedError(
                    f"it reaches offset {each.position} of changelog {span.tp}, which is committed up to {span.limit}",
                    reason="ahead",
                )

    # --- what arrives ------------------------------------------------------------------------------------------

    async def _take(self, fetched: Fetched) -> None:
        span = self._spans[fetched.tp]
        if fetched.error is not None:
            if isinstance(fetched.error, OffsetOutOfRangeError):
                raise StateCorruptedError(f"while it was followed, {fetched.error}", reason="behind")
            raise fetched.error
        if self._is_stale(span, fetched):
            logger.warning("standby of task %s: nothing was heard of %s for long", self.name, span.tp)
            self._let_go()
            return await self._begin()
        span.answered(fetched.end_offset)
        limit = sys.maxsize if span.limit is None else span.limit
        for piece in pieces(fetched):
            await self._apply(span, piece, min(piece.next_offset, limit))
        self._leave_place(span)
        if fetched.next_offset > limit:
            self._reader.remove(span.tp)
            self._reader.add(span.tp, span.position)

    def _is_stale(self, span: Span, fetched: Fetched) -> bool:
        """Whether deletions may have been missed while nothing was heard; `_begin` tells what to do about it."""
        assert self.state is not None
        now_ms, stale_after_ms = self._clock.now_ms(), self.state.stale_after_ms
        return any(
            each.position < fetched.next_offset and now_ms - each.level_at_ms > stale_after_ms[each.table.name]
            for each in span.filled
        )

    async def _apply(self, span: Span, piece: Fetched, reached: int) -> None:
        """Put fetched records into the store, with the position they reach."""
        behind = [each for each in span.filled if each.position < reached]
        changes: dict[str, dict[bytes, bytes | None]] = {}
        for each in behind:
            if isinstance(each.reads, SourceRecords):
                of_source = await each.reads.read(span.tp, piece.batches, below=reached)
                by_key, records = of_source.by_key, of_source.records
            else:
                read = await anyio.to_thread.run_sync(partial(each.reads.read, piece.batches, below=reached))
                by_key, records = read.by_key, read.records - len(read.beyond)
            if by_key:
                changes[each.table.name] = by_key
            self.records += records
            self._sensors.standby_applied(each.table.name, records)
        if changes:
            await self._write(changes, {each.table.name: reached for each in behind})
        for each in behind:
            each.reached(reached)

    async def _write(self, changes: Mapping[str, dict[bytes, bytes | None]], reached: Mapping[str, int]) -> None:
        await self._until_there_is_room(partial(self._write_once, changes, reached))

    async def _write_once(self, changes: Mapping[str, dict[bytes, bytes | None]], reached: Mapping[str, int]) -> None:
        assert self.state is not None
        store = self.state.store
        positions = {**self.positions, **reached}
        checkpoint = store.checkpoint
        batch = StoreBatch(
            msgspec.structs.replace(
                checkpoint,
                changelogs={**checkpoint.changelogs, **positions},
                caught_up_at_ms=self._level_at_ms,
            )
        )
        batch.changes.update(changes)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(store.write, batch)

    @property
    def _level_at_ms(self) -> int:
        """When it had all that was there, as far as that is known; wall clock."""
        return min((each.level_at_ms for _, each in self._each()), default=0)

    def _each(self) -> Iterator[tuple[Span, Filled]]:
        return ((span, each) for span in self._spans.values() for each in span.filled)

    async def _note_level(self) -> None:
        """Say in the store, from time to time, that it misses nothing although nothing arrives."""
        assert self.state is not None
        if self._level_at_ms - self.state.store.checkpoint.caught_up_at_ms > _NOTE_EVERY_MS:
            await self._write({}, {})
