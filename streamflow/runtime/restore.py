"""Restoring: a task's store is brought level with its changelogs before its agents run.

It goes by position: from where the store's checkpoint ends to the high watermark found when the restore began, whatever
holes compaction and aborted transactions left. Open transactions below it are waited out, since what they hold may be
committed (KAFKA-10167). All restores of a worker share one fetch lane, beside the lane of running tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from streamflow.clock import Clock
from streamflow.errors import OffsetOutOfRangeError, RetriableError, StateCorruptedError, TopologyError
from streamflow.log.api import Admin, Fetched, Reader
from streamflow.log.batch import RecordBatch
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.task_tables import TaskTables
from streamflow.sensors import Sensors
from streamflow.state.format import pack
from streamflow.state.overlay import Overlay
from streamflow.state.store import Checkpoint, StoreBatch

logger = logging.getLogger("streamflow.restore")

_RETRY_S = 0.2
_TOLD_EVERY_S = 5.0
_STALE_AFTER_MS = 7 * 24 * 3_600_000 // 2
"""Half of the changelogs' `delete.retention.ms`: a store that was away for longer may have missed deletions."""


@dataclass(slots=True)
class _Span:
    """What is to be read of one changelog partition."""

    tp: TopicPartition
    table: str
    start: int
    position: int
    acknowledged: int
    target: int


class Restorer:
    """Restores the tasks of one worker.

    Args:
        reader: A lane of its own.
        admin: For offsets.
        clock: Time.
        sensors: Metrics hooks.
    """

    def __init__(self, reader: Reader, admin: Admin, clock: Clock, sensors: Sensors) -> None:
        self._reader = reader
        self._admin = admin
        self._clock = clock
        self._sensors = sensors
        self._arrived: dict[TopicPartition, anyio.abc.ObjectSendStream[Fetched]] = {}

    async def run(self) -> None:
        """Hand fetches to the restores that wait for them, until cancelled."""
        while True:
            for fetched in await self._reader.receive():
                arrived = self._arrived.get(fetched.tp)
                if arrived is not None:
                    await arrived.send(fetched)

    async def restore(self, task: str, tables: TaskTables, mark: CommitMark, *, is_new: bool) -> None:
        """Bring a task's store level with what is committed.

        Args:
            task: The task's name, for the log.
            tables: Its tables.
            mark: What its last commit says.
            is_new: Whether it has no committed offset.

        Raises:
            TopologyError: It has state, and no committed offset that goes with it.
            StateError: The store cannot be read or written.

        Cancellation: what was restored so far is kept.
        """
        started_s = self._clock.monotonic()
        spans = await self._spans(tables, mark)
        if is_new:
            _refuse_state_without_offsets(task, spans)
        records = 0
        for span in spans:
            if span.position < span.target:
                records += await self._read(task, tables, span)
            tables.positions[span.table] = span.position
        for name, time_ms in mark.times.items():
            overlay = tables.overlays.get(name)
            if overlay is not None:
                overlay.advance(time_ms)
        await tables.level()
        for overlay in tables.overlays.values():
            overlay.committed_stream_time_ms = overlay.stream_time_ms
        if records:
            seconds = max(1e-6, self._clock.monotonic() - started_s)
            logger.info("task %s: restored %d records in %.1f s (%.0f/s)", task, records, seconds, records / seconds)

    async def _spans(self, tables: TaskTables, mark: CommitMark) -> list[_Span]:
        """What is to be read; a store that cannot go on from its checkpoint starts anew."""
        changelogs = list(tables.changelogs())
        while True:
            try:
                starts = await self._admin.start_offsets(changelogs)
                targets = await self._admin.high_watermarks(changelogs)
                break
            except RetriableError as error:
                logger.warning("looking for the ends of changelogs: %s; trying again", error)
                await self._clock.sleep(_RETRY_S)
        return [self._span(tables, tp, name, starts[tp], targets[tp], mark) for tp, name in tables.changelogs().items()]

    def _span(
        self, tables: TaskTables, tp: TopicPartition, table: str, start: int, target: int, mark: CommitMark
    ) -> _Span:
        position = tables.store.checkpoint.changelogs.get(table, 0)
        why = self._unusable(tables, position, start, target)
        if why:
            logger.warning("%s: the local state is not used: %s; it is rebuilt from the changelog", tp, why)
            tables.store.clear(table)
            position = 0
        acknowledged = target if mark.changelogs is None else min(target, mark.changelogs.get(table, target))
        return _Span(tp, table, start, max(position, start), acknowledged, target)

    def _unusable(self, tables: TaskTables, position: int, start: int, target: int) -> str:
        if position > target:
            return (
                f"it reaches offset {position}, and the changelog ends at {target} (it was made anew, or lost records)"
            )
        if 0 < position < start:
            return f"it reaches offset {position}, and the changelog begins at {start}"
        away_ms = self._clock.now_ms() - tables.store.checkpoint.caught_up_at_ms
        if 0 < position < target and away_ms > _STALE_AFTER_MS:
            return f"it was last level with the log {away_ms // 86_400_000} days ago and may have missed deletions"
        return ""

    async def _read(self, task: str, tables: TaskTables, span: _Span) -> int:
        overlay = tables.overlays[span.table]
        send, receive = anyio.create_memory_object_stream[Fetched](2)
        self._arrived[span.tp] = send
        self._reader.add(span.tp, span.position)
        self._reader.ask(span.tp)
        records, told_s = 0, self._clock.monotonic()
        uncommitted: set[bytes] = set()
        try:
            while span.position < span.target:
                fetched = await receive.receive()
                if fetched.error is not None:
                    await self._start_anew(tables, span, fetched)
                    continue
                self._reader.ask(span.tp)
                records += await anyio.to_thread.run_sync(_apply, tables, overlay, span, fetched, uncommitted)
                self._sensors.restored(span.table, records=records, remaining=max(0, span.target - span.position))
                if self._clock.monotonic() - told_s > _TOLD_EVERY_S:
                    told_s = self._clock.monotonic()
                    logger.info(
                        "task %s: restoring %s: %d records, %d to go",
                        task,
                        span.table,
                        records,
                        span.target - span.position,
                    )
        finally:
            del self._arrived[span.tp]
            self._reader.remove(span.tp)
            send.close()
            receive.close()
        self._take_back(overlay, span, uncommitted)
        self._sensors.restored(span.table, records=records, remaining=0)
        return records

    async def _start_anew(self, tables: TaskTables, span: _Span, fetched: Fetched) -> None:
        error = fetched.error
        if not isinstance(error, OffsetOutOfRangeError):
            raise error if error is not None else StateCorruptedError(f"{span.tp}: nothing was fetched")
        logger.warning("%s; the local state is rebuilt from the changelog's start", error)
        tables.store.clear(span.table)
        span.position = error.log_start
        self._reader.add(span.tp, span.position)
        self._reader.ask(span.tp)

    def _take_back(self, overlay: Overlay, span: _Span, uncommitted: set[bytes]) -> None:
        """Write what was not committed over with its committed value, in the task's first commit.

        A changelog that is not committed together with the offsets (at least once) may end in records of updates that
        come again.
        """
        for store_key in uncommitted:
            overlay.take_back(store_key)
        if uncommitted:
            logger.info("%s: %d keys were written and not committed; taken back", span.tp, len(uncommitted))


def _refuse_state_without_offsets(task: str, spans: Sequence[_Span]) -> None:
    """Records would be counted twice: the offsets expired or were deleted, or the app has a new name for its group."""
    for span in spans:
        if span.target > span.start:
            raise TopologyError(
                f"task {task}: table {span.table!r} has {span.target - span.start} changelog records in {span.tp}, but "
                "the group has no committed offset that says which input they stand for (it expired, or was deleted). "
                "Start over with `streamflow reset APP`, or set the offsets to where the state is "
                "(`kafka-consumer-groups --reset-offsets` on Kafka)"
            )


def _apply(tables: TaskTables, overlay: Overlay, span: _Span, fetched: Fetched, uncommitted: set[bytes]) -> int:
    """Put fetched records into the store, with the position they reach; runs in a thread.

    Returns:
        How many there were.
    """
    changes: dict[bytes, bytes | None] = {}
    count = 0
    for batch in fetched.batches:
        count += _collect(overlay, span, batch, changes, uncommitted)
    span.position = fetched.next_offset
    reached = min(span.position, span.acknowledged)
    batch_of = StoreBatch(_checkpoint(tables, span.table, reached))
    batch_of.changes[span.table] = changes
    tables.store.write(batch_of)
    return count


def _checkpoint(tables: TaskTables, table: str, position: int) -> Checkpoint:
    before = tables.store.checkpoint
    return msgspec.structs.replace(before, changelogs={**before.changelogs, table: position})


def _collect(
    overlay: Overlay, span: _Span, batch: RecordBatch, changes: dict[bytes, bytes | None], uncommitted: set[bytes]
) -> int:
    store_key = None if overlay.keys.same_as_serialized else overlay.store_key_of
    ttl_ms, acknowledged = overlay.ttl_ms, span.acknowledged
    count = 0
    for record in batch.open():
        count += 1
        raw, value = record.key, record.value
        if raw is None:
            continue
        key = raw if store_key is None else store_key(raw)
        if record.offset >= acknowledged:
            uncommitted.add(key)
            continue
        if ttl_ms is None:
            changes[key] = None if value is None else pack(value, None)
        else:
            overlay.advance(record.timestamp)
            changes[key] = None if value is None else pack(value, record.timestamp + ttl_ms)
    return count
