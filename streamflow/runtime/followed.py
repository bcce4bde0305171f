"""What a standby follows: partitions, how far it is with each of them, and until when it is known to miss nothing.

A store may go on from where it is as long as it cannot have missed a deletion, which is gone from a compacted changelog
after a while. That is judged by evidence alone: the end of the partition was so and so at a time, and the store has
come to it, so it misses nothing that was there then. Silence is no evidence, however little seems to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio.to_thread

from streamflow.errors import StateCorruptedError
from streamflow.log.api import OffsetMark
from streamflow.log.batch import RecordBatch
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.runtime.changelog_records import ChangelogRecords
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.source_records import SourceRecords

Marks = Mapping[TopicPartition, OffsetMark]


def limit_of(table: Table[Any, Any], partition: int, mark: CommitMark, marks: Marks) -> int | None:
    """The offset up to which a store may have what a table is filled from; None for all that readers see.

    Args:
        table: The table.
        partition: The task's partition.
        mark: What the task's last commit says.
        marks: The group's committed offsets.
    """
    if table.source is not None:
        committed = marks.get(TopicPartition(table.source.name, partition))
        return 0 if committed is None else committed.offset
    return None if mark.changelogs is None else mark.changelogs.get(table.name, 0)


def is_followed(table: Table[Any, Any]) -> bool:
    """Whether a store can have a table before its task runs; what is read with schemas is read anew by each task."""
    if table.source is None:
        return True
    codecs = table.source.key_codec, table.source.value_codec
    return all(codec.load_schema is None for codec in codecs)


@dataclass(slots=True)
class Filled:
    """One table.

    Attributes:
        table: The table.
        reads: Reads what it is filled from.
        position: The offset that follows what the store has.
        level_at_ms: When the store had all that was there, as far as that is known; wall clock, since it is kept.
        is_filling: Whether it was empty, and has not come to the end yet. Nothing is missed while it is read without
            a break, however long that takes.
        awaited: An end that was seen and not come to yet, and when it was seen.
    """

    table: Table[Any, Any]
    reads: ChangelogRecords | SourceRecords
    position: int
    level_at_ms: int
    is_filling: bool
    awaited: tuple[int, int] | None = None

    async def read(
        self, tp: TopicPartition, batches: Sequence[RecordBatch], *, below: int
    ) -> tuple[dict[bytes, bytes | None], int]:
        """What fetched batches say of the table: stored keys and values, and how many records it was.

        Args:
            tp: Where they are from.
            batches: What was fetched.
            below: The offset from which on records are left out.
        """
        if isinstance(self.reads, SourceRecords):
            of_source = await self.reads.read(tp, batches, below=below)
            return of_source.by_key, of_source.records
        read = await anyio.to_thread.run_sync(partial(self.reads.read, batches, below=below))
        return read.by_key, read.records - len(read.beyond)

    def seen(self, end: int, at_ms: int) -> None:
        """See `Span.seen`."""
        if self.awaited is None or self.position >= end:
            self.awaited = end, at_ms
        self.reached(self.position)

    def reached(self, position: int) -> None:
        """The store has come to a position, and perhaps to an end that was seen."""
        self.position = position
        if self.awaited is not None and position >= self.awaited[0]:
            self.level_at_ms = max(self.level_at_ms, self.awaited[1])
            self.is_filling, self.awaited = False, None


@dataclass(slots=True)
class Span:
    """One partition that is followed.

    Attributes:
        tp: The partition.
        filled: The tables that it fills.
        end: Its end, as it was seen last by who looks at the ends of all.
        limit: See `limit_of`.
        heard_at_ms: When the end, or the limit, was as it is known; wall clock, as the machine may have slept.
        asked_at_ms: Since when a fetch is asked for; None while none is.
        place_since_s: Since when it has one of `FetchPlaces`, monotonic; None while it has none.
    """

    tp: TopicPartition
    filled: list[Filled]
    end: int
    limit: int | None
    heard_at_ms: int = 0
    asked_at_ms: int | None = None
    place_since_s: float | None = None

    @property
    def position(self) -> int:
        """The next offset to read."""
        return min(each.position for each in self.filled)

    def seen(self, end: int, at_ms: int) -> None:
        """Take note of where that ends which is to be followed.

        Args:
            end: The end, or the limit.
            at_ms: When it was that, or some time before; never after.
        """
        self.heard_at_ms = max(self.heard_at_ms, at_ms)
        for each in self.filled:
            each.seen(end, at_ms)

    def is_stale(self, upto: int, now_ms: int, stale_after_ms: Mapping[str, int]) -> bool:
        """Whether deletions may have been missed while nothing was heard.

        Args:
            upto: The offset up to which records have arrived.
            now_ms: Now; wall clock.
            stale_after_ms: By table: after how long.
        """
        return any(
            each.position < upto and now_ms - each.level_at_ms > stale_after_ms[each.table.name] for each in self.filled
        )

    def check_limit(self) -> None:
        """A changelog that was committed with the offsets may not be so any more, from where it was known to be on.

        Raises:
            StateCorruptedError: The store has what is not committed.
        """
        for each in self.filled:
            if each.table.source is None and self.limit is not None and each.position > self.limit:
                raise StateCorruptedError(
                    f"it reaches offset {each.position} of changelog {self.tp}, which is committed up to {self.limit}",
                    reason="ahead",
                )

    def answered(self, end: int) -> None:
        """A fetch was answered.

        Args:
            end: The end that came with it.
        """
        asked_at_ms, self.asked_at_ms = self.asked_at_ms, None
        if asked_at_ms is None:
            return
        for each in self.filled:
            if each.is_filling:
                each.level_at_ms = max(each.level_at_ms, asked_at_ms)
        if self.limit is None:
            self.seen(end, asked_at_ms)
