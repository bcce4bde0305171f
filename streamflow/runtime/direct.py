"""The feed of a task with one agent and one record in hand: the hot path, hops 3 to 6.

Per record there is one call of `__anext__`: it merges the stage of the record that is done, takes the next record of
the run in hand, decodes it. Everything else (time slices, metrics, sending, waiting) happens between runs. A run is
as long as the agent manages in a few milliseconds, so that nothing on the loop waits longer than a run or a record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import chain, groupby
from operator import itemgetter
from time import perf_counter
from typing import Any

from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition
from streamflow.processing.stream import View
from streamflow.runtime.derived import Processor
from streamflow.runtime.feed import END_UNIT, NO_RECORDS, SLICE_S, Feed
from streamflow.runtime.outputs import Staged, write
from streamflow.runtime.record_errors import Drop, RecordErrors
from streamflow.runtime.source_tables import SourceTables
from streamflow.runtime.task_view import TaskView

_PART_RECORDS = 16
_TIME_RESOLUTION_S = 1e-6


class DirectFeed(Feed[LogRecord]):
    """The feed of a task with one agent and one record in flight: the fast path."""

    def __init__(self, task: TaskView, agent: Processor, errors: RecordErrors) -> None:
        super().__init__(task, agent, errors)
        self._positions = task.start_positions()
        self._together: list[LogRecord] | None = None
        # What of the run in hand comes after `records`: the clock is looked at between parts, since records that cost
        # nothing may be followed by ones that take long.
        self._parts: deque[list[LogRecord]] = deque()
        # Runs that were put back, to be processed before anything new is taken.
        self._again: deque[tuple[TopicPartition, list[LogRecord]]] = deque()

    async def __anext__(self) -> Any:
        stage, undo = self.stage, self.undo
        while True:
            if stage:
                for out, timestamp_ms, key, data, headers in stage:  # `write`, in place: a call less per record
                    if out.append(out.count, timestamp_ms, key, data, headers) is None:
                        out.roll(timestamp_ms, key, data, headers)
                    else:
                        out.count += 1
                stage.clear()
            if undo:
                undo.clear()
            for record in self.records:
                self.record = record
                if record.headers:
                    self.take_headers(record)
                try:
                    return self.decode(record.value)
                except Exception:
                    value = await self.decode_or_resolve(record)
                    if value is not Drop:
                        return value
            if self._parts and perf_counter() - self._run_started_s < SLICE_S:
                self.records = iter(self._parts.popleft())
            else:
                await self._next_run()

    def cut(self) -> None:
        self._parts.clear()
        super().cut()

    def _merge(self) -> None:
        write(self.stage)
        self.stage.clear()
        self.undo.clear()

    def finish(self) -> None:
        self._merge()
        self.is_plain = True
        for tp, record in self.in_hand():
            self._positions[tp] = record.offset + 1
        self.record = None
        self.unit = None

    def put_back(self) -> None:
        self.drop_stage()
        self.forget_headers()
        in_hand = self.in_hand()
        for tp, record in reversed(in_hand):
            self._positions[tp] = record.offset
        if not self.stopping:
            runs = [(tp, [record for _, record in part]) for tp, part in groupby(in_hand, key=itemgetter(0))]
            if rest := [*self.records, *chain.from_iterable(self._parts)]:
                runs.append((self.tp, rest))
            self._again.extendleft(reversed(runs))
        self.records = NO_RECORDS
        self._parts.clear()
        self.record = None
        self.unit = None

    def positions(self) -> Mapping[TopicPartition, int]:
        if self._together is not None:
            return {**self._positions, self.tp: self._together[0].offset}
        in_hand = self.in_hand()
        if not in_hand:
            return self._positions
        positions = dict(self._positions)
        for tp, record in reversed(in_hand):
            positions[tp] = record.offset
        return positions

    # --- runs --------------------------------------------------------------------------------------------------

    async def _next_run(self) -> None:
        self._check_asker()
        self._asking = True
        try:
            await self._wait_for_run()
        finally:
            self._asking = False

    async def _wait_for_run(self, timeout_s: float | None = None) -> bool:
        """Finish what is in hand and get the next run; False when the time is over or the input has ended."""
        keep = self.unit
        if keep is None:
            self.finish()
        self._put_parts_back()
        self._account_run()
        await self._yield_slice()
        task = self.task
        started_s = task.clock.monotonic()
        while True:
            if self.stopping:
                await self.park()
            if task.changes:
                task.make_changes()
            if task.is_full():
                await task.make_room()
                continue
            run = self._again.popleft() if self._again else self._next_of_inputs()
            if run is not None:
                if task.source_tables is None or run[0].topic not in task.source_tables:
                    self._install(*run)
                    return True
                await self._fill(task.source_tables, *run)
                if timeout_s is not None and task.clock.monotonic() - started_s >= timeout_s:
                    return False
                continue
            self._jump_positions()
            if keep is not None and task.input_ended():
                return False
            await task.delivery.idle(task)
            left_s = None if timeout_s is None else timeout_s - (task.clock.monotonic() - started_s)
            if left_s is not None and left_s <= _TIME_RESOLUTION_S:
                return False
            self.waits_for_time = keep is not None
            await task.inputs.wait(left_s)
            self.waits_for_time = False
            self._slice_started_s = perf_counter()

    def _next_of_inputs(self) -> tuple[TopicPartition, list[LogRecord]] | None:
        run = self.task.inputs.next_run(self._run_records)
        if run is None:
            return None
        source, records = run
        self.task.sensors.records_in(source.tp.topic, len(records))
        return source.tp, records

    async def _fill(self, tables: SourceTables, tp: TopicPartition, records: list[LogRecord]) -> None:
        """Records that fill a table are done at once: no agent has anything in its hands but a unit that waits."""
        await tables.fill(tp.topic, records)
        self._positions[tp] = records[-1].offset + 1
        await self._yield_slice()

    def _install(self, tp: TopicPartition, records: list[LogRecord]) -> None:
        if tp != self.tp:
            self._set_source(self.task.topic_of(tp), tp)
        self._run_length = len(records)
        self._run_started_s = perf_counter()
        if len(records) <= _PART_RECORDS:
            self.records = iter(records)
        else:
            self.records = iter(records[:_PART_RECORDS])
            self._parts.extend(
                records[at : at + _PART_RECORDS] for at in range(_PART_RECORDS, len(records), _PART_RECORDS)
            )

    def _put_parts_back(self) -> None:
        """The slice of time is over before the run: what is left of it comes next."""
        if self._parts:
            left = list(chain.from_iterable(self._parts))
            self._parts.clear()
            self._run_length -= len(left)
            self._again.appendleft((self.tp, left))

    def _jump_positions(self) -> None:
        if self.unit is not None:
            return
        for tp, each in self.task.inputs.by_tp.items():
            jump = each.position_when_drained()
            if jump is not None:
                self._positions[tp] = jump

    # --- threads -----------------------------------------------------------------------------------------------

    def take_rest(self, max_records: int) -> list[LogRecord]:
        """Take more records of the run in hand along with the one taken; plain ones only."""
        rest: list[LogRecord] = []
        if self.stage:
            return rest
        if self._parts:
            self.records = chain(self.records, *self._parts)
            self._parts.clear()
        for record in self.records:
            if record.headers or record.value is None:
                self.records = chain((record,), self.records)
                break
            rest.append(record)
            if len(rest) == max_records:
                break
        first = self.record
        if first is not None and rest:
            self._positions[self.tp] = first.offset
            self._together = [first, *rest]
        return rest

    def finish_many(self, stages: list[list[Staged]], rest: list[LogRecord]) -> None:
        """Finish the records whose stages came back; the next one, if any, is the unit in hand."""
        together = self._together or ([self.record] if self.record is not None else [])
        self._together = None
        for stage in stages:
            self.stage[:] = stage
            self._merge()
        if len(stages) < len(together):
            self.record = together[len(stages)]
            self.records = chain(together[len(stages) + 1 :], self.records)
        else:
            self.record = together[-1]

    # --- take --------------------------------------------------------------------------------------------------

    async def take(self, max_records: int, within_s: float | None, view: View) -> list[Any]:
        """See `processing.stream.Source`."""
        self._check_asker()
        if self.unit is not None or self.record is not None:
            self.finish()
        unit: list[tuple[TopicPartition, LogRecord]] = []
        items: list[Any] = []
        deadline_s: float | None = None
        while len(items) < max_records:
            record = next(self.records, None)
            if record is None and self._parts:
                self.records = iter(self._parts.popleft())
                continue
            if record is None:
                left_s = None if deadline_s is None else deadline_s - self.task.clock.monotonic()
                if items and left_s is not None and left_s <= 0:
                    break
                self.unit = unit or None
                if not await self._wait_for_run(left_s if items else None):
                    break
                continue
            self.unit, self.record = None, record
            item = self.decode_for_unit(record, view, not unit)
            if item is END_UNIT and not unit:
                item = await self.resolve_for_unit(record, view)
            if item is END_UNIT:
                self.records = chain((record,), self.records)
                break
            if item is not Drop:
                unit.append((self.tp, record))
                items.append(item)
            if items and deadline_s is None and within_s is not None:
                deadline_s = self.task.clock.monotonic() + within_s
        self.unit = unit
        self.is_plain = False
        self.record = unit[-1][1] if unit else None
        return items
