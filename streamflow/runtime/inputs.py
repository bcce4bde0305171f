"""A task's input: whole batches as they came, opened record by record, in runs that never cross an input.

With one input its order is the log's. With several the next run is of the input whose head has the smallest
timestamp, up to the first record later than another input's head (Kafka Streams' choice, `PartitionGroup`); of equal
timestamps that of an input which fills a table. An input without a record in hand is waited for while more is known to
be coming, then for `max_task_idle_s`; after that the others go on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from streamflow.clock import Clock
from streamflow.log.api import Fetched
from streamflow.log.batch import LogRecord, RecordBatch
from streamflow.model.record import TopicPartition

_LOW_WATER_BYTES = 512 * 1024
_TIME_RESOLUTION_S = 1e-6
_UNKNOWN_END_S = 0.05
_EMPTY: Iterator[LogRecord] = iter(())


class Input:
    """One partition of one source topic in a task's hands.

    Args:
        tp: The partition.
        position: First offset to process.
        timestamp_of: Event time of a record; None is the record's own timestamp.
    """

    def __init__(
        self, tp: TopicPartition, position: int, timestamp_of: Callable[[LogRecord], int] | None = None
    ) -> None:
        self.tp = tp
        self.position = position
        self.fetched_to = position
        self.end_offset: int | None = None
        # A bounded run takes nothing at or past its limit; where a written topic seems to end, units are flushed.
        self.limit: int | None = None
        self.flush_at: int | None = None
        # It fills a table: of records of equal time its come first, so that the others find what they say.
        self.fills_table = False
        # Its position is not in the log, and the reader has let it go until `move_to`.
        self.is_out_of_range = False
        self._timestamp_of = timestamp_of
        self._batches: deque[RecordBatch] = deque()
        self._queued_bytes = 0
        self._open: Iterator[LogRecord] = _EMPTY
        self._open_next_offset = position
        self._head: LogRecord | None = None
        self._head_ms: int | None = None  # its event time, once that was asked for
        self._jump: int | None = None

    def add(self, fetched: Fetched) -> None:
        """Queue what a fetch brought."""
        self.end_offset = fetched.end_offset
        self.fetched_to = max(self.fetched_to, fetched.next_offset)
        self._batches.extend(fetched.batches)
        self._queued_bytes += fetched.size_bytes
        self._jump = fetched.next_offset

    @property
    def wants_more(self) -> bool:
        """Whether there is room for another fetch."""
        return self._queued_bytes < _LOW_WATER_BYTES and not self.limit_reached_by(self.fetched_to)

    def limit_reached_by(self, offset: int) -> bool:
        """Whether an offset is at or past the end of a bounded run."""
        return self.limit is not None and offset >= self.limit

    def has_ended(self) -> bool:
        """Whether a bounded run has taken everything there is to take."""
        end = self.limit if self.limit is not None else self.flush_at
        return end is not None and self.fetched_to >= end and self.head() is None

    def head(self) -> LogRecord | None:
        """The next record, or None while none is in hand."""
        while self._head is None:
            record = next(self._open, None)
            if record is not None:
                if self.limit_reached_by(record.offset):
                    self._drop_rest()
                    return None
                self._head = record
            elif self._batches:
                batch = self._batches.popleft()
                self._queued_bytes -= batch.size_bytes
                self._open = batch.open()
                self._open_next_offset = batch.next_offset
            else:
                return None
        return self._head

    def head_timestamp_ms(self) -> int:
        """Event time of the head, which must exist."""
        head = self.head()
        if head is None:
            return -1
        if self._head_ms is None:
            self._head_ms = self._time(head)
        return self._head_ms

    def place(self) -> tuple[int, bool]:
        """Where the head, which must exist, stands among the heads of all inputs: the smallest is next."""
        return self.head_timestamp_ms(), not self.fills_table

    def take(self, max_records: int, until_ms: int | None) -> list[LogRecord]:
        """Take up to `max_records` from one batch, none later than `until_ms`."""
        head = self.head()
        if head is None:
            return []
        self._head = self._head_ms = None
        if until_ms is None and (self.limit is None or self._open_next_offset <= self.limit):
            records = [head, *islice(self._open, max_records - 1)]
        else:
            records = [head]
            while len(records) < max_records:
                record = next(self._open, None)
                if record is None:
                    break
                if self.limit_reached_by(record.offset):
                    self._drop_rest()
                    break
                if until_ms is not None and (time_ms := self._time(record)) > until_ms:
                    self._head, self._head_ms = record, time_ms
                    break
                records.append(record)
        return records

    def _time(self, record: LogRecord) -> int:
        return record.timestamp if self._timestamp_of is None else self._timestamp_of(record)

    def _drop_rest(self) -> None:
        self._open = _EMPTY
        self._batches.clear()
        self._queued_bytes = 0

    def move_to(self, position: int) -> None:
        """Go on elsewhere: what lay at the position is not there any more."""
        self.fetched_to = position
        self._jump = position
        self.is_out_of_range = False

    def position_when_drained(self) -> int | None:
        """Where the position may jump to once no record is in hand (over markers and holes)."""
        if self.head() is not None:
            return None
        if self.limit is not None and self._jump is not None:
            return min(self._jump, max(self.limit, self.position))
        return self._jump


class Inputs:
    """The inputs of one task.

    Args:
        inputs: One per partition.
        clock: For `max_task_idle_s`.
        max_task_idle_s: Seconds to wait for an input that is known to be at its end, >= 0.
        ask: Wants one more fetch of a partition.
        end_of: The newest known end of a partition; None while it is not known.
    """

    def __init__(
        self,
        inputs: list[Input],
        clock: Clock,
        max_task_idle_s: float,
        ask: Callable[[TopicPartition], None],
        end_of: Callable[[TopicPartition], int | None],
    ) -> None:
        self.by_tp = {each.tp: each for each in inputs}
        self._clock = clock
        self._max_task_idle_s = max_task_idle_s
        self._ask = ask
        self._end_of = end_of
        self._arrived = asyncio.Event()
        self._idle_since: float | None = None
        self._idle_left_s: float | None = None
        self._look_again_s: float | None = None

    def add(self, fetched: Fetched) -> None:
        """Queue what a fetch brought, and wake whoever waits."""
        each = self.by_tp[fetched.tp]
        each.add(fetched)
        self.ask_more(each)
        self.wake()

    def end_offset(self, each: Input) -> int | None:
        """The newest known end of an input, as far as fetching has seen it; None while it is not known."""
        newest = self._end_of(each.tp)
        return each.end_offset if newest is None else newest

    def close(self) -> None:
        """Ask for nothing any more: the partitions are being let go, and who is about to run may not know it yet."""
        self._ask = _ask_nobody

    def ask_more(self, each: Input) -> None:
        """Ask for more where there is room."""
        if each.wants_more and not each.is_out_of_range:
            self._ask(each.tp)

    def has_head(self, topic: str) -> bool:
        """Whether an input of a topic has a record in hand."""
        found = False
        for each in self.by_tp.values():
            if each.tp.topic == topic:
                found = each.head() is not None
                self.ask_more(each)  # to look may have opened a batch
                if found:
                    break
        return found

    @property
    def waits_for_time(self) -> bool:
        """Whether records are held back because another input is waited for."""
        return self._idle_left_s is not None

    def wake(self) -> None:
        """Wake whoever waits."""
        self._arrived.set()

    async def wait(self, at_most_s: float | None = None) -> None:
        """Wait until something arrived or `wake` was called, or it is time to go on without an idle input.

        Args:
            at_most_s: Seconds after which to return in any case, > 0; None for no limit.

        Cancellation: atomic.
        """
        times_s = (at_most_s, self._idle_left_s, self._look_again_s)
        limits_s = [time_s for time_s in times_s if time_s is not None]
        if limits_s:
            await self._clock.wait(self._arrived, max(0.001, min(limits_s)))
        else:
            await self._arrived.wait()
        self._arrived.clear()

    def next_run(self, max_records: int) -> tuple[Input, list[LogRecord]] | None:
        """Take the next run of records, all of one input; None when there is none to take now."""
        if len(self.by_tp) == 1:
            (each,) = self.by_tp.values()
            records = each.take(max_records, None)
            self.ask_more(each)
            return (each, records) if records else None
        return self._merged_run(max_records)

    def _merged_run(self, max_records: int) -> tuple[Input, list[LogRecord]] | None:
        ready = [each for each in self.by_tp.values() if each.head() is not None]
        for each in self.by_tp.values():
            self.ask_more(each)
        self._idle_left_s = self._look_again_s = None
        if len(ready) == len(self.by_tp):
            self._idle_since = None
        elif not ready or not self._may_go_without(ready):
            return None
        first = min(ready, key=Input.place)
        others = [
            each.head_timestamp_ms() - (each.fills_table and not first.fills_table)
            for each in ready
            if each is not first
        ]
        return first, first.take(max_records, min(others) if others else None)

    def _may_go_without(self, ready: list[Input]) -> bool:
        """Whether the inputs without a record were waited for long enough; once they were, until they have one."""
        for each in self.by_tp.values():
            if each in ready or each.limit_reached_by(each.fetched_to):
                continue
            end_offset = self.end_offset(each)
            if end_offset is None or each.fetched_to < end_offset:
                self._idle_since = None
                self._look_again_s = _UNKNOWN_END_S  # the end becomes known without a record to wake us
                return False
        if self._max_task_idle_s > 0:
            now = self._clock.monotonic()
            if self._idle_since is None:
                self._idle_since = now
            left_s = self._idle_since + self._max_task_idle_s - now
            if left_s > _TIME_RESOLUTION_S:
                self._idle_left_s = left_s
                return False
        return True


def _ask_nobody(_: TopicPartition) -> None:
    """Nothing is fetched any more."""
