"""Restoring: a task's store is brought level with its changelogs before its agents run.

It goes by position: from where the store's checkpoint ends to the high watermark found when the restore began, whatever
holes compaction and aborted transactions left. Open transactions below it are waited out, since what they hold may be
committed (KAFKA-10167). All restores of a worker share one fetch lane, beside the lane of running tasks.

A store that the log does not bear out (it reaches further than the log, or misses what the log no longer has) raises
`StateCorruptedError`: its task is closed, the store set aside, and the task restored from the beginning.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import msgspec
from anyio.streams.memory import MemoryObjectSendStream

from streamflow.clock import Clock
from streamflow.errors import (
    OffsetOutOfRangeError,
    RetriableError,
    StateCorruptedError,
    StateFullError,
    TopologyError,
)
from streamflow.log.api import Admin, Fetched, Reader
from streamflow.model.record import TopicPartition
from streamflow.runtime.changelog_records import ChangelogRecords, check_position, pieces
from streamflow.runtime.changelogs import MIN_COMPACTION_LAG_MS
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.source_records import SourceRecords
from streamflow.runtime.source_tables import SourceTable
from streamflow.runtime.stored_schemas import load_schemas
from streamflow.runtime.task_tables import TaskTables
from streamflow.sensors import Sensors
from streamflow.state.format import pack
from streamflow.state.overlay import Overlay
from streamflow.state.store import StoreBatch

logger = logging.getLogger("streamflow.restore")

_RETRY_S = 0.2
_RETRY_FULL_S = 1.0
_TOLD_EVERY_S = 5.0
_NAMED = 16


@dataclass(slots=True)
class _Span:
    """What is to be read of one changelog partition, or of a source that fills a table.

    Attributes:
        tp: The partition.
        table: Its table.
        start: First offset it has.
        position: Next offset to read.
        acknowledged: Where what is committed ends.
        target: Where reading ends.
        reads: Reads its records: a changelog's, or a source's.
        records: How many were read.
        uncommitted: By store key: value and timestamp of the newest record that is not committed.
    """

    tp: TopicPartition
    table: str
    start: int
    position: int
    acknowledged: int
    target: int
    reads: ChangelogRecords | SourceRecords
    records: int = 0
    uncommitted: dict[bytes, tuple[bytes | None, int]] = field(default_factory=dict)

    @property
    def committed(self) -> int:
        """The position up to which store and changelog agree; what follows is taken back by the next commit."""
        return min(self.acknowledged, self.position) if self.uncommitted else self.position


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
        self._arrived: dict[TopicPartition, MemoryObjectSendStream[Fetched]] = {}
        # Of restores that go on at once: how many go on, since when, and what each that is done has read.
        self._going_on = 0
        self._since_s = 0.0
        self._done: dict[str, int] = {}

    async def run(self) -> None:
        """Hand fetches to the restores that wait for them, until cancelled."""
        while True:
            for fetched in await self._reader.receive():
                arrived = self._arrived.get(fetched.tp)
                if arrived is not None:
                    # Without an await: who waits for it may be cancelled meanwhile, and take the worker along. There is
                    # room, since one fetch is asked for at a time.
                    arrived.send_nowait(fetched)

    async def restore(
        self,
        task: str,
        tables: TaskTables,
        mark: CommitMark,
        *,
        is_new: bool,
        filled: Sequence[SourceTable],
        starts: Mapping[TopicPartition, int],
    ) -> None:
        """Bring a task's store level with what is committed.

        Args:
            task: The task's name, for the log.
            tables: Its tables.
            mark: What its last commit says.
            is_new: Whether it has no committed offset.
            filled: Those of its tables that topics fill; their records up to the task's start are restored.
            starts: Where the task starts in its sources.

        Raises:
            TopologyError: It has state, and no committed offset that goes with it.
            StateCorruptedError: The store is damaged, or does not go with the log.
            StateError: The store cannot be read or written, or a schema that its values need cannot be loaded.

        Cancellation: what was restored so far is kept.
        """
        with self._counted(task, tables):
            spans = await self._spans(tables, mark, is_new=is_new) + await self._source_spans(tables, filled, starts)
            await self._note_beginning(tables, spans)
            if is_new:
                _refuse_kept_state(task, tables)
            tables.restoring.remaining = sum(max(0, span.target - span.position) for span in spans)
            for span in spans:
                if span.position < span.target:
                    await self._read(task, tables, span, is_new=is_new)
                    self._take_back(tables.overlays[span.table], span)
                tables.positions[span.table] = span.committed
                tables.ends[span.table] = span.target
            for name, time_ms in mark.times.items():
                overlay = tables.overlays.get(name)
                if overlay is not None:
                    overlay.advance(time_ms)
            for name, overlay in tables.overlays.items():
                if tables.tables[name].source is None:
                    await load_schemas(overlay, tables.tables[name].changelog.value_codec)
            pinned = frozenset[str]() if mark.changelogs is None else mark.changelogs.keys()
            tables.is_pinned = pinned >= set(tables.changelogs().values())
            await tables.level()
            for overlay in tables.overlays.values():
                overlay.committed_stream_time_ms = overlay.stream_time_ms

    @contextmanager
    def _counted(self, task: str, tables: TaskTables) -> Generator[None]:
        """One of the restores that go on together; the last one says what all have read."""
        if not self._going_on:
            self._since_s = self._clock.monotonic()
        self._going_on += 1
        try:
            yield
            self._done[task] = tables.restoring.records
        finally:
            self._going_on -= 1
            if not self._going_on:
                self._tell_done()

    def _tell_done(self) -> None:
        """Say once what restores that went on together have read."""
        done, self._done = sorted(self._done.items()), {}
        if not done:
            return
        records = sum(read for _, read in done)
        seconds = max(1e-6, self._clock.monotonic() - self._since_s)
        tasks = ", ".join(f"{task} {read}" for task, read in done[:_NAMED])
        more = f" and {len(done) - _NAMED} tasks more" if len(done) > _NAMED else ""
        logger.info("restored %d records in %.1f s (%.0f/s): %s%s", records, seconds, records / seconds, tasks, more)

    async def _spans(self, tables: TaskTables, mark: CommitMark, *, is_new: bool) -> list[_Span]:
        """What is to be read.

        Raises:
            StateCorruptedError: The store cannot go on from its checkpoint.
        """
        starts, targets = await self._offsets(list(tables.changelogs()))
        checkpoint = tables.store.checkpoint
        away_ms = self._clock.now_ms() - checkpoint.caught_up_at_ms
        spans = []
        for tp, name in tables.changelogs().items():
            target = targets[tp]
            position, stale_after_ms = checkpoint.changelogs.get(name, 0), tables.stale_after_ms[name]
            if is_new:
                # Nothing was committed when the task was opened: records there are must not get into its store. Another
                # worker that has had the task since, unheard here, may not have committed them.
                acknowledged = min(position, target)
            else:
                acknowledged = target if mark.changelogs is None else min(target, mark.changelogs.get(name, target))
            check_position(tp, position, starts[tp], target, away_ms, stale_after_ms, committed=acknowledged)
            reads = ChangelogRecords(tables.tables[name])
            spans.append(_Span(tp, name, starts[tp], max(position, starts[tp]), acknowledged, target, reads))
        return spans

    async def _source_spans(
        self, tables: TaskTables, filled: Sequence[SourceTable], starts: Mapping[TopicPartition, int]
    ) -> list[_Span]:
        """What is to be read of the topics that fill tables: nothing that the task is going to process.

        A table that cannot go on from its checkpoint is filled anew: whoever sets offsets back wants that.
        """
        if not filled:
            return []
        first, ends = await self._offsets(list({source.tp for source in filled}))
        checkpoint = tables.store.checkpoint
        away_ms = self._clock.now_ms() - checkpoint.caught_up_at_ms
        spans: list[_Span] = []
        for source in filled:
            tp, name = source.tp, source.name
            start, target = first[tp], min(starts.get(tp, 0), ends[tp])
            position = checkpoint.changelogs.get(name, 0)
            is_stale = 0 < position < target and away_ms > tables.stale_after_ms[name]
            is_unfit = position > target or 0 < position < start or is_stale
            if is_unfit:
                logger.warning(
                    "%s: the local state of table %r reaches offset %d, which does not go with what the task is to "
                    "start from (%d; the topic begins at %d, and it was last level %.1f days ago): it is filled anew",
                    tp,
                    name,
                    position,
                    target,
                    start,
                    away_ms / 86_400_000,
                )
            # Schemas are loaded as records are read, so what was read with some is read again.
            if is_unfit or source.records.load_schemas:
                await anyio.to_thread.run_sync(tables.store.clear, name)
                position = 0
            spans.append(_Span(tp, name, start, max(position, start), target, target, source.records))
        return spans

    async def _offsets(
        self, partitions: list[TopicPartition]
    ) -> tuple[Mapping[TopicPartition, int], Mapping[TopicPartition, int]]:
        """Where partitions begin, and their high watermarks."""
        while True:
            try:
                starts = await self._admin.start_offsets(partitions)
                return starts, await self._admin.high_watermarks(partitions)
            except RetriableError as error:
                logger.warning("looking for the ends of changelogs: %s; trying again", error)
                await self._clock.sleep(_RETRY_S)

    async def _note_beginning(self, tables: TaskTables, spans: list[_Span]) -> None:
        """A store that has nothing to catch up on but what it begins with now cannot miss a deletion from now on."""
        checkpoint = tables.store.checkpoint
        if all(span.position >= span.target or not checkpoint.changelogs.get(span.table) for span in spans):
            now_ms = self._clock.now_ms()
            await self._write(tables, StoreBatch(msgspec.structs.replace(checkpoint, caught_up_at_ms=now_ms)))

    async def _read(self, task: str, tables: TaskTables, span: _Span, *, is_new: bool) -> None:
        send, receive = anyio.create_memory_object_stream[Fetched](2)
        self._arrived[span.tp] = send
        self._reader.add(span.tp, span.position)
        self._reader.ask(span.tp)
        told_s = self._clock.monotonic()
        try:
            while span.position < span.target:
                fetched = await receive.receive()
                if fetched.error is not None:
                    raise _unreadable(span, fetched.error)
                self._reader.ask(span.tp)
                for piece in pieces(fetched):
                    await self._take(tables, span, piece)
                if is_new and span.records and isinstance(span.reads, ChangelogRecords):
                    raise _without_offsets(task, f"changelog records in {span.tp}")
                if self._clock.monotonic() - told_s > _TOLD_EVERY_S:
                    told_s = self._clock.monotonic()
                    logger.info("task %s: restoring, %s", task, tables.restoring.status().text)
        finally:
            del self._arrived[span.tp]
            self._reader.remove(span.tp)
            send.close()
            receive.close()

    async def _take(self, tables: TaskTables, span: _Span, fetched: Fetched) -> None:
        """Put fetched records into the store, with the position they reach."""
        position, records = span.position, span.records
        if isinstance(span.reads, ChangelogRecords):
            changes = await anyio.to_thread.run_sync(_collect, tables, span, span.reads, fetched)
        else:
            changes = await _collect_of_source(tables, span, span.reads, fetched)
        await self._write(tables, changes)
        tables.restoring.moved(span.position - position, span.records - records)
        self._sensors.restored(span.table, span.records - records)

    async def _write(self, tables: TaskTables, batch: StoreBatch) -> None:
        """Write to the store; a full disk is waited out."""
        told = False
        while True:
            try:
                with anyio.CancelScope(shield=True):
                    return await anyio.to_thread.run_sync(tables.store.write, batch)
            except StateFullError as error:
                if not told:
                    logger.warning("%s; restoring goes on when there is room", error)
                told = True
            await self._clock.sleep(_RETRY_FULL_S)

    def _take_back(self, overlay: Overlay, span: _Span) -> None:
        """Write what was not committed over with its committed value, in the task's first commit.

        A changelog that is not committed together with the offsets (at least once) may end in records of updates that
        come again. Where the committed value may have been compacted away meanwhile, the later one has to do.
        """
        gone_before_ms = self._clock.now_ms() - MIN_COMPACTION_LAG_MS
        kept = 0
        for store_key, (value, timestamp_ms) in span.uncommitted.items():
            old = overlay.ttl_ms is None and timestamp_ms < gone_before_ms
            if old and value is not None and not overlay.is_committed(store_key):
                overlay.write_again(store_key, pack(value, None))
                kept += 1
            else:
                overlay.take_back(store_key)
        if taken := len(span.uncommitted) - kept:
            logger.info("%s: %d keys were written and not committed; taken back", span.tp, taken)
        if kept:
            logger.warning(
                "%s: %d keys were written over a day ago and not committed; what they had before may have been "
                "compacted away, so the later values stand, and updates in them may be counted twice",
                span.tp,
                kept,
            )


def _unreadable(span: _Span, error: Exception) -> Exception:
    if isinstance(error, OffsetOutOfRangeError):
        return StateCorruptedError(f"while it was restored, {error}", reason="behind")
    return error


def _refuse_kept_state(task: str, tables: TaskTables) -> None:
    for name in tables.changelogs().values():
        if next(tables.store.scan(name), None) is not None:
            raise _without_offsets(task, f"local state of table {name!r}")


def _without_offsets(task: str, what: str) -> TopologyError:
    """Records would be counted twice: the offsets expired or were deleted, or the app has a new name for its group."""
    return TopologyError(
        f"task {task} has {what}, but its group has no committed offset that says which input they stand for (it "
        "expired, or was deleted). Start over with `streamflow reset APP`, or set the offsets to where the state is "
        "(`kafka-consumer-groups --reset-offsets` on Kafka)"
    )


def _collect(tables: TaskTables, span: _Span, reads: ChangelogRecords, fetched: Fetched) -> StoreBatch:
    """What fetched records change in the store, with the position they reach; runs in a thread."""
    changes = reads.read(fetched.batches, below=span.acknowledged)
    tables.overlays[span.table].advance(changes.newest_ms)
    span.records += changes.records
    span.uncommitted.update(changes.beyond)
    span.position = fetched.next_offset
    checkpoint = tables.store.checkpoint
    reached = {**checkpoint.changelogs, span.table: min(span.position, span.acknowledged)}
    batch_of = StoreBatch(msgspec.structs.replace(checkpoint, changelogs=reached))
    batch_of.changes[span.table] = changes.by_key
    return batch_of


async def _collect_of_source(tables: TaskTables, span: _Span, source: SourceRecords, fetched: Fetched) -> StoreBatch:
    """What records of a source below the target change in the store, with the position they reach."""
    changes = await source.read(span.tp, fetched.batches, below=span.target)
    span.records += changes.records
    span.position = min(fetched.next_offset, span.target)
    checkpoint = tables.store.checkpoint
    batch_of = StoreBatch(
        msgspec.structs.replace(checkpoint, changelogs={**checkpoint.changelogs, span.table: span.position})
    )
    batch_of.changes[span.table] = changes.by_key
    return batch_of
