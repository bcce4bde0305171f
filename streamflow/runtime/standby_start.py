"""From where the store of a standby goes on: what cannot be gone on from is dropped, and followed anew."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio.to_thread

from streamflow.clock import Clock
from streamflow.errors import RetriableError, StateCorruptedError
from streamflow.log.api import Admin
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.runtime.changelog_records import ChangelogRecords, check_position
from streamflow.runtime.followed import Filled, Span, is_followed
from streamflow.runtime.local_state import LocalState
from streamflow.runtime.source_records import SourceRecords
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.standbys")

_RETRY_S = 0.2

LimitOf = Callable[[Table[Any, Any]], Awaitable[int | None]]


class StandbyStart:
    """Finds out where a store goes on.

    Args:
        name: The task's name.
        partition: The task's partition.
        admin: For offsets.
        clock: Time.
        sensors: Metrics hooks.
    """

    def __init__(self, name: str, partition: int, admin: Admin, clock: Clock, sensors: Sensors) -> None:
        self._name = name
        self._partition = partition
        self._admin = admin
        self._clock = clock
        self._sensors = sensors

    async def spans(self, state: LocalState, limit_of: LimitOf) -> dict[TopicPartition, Span]:
        """What to follow, from where; tables that are filled anew are cleared.

        Args:
            state: The open store.
            limit_of: The limit of a table; see `followed.limit_of`.

        Raises:
            StateCorruptedError: The store cannot go on; see `check_position`.
        """
        now_ms = self._clock.now_ms()
        level_at_ms = min(now_ms, state.store.checkpoint.caught_up_at_ms)
        tables = {table.name: table for table in state.tables if is_followed(table)}
        sources = {name: TopicPartition(table.changelog.name, self._partition) for name, table in tables.items()}
        starts, ends = await self._offsets(list(set(sources.values())))
        spans: dict[TopicPartition, Span] = {}
        for name, table in tables.items():
            tp = sources[name]
            limit = await limit_of(table)
            position = await self._checked(state, table, tp, starts[tp], ends[tp], limit)
            span = spans.setdefault(tp, Span(tp, [], ends[tp], limit))
            reads, first = self._reads(table), max(position, starts[tp])
            # An empty one has nothing that may have been deleted.
            span.filled.append(Filled(table, reads, first, level_at_ms if position else now_ms, not position))
        for span in spans.values():
            if span.limit is None:
                span.seen(span.end, now_ms)
        return spans

    def _reads(self, table: Table[Any, Any]) -> ChangelogRecords | SourceRecords:
        if table.source is None:
            return ChangelogRecords(table)
        return SourceRecords(table.name, table.source, table.keys_in_order, self._sensors)

    async def _checked(
        self, state: LocalState, table: Table[Any, Any], tp: TopicPartition, start: int, end: int, limit: int | None
    ) -> int:
        """Where a table can go on, 0 where it is filled anew."""
        position = state.store.checkpoint.changelogs.get(table.name, 0)
        stale_after_ms = state.stale_after_ms[table.name]
        away_ms = self._clock.now_ms() - state.store.checkpoint.caught_up_at_ms
        committed = end if limit is None else limit
        try:
            check_position(tp, position, start, end, away_ms, stale_after_ms, committed=committed)
        except StateCorruptedError as error:
            if table.source is None:
                raise
            logger.warning("standby of task %s: table %r is filled anew: %s", self._name, table.name, error)
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
