"""Records of one task in several hands at once: `concurrency=N`, and several agents on one source.

A record goes to a lane of each agent by its key, so records of one key are processed in order. A record without key
goes to the lane with the least to do. What is in flight is in the task's ledger.

That is bounded. A unit of `take` that waits for more is given what it lacks, and no more; the other agents go on
meanwhile as long as they keep up. This has a limit, too, at which such a unit is handed out short.

Agents that share a table go in step: each record is processed by one after the other before the next one is handed
out. Else one that runs ahead would change what another finds there for an earlier record.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter
from typing import Any
from zlib import crc32

from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition
from streamflow.processing.stream import View
from streamflow.runtime.derived import Processor
from streamflow.runtime.feed import END_UNIT, Feed, refuse_take_with_concurrency
from streamflow.runtime.ledger import Entry, Ledger
from streamflow.runtime.record_errors import Drop, RecordErrors
from streamflow.runtime.source_tables import SourceTables
from streamflow.runtime.task_view import TaskView
from streamflow.runtime.turn import EndOfHeaders

_IN_FLIGHT_PER_LANE = 64
_RUN_RECORDS = 64
_MAX_IN_FLIGHT = 65_536
_MAX_BEYOND_BYTES = 64 << 20


class LaneFeed(Feed[Entry]):
    """The feed of one lane.

    Args:
        task: The task.
        agent: The agent.
        errors: Decides about records that fail.
        ledger: The task's ledger.
    """

    def __init__(self, task: TaskView, agent: Processor, errors: RecordErrors, ledger: Ledger) -> None:
        super().__init__(task, agent, errors)
        self._ledger = ledger
        self.queue: deque[Entry] = deque()
        self._arrived = asyncio.Event()
        self._entries: list[Entry] = []
        # How many records a unit that waits still lacks; 0 while none waits.
        self.lacking = 0
        self._is_cut_short = False
        self._taken_at_s = 0.0

    def push(self, entry: Entry) -> None:
        """Hand a record to this lane."""
        self.queue.append(entry)
        self._arrived.set()

    def number(self) -> int:
        return self._entries[-1].number if self._entries else 0

    def wake(self) -> None:
        """Look again: the input has ended."""
        self._arrived.set()

    @property
    def has_begun_nothing(self) -> bool:
        """Whether the agent waits for a record, or for more of a unit."""
        return not self.queue and (not self._entries or self.lacking > 0)

    def cut_short(self) -> None:
        """Hand out the unit that waits as it is: no more can be held."""
        self.lacking = 0
        self._is_cut_short = True
        self._arrived.set()

    def cut(self) -> None:
        self.stopping = True
        self.was_cut.set()
        self._arrived.set()

    async def __anext__(self) -> Any:
        self._check_asker()
        self._asking = True
        try:
            while True:
                if self._entries:
                    self._account()
                    self.finish()
                await self._yield_slice()
                entry = await self._next_entry()
                record = self._hold(entry)
                try:
                    return self.decode(record.value)
                except Exception:
                    value = await self.decode_or_resolve(record)
                    if value is not Drop:
                        return value
        finally:
            self._asking = False

    async def _next_entry(self) -> Entry:
        while True:
            entry = await self._entry_within(None)
            if entry is not None:
                return entry

    async def _entry_within(self, timeout_s: float | None, *, lacking: int = 0) -> Entry | None:
        """The next entry; None when the time is over, or a unit waits for `lacking` more and they do not come."""
        if self.stopping and not self._is_overtaken():
            await self.park()
        if not self.queue:
            self._arrived.clear()
            self.waits_for_time = bool(self._entries)
            self.lacking = lacking if self._entries else 0
            self._ledger.ran_dry(self.lacking)
            if timeout_s is None:
                await self._arrived.wait()
            else:
                await self.task.clock.wait(self._arrived, timeout_s)
            self.waits_for_time, self.lacking = False, 0
            self._slice_started_s = perf_counter()
        if self.stopping and not self._is_overtaken():
            await self.park()
        return self.queue.popleft() if self.queue else None

    def _is_overtaken(self) -> bool:
        """Whether an agent has taken this record or a later one: a stop waits for it, or those would come again."""
        return bool(self.queue) and self.queue[0].number <= self._ledger.taken

    def _hold(self, entry: Entry, *, in_unit: bool = False) -> LogRecord:
        if entry.tp != self.tp:
            self._set_source(self.task.topic_of(entry.tp), entry.tp)
        self._entries = [entry]
        self._ledger.taken = max(self._ledger.taken, entry.number)
        record = self.record = entry.record
        self._taken_at_s = perf_counter()
        if record.headers and not in_unit:
            self.take_headers(record)
        return record

    def _account(self) -> None:
        seconds = perf_counter() - self._taken_at_s
        self.task.sensors.records_processed(self.agent.name, self.tp.topic, 1, seconds)

    def finish(self) -> None:
        closed = self.close_stage()
        entries, self._entries = self._entries, []
        self.record = self.unit = None
        if not entries:
            return
        if self.replies:
            self.answer_nothing()
        self.forget_headers()
        closed += self.stage
        self.stage.clear()
        stage = [staged for staged in closed if not isinstance(staged[0], EndOfHeaders)]
        self._ledger.finish(entries, stage)

    def put_back(self) -> None:
        self.drop_stage()
        self.forget_headers()
        self.queue.extendleft(reversed(self._entries))
        self._entries = []
        self.record = self.unit = None

    async def take(self, max_records: int, within_s: float | None, view: View) -> list[Any]:
        if self.agent.concurrency > 1:
            raise refuse_take_with_concurrency(self.agent)
        self._check_asker()
        if self._entries:
            self._account()
            self.finish()
        unit: list[Entry] = []
        items: list[Any] = []
        deadline_s: float | None = None
        self._is_cut_short = False
        while len(items) < max_records:
            left_s = None if deadline_s is None else deadline_s - self.task.clock.monotonic()
            if left_s is not None and left_s <= 0 and not self.queue:
                break
            entry = await self._entry_within(left_s, lacking=max_records - len(items))
            if entry is None:
                if unit and (deadline_s is not None or self._is_cut_short or self.task.input_ended()):
                    break
                continue
            record = self._hold(entry, in_unit=True)
            item = self.decode_for_unit(record, view, not unit)
            if item is END_UNIT and not unit:
                item = await self.resolve_for_unit(record, view)
            if item is END_UNIT:
                self.queue.appendleft(entry)
                break
            if item is not Drop:
                unit.append(entry)
                items.append(item)
            if items and deadline_s is None and within_s is not None:
                deadline_s = self.task.clock.monotonic() + within_s
        self._entries = unit
        self.unit = [(entry.tp, entry.record) for entry in unit]
        self.record = unit[-1].record if unit else None
        self.is_plain = False
        return items


class Dispatcher:
    """Moves the task's records into lanes, bounded by what is in flight.

    Args:
        task: The task.
        ledger: Its ledger.
        lanes: Per agent, its lanes.
        in_step: Whether the agents process each record one after the other.
    """

    def __init__(self, task: TaskView, ledger: Ledger, lanes: list[list[LaneFeed]], *, in_step: bool = False) -> None:
        self._in_step = in_step
        self._task = task
        self._ledger = ledger
        self._lanes = lanes
        self._max_in_flight = _IN_FLIGHT_PER_LANE * max((len(each) for each in lanes), default=1)
        # Size of what was handed out since there was more in flight than that.
        self._beyond_bytes = 0
        self.stopping = False

    def has_more(self) -> bool:
        """Whether records wait in a lane for an agent that is free to take them."""
        return any(lane.queue and not lane.waits_for_time for lanes in self._lanes for lane in lanes)

    async def run(self) -> None:
        """Run until cancelled."""
        task, ledger = self._task, self._ledger
        while True:
            waiting = self._waiting_units()
            if len(ledger) >= self._max_in_flight and not waiting:
                await ledger.wait_moved()
                continue
            if task.changes:
                if self._is_between_units():
                    task.make_changes()
                else:
                    waiting = [lane for lanes in self._lanes for lane in lanes if lane.lacking]
                    if not waiting:
                        await ledger.wait_moved()
                        continue
            if task.is_full():
                await task.make_room()
                continue
            if self.stopping:
                return
            room = 1 if self._in_step else self._room(waiting)
            run = task.inputs.next_run(min(_RUN_RECORDS, room)) if room > 0 else None
            if run is None:
                ledger.unit_waits = bool(waiting)
                await self._wait()
                ledger.unit_waits = False
                continue
            source, records = run
            task.sensors.records_in(source.tp.topic, len(records))
            readers = self._readers(source.tp)
            if task.source_tables is not None and source.tp.topic in task.source_tables:
                await self._fill(task.source_tables, source.tp, records, readers)
                continue
            if not self._lanes:  # the leader topic's task: whatever a stranger writes there is passed over
                ledger.jump(source.tp, records[-1].offset + 1)
                continue
            if self._in_step:
                await self._dispatch_in_step(Entry(source.tp, records[0], len(readers)), readers)
                continue
            for record in records:
                self._dispatch(Entry(source.tp, record, len(readers)), readers)
            if len(ledger) > self._max_in_flight:
                self._beyond_bytes += sum(len(each.key or b"") + len(each.value or b"") for each in records)
            await asyncio.sleep(0)

    def _is_between_units(self) -> bool:
        """Whether no agent has begun with anything that is not in the task's tables yet."""
        if not len(self._ledger):
            return True
        lanes = [lane for each in self._lanes for lane in each]
        tables = self._task.tables
        return all(lane.has_begun_nothing for lane in lanes) and not (tables is not None and tables.waits_for_turns)

    async def _fill(
        self, tables: SourceTables, tp: TopicPartition, records: list[LogRecord], readers: list[list[LaneFeed]]
    ) -> None:
        """Let records fill a table at their places in the ledger, and hand them to the agents that read them, too."""
        ledger = self._ledger
        if not readers and not len(ledger):
            await tables.fill(tp.topic, records)
            ledger.jump(tp, records[-1].offset + 1)
            await asyncio.sleep(0)
            return
        for record in records:
            writes = await tables.writes(tp.topic, record)
            entry = Entry(tp, record, len(readers) + 1)
            ledger.open(entry)
            ledger.finish([entry], tables.staged(writes, entry.number))
            if self._in_step:
                await self._hand_in_step(entry, readers)
            else:
                self._hand(entry, readers)
        await asyncio.sleep(0)

    def _waiting_units(self) -> list[LaneFeed]:
        """The lanes whose unit waits for more, while that is more than is in flight; at the limit they wait no more."""
        ledger = self._ledger
        if len(ledger) < self._max_in_flight:
            self._beyond_bytes = 0
            return []
        waiting = [lane for lanes in self._lanes for lane in lanes if lane.lacking]
        if len(ledger) < _MAX_IN_FLIGHT and self._beyond_bytes < _MAX_BEYOND_BYTES:
            return waiting
        for lane in waiting:
            lane.cut_short()
        return []

    def _room(self, waiting: list[LaneFeed]) -> int:
        """How many records may be taken now.

        For units that wait it is what they lack, where there is any of it; or else what the slowest agent has room for.
        """
        if not waiting:
            return self._max_in_flight - len(self._ledger)
        lacking = [lane.lacking for lane in waiting if not lane.queue and self._is_there(lane)]
        if self._task.changes:
            return max(lacking, default=0)
        backlog = max(len(lane.queue) for lanes in self._lanes for lane in lanes)
        return min(max([*lacking, _IN_FLIGHT_PER_LANE - backlog]), _MAX_IN_FLIGHT - len(self._ledger))

    def _is_there(self, lane: LaneFeed) -> bool:
        """Whether a topic of the lane's agent has a record to hand out."""
        return any(self._task.inputs.has_head(topic.name) for topic in lane.agent.input_topics)

    async def _wait(self) -> None:
        for tp, each in self._task.inputs.by_tp.items():
            jump = each.position_when_drained()
            if jump is not None:
                self._ledger.jump(tp, jump)
        if self._task.input_ended():
            for lanes in self._lanes:
                for lane in lanes:
                    lane.wake()
        await self._task.delivery.idle(self._task)
        await self._task.inputs.wait()

    def _readers(self, tp: TopicPartition) -> list[list[LaneFeed]]:
        """The lanes of the agents that read a topic."""
        return [lanes for lanes in self._lanes if any(topic.name == tp.topic for topic in lanes[0].agent.input_topics)]

    def _dispatch(self, entry: Entry, readers: list[list[LaneFeed]]) -> None:
        self._ledger.open(entry)
        self._hand(entry, readers)

    def _hand(self, entry: Entry, readers: list[list[LaneFeed]]) -> None:
        for lanes in readers:
            _lane_of(entry, lanes).push(entry)

    async def _dispatch_in_step(self, entry: Entry, readers: list[list[LaneFeed]]) -> None:
        """Give a record to one agent after the other: when it is done, or keeps it in a unit that waits for more."""
        self._ledger.open(entry)
        await self._hand_in_step(entry, readers)

    async def _hand_in_step(self, entry: Entry, readers: list[list[LaneFeed]]) -> None:
        for lanes in readers:
            pending, lane = entry.pending, _lane_of(entry, lanes)
            lane.push(entry)
            while entry.pending == pending and not (lane.lacking and not lane.queue):
                await self._ledger.wait_moved()


def _lane_of(entry: Entry, lanes: list[LaneFeed]) -> LaneFeed:
    """Records of one key go to one lane, those without key to the one with the least to do."""
    key = entry.record.key
    if len(lanes) == 1:
        return lanes[0]
    return min(lanes, key=lambda lane: len(lane.queue)) if key is None else lanes[crc32(key) % len(lanes)]
