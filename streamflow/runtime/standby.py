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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import anyio

from streamflow.errors import (
    OffsetOutOfRangeError,
    StateCorruptedError,
    StateError,
    StreamFlowError,
    TopologyError,
)
from streamflow.log.api import Fetched
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.changelog_records import pieces
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.followed import Marks, Span, is_followed, limit_of
from streamflow.runtime.local_state import LocalState
from streamflow.runtime.standby_fetches import StandbyFetches
from streamflow.runtime.standby_start import StandbyStart
from streamflow.runtime.standby_store import StandbyStore
from streamflow.runtime.standby_surroundings import StandbySurroundings
from streamflow.runtime.status import StandbyStatus
from streamflow.state.store import Checkpoint

logger = logging.getLogger("streamflow.standbys")

_TRY_AGAIN_S = 60.0
_PAUSE_S = 0.2
"""Pause of one that is level: many small commits of the task are then one fetch and one write here."""
_LOOK_S = 30.0
_NOTE_EVERY_MS = 600_000
_LOOKS = 5
"""Commits of transactions are seen a moment later: how often it is looked whether a table is ahead of its source."""
_SILENT_MS = 15_000
"""Three times as long as the ends of changelogs are looked up apart from one another."""
_MAX_REBUILDS = 3
_REBUILDS_WITHIN_S = 600.0


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
        rebuilds: How often its store was set aside.
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
        self._sources = list(sources)
        self._store = StandbyStore(sub, partition, shared.local, shared.clock)
        self._fetches = StandbyFetches(shared.reader, shared.places, shared.clock, self._wake)
        self._start = StandbyStart(self.name, partition, shared.admin, shared.clock, shared.sensors)
        self._clock = shared.clock
        self._sensors = shared.sensors
        self._fail = shared.fail
        self._mark: CommitMark | None = None
        self._marks: Marks | None = None
        self._marks_at_ms = 0
        self._news = anyio.Event()
        self._rebuilt: deque[float] = deque(maxlen=_MAX_REBUILDS)
        self._is_handed_over = False
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()

    # --- what others ask ---------------------------------------------------------------------------------------

    @property
    def state(self) -> LocalState | None:
        """The store, while it is open here."""
        return self._store.state

    @property
    def left_at(self) -> Checkpoint | None:
        """How far the store was when it was closed; None before that, and where there is none."""
        return self._store.left_at

    @property
    def _spans(self) -> Mapping[TopicPartition, Span]:
        return self._fetches.spans

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
        return sum(max(0, self._fetches.end(span) - each.position) for span, each in self._fetches.each())

    @property
    def has_no_room(self) -> bool:
        """Whether it has been waiting for room on the disk for long."""
        return self._store.has_no_room

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
        return self._fetches.positions

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
        self._wake()

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
        self._fetches.arrived.append(fetched)
        self._wake()

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
            try:
                with anyio.CancelScope(shield=True):
                    await self._end_following()
            except StreamFlowError as error:
                self._fail(error)
            finally:
                self._ended.set()  # whatever came of it: who waits for that cannot be cancelled

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
        return self._store.hand_over()

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
                await self._store.write_once({}, self.positions, self._fetches.level_at_ms)
        except StateCorruptedError as error:
            damage = error
        except StateError as error:
            logger.warning("%s; a little more is restored from the changelogs", error)
        self._fetches.let_go()
        if damage is not None:
            await self._set_aside(damage)
        elif not self._is_handed_over:
            await self._store.close()

    async def _set_aside(self, damage: StateCorruptedError) -> None:
        logger.warning("standby of task %s: %s; its store is set aside", self.name, damage)
        self._fetches.let_go()
        await self._store.set_aside(damage)

    # --- following ---------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while self._mark is None or self._marks is None:
            await self._wait()
        await self._store.open(self._mark)
        await self._begin()
        self.given_up = ""
        while True:
            self._fetches.ask()
            await self._wait()
            self._store.check(self._mark)
            for span in self._spans.values():
                span.check_limit()
            while self._fetches.arrived:
                await self._take(self._fetches.arrived.popleft())
            self._fetches.leave_parked()
            if not self.lag:
                await self._note_level()
                await anyio.sleep(_PAUSE_S)

    async def _wait(self) -> None:
        """Wait for what is fetched or heard, or for a while."""
        if not self._news.is_set():
            with anyio.move_on_after(_LOOK_S):
                await self._news.wait()
        self._news = anyio.Event()

    def _wake(self) -> None:
        self._news.set()

    async def _begin(self) -> None:
        """Find out where to go on, drop what cannot be gone on from, and start to read."""
        state, mark = self.state, self._mark
        assert state is not None
        assert mark is not None
        self._fetches.spans = await self._start.spans(state, partial(self._believed_limit, mark))
        self._set_limits()
        self._fetches.begin()

    async def _believed_limit(self, mark: CommitMark, table: Table[Any, Any]) -> int | None:
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

    # --- what arrives ------------------------------------------------------------------------------------------

    async def _take(self, fetched: Fetched) -> None:
        assert self.state is not None
        span = self._spans[fetched.tp]
        if fetched.error is not None:
            if isinstance(fetched.error, OffsetOutOfRangeError):
                raise StateCorruptedError(f"while it was followed, {fetched.error}", reason="behind")
            raise fetched.error
        if span.is_stale(fetched.next_offset, self._clock.now_ms(), self.state.stale_after_ms):
            logger.warning("standby of task %s: nothing was heard of %s for long", self.name, span.tp)
            self._fetches.let_go()
            return await self._begin()
        span.answered(fetched.end_offset)
        limit = sys.maxsize if span.limit is None else span.limit
        for piece in pieces(fetched):
            await self._apply(span, piece, min(piece.next_offset, limit))
        self._fetches.leave_place(span)
        if fetched.next_offset > limit:
            self._fetches.again(span)

    async def _apply(self, span: Span, piece: Fetched, reached: int) -> None:
        """Put fetched records into the store, with the position they reach."""
        behind = [each for each in span.filled if each.position < reached]
        changes: dict[str, dict[bytes, bytes | None]] = {}
        for each in behind:
            by_key, records = await each.read(span.tp, piece.batches, below=reached)
            if by_key:
                changes[each.table.name] = by_key
            self.records += records
            self._sensors.standby_applied(each.table.name, records)
        if changes:
            positions = {**self.positions, **{each.table.name: reached for each in behind}}
            await self._store.write(changes, positions, self._fetches.level_at_ms)
        for each in behind:
            each.reached(reached)

    async def _note_level(self) -> None:
        """Say in the store, from time to time, that it misses nothing although nothing arrives."""
        assert self.state is not None
        if self._fetches.level_at_ms - self.state.store.checkpoint.caught_up_at_ms > _NOTE_EVERY_MS:
            await self._store.write({}, self.positions, self._fetches.level_at_ms)
