"""A task: one partition of one sub-topology, the unit of processing, commit and movement.

It ties together its inputs, its agents' feeds and runs, and its outputs. It knows neither the group nor the other
tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from streamflow.clock import Clock
from streamflow.errors import (
    NotHeld,
    RecordError,
    StateCorruptedError,
    StreamFlowError,
    TopologyError,
)
from streamflow.log.api import OffsetMark
from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition
from streamflow.model.serde import BoundCodec
from streamflow.processing.table import Table
from streamflow.processing.topic import Topic
from streamflow.processing.topology import SubTopology
from streamflow.runtime.commit_mark import CommitMark, anchor_of
from streamflow.runtime.derived import Processor
from streamflow.runtime.homes import Homes
from streamflow.runtime.inputs import Input, Inputs
from streamflow.runtime.local_state import LocalState
from streamflow.runtime.outputs import Outputs, OutputTopic, Staged, Targets
from streamflow.runtime.patience import PATIENCE_S, Patience
from streamflow.runtime.recovery_hook import call_on_recover, refuse_in_on_recover
from streamflow.runtime.source_tables import SourceTables
from streamflow.runtime.table_change import TableChange
from streamflow.runtime.task_changes import TaskChanges
from streamflow.runtime.task_feeds import runs_of
from streamflow.runtime.task_tables import TaskTables
from streamflow.runtime.task_view import Delivery, Sealed
from streamflow.sensors import Sensors
from streamflow.state.stage import Stage

_DIRTY_TO_COMMIT = 50_000
_MAX_DIRTY = 200_000

logger = logging.getLogger("streamflow.tasks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every task of a worker shares.

    Attributes:
        clock: Time.
        sensors: Metrics hooks.
        delivery: The processing guarantee.
        targets: Topics that may be written.
        failed: Told when a record stops the worker: agent, error, answers to send at once.
        fail: Told when something else stops it.
        damaged: Told that a task's local state cannot be used, so that it is closed and opened anew.
        ask: Wants one more fetch of a partition.
        end_of: The newest known end of a partition.
        output_waits: Told when a task has something to send.
        max_task_idle_s: See `Inputs`.
        max_unsent_bytes: Unsent output of one task above which it waits.
        homes: Knows the partitions of table keys.
    """

    clock: Clock
    sensors: Sensors
    delivery: Delivery
    targets: Targets
    failed: Callable[[Processor, RecordError, list[Staged]], None]
    fail: Callable[[StreamFlowError], None]
    damaged: Callable[[Task], None]
    ask: Callable[[TopicPartition], None]
    end_of: Callable[[TopicPartition], int | None]
    output_waits: Callable[[], None]
    max_task_idle_s: float
    max_unsent_bytes: int
    homes: Homes


class Task:
    """One partition of one sub-topology in this worker's hands.

    Args:
        sub_topology: Which one.
        partition: Which partition.
        agents: Its agents.
        topics: Its source topics.
        positions: Next offset per source partition.
        shared: What the worker's tasks share.
        mark: What its last commit says; None where there was none.
        local: Its tables and their store; None without tables.
    """

    def __init__(
        self,
        sub_topology: SubTopology,
        partition: int,
        agents: list[Processor],
        topics: list[Topic[Any, Any]],
        positions: Mapping[TopicPartition, int],
        shared: Surroundings,
        mark: CommitMark | None = None,
        local: LocalState | None = None,
    ) -> None:
        self.sub_topology = sub_topology
        self.partition = partition
        self.name = f"{sub_topology.name}-{partition}"
        self.clock = shared.clock
        self.sensors = shared.sensors
        self.delivery = shared.delivery
        self.max_unsent_bytes = shared.max_unsent_bytes
        self.failed = shared.failed
        self.committed: dict[TopicPartition, int] = dict(positions)
        self.outputs = Outputs(shared.targets, shared.output_waits)
        self._targets = shared.targets
        self._topics = {topic.name: topic for topic in topics}
        self._positions = dict(positions)
        inputs = [Input(tp, at, self._timestamp_of(self._topics[tp.topic])) for tp, at in positions.items()]
        self.inputs = Inputs(inputs, shared.clock, shared.max_task_idle_s, shared.ask, shared.end_of)
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        # Its tables can be read, or it is over.
        self.restored = anyio.Event()
        self.state = "created"
        # Its partitions went to another worker: nothing of it is committed any more.
        self.lost = False
        # Whether its agents were started, which are waited for when it is to finish.
        self._has_agents = False
        # Its agents are being cancelled.
        self.is_closing = False
        self._patience = Patience(self.name)
        self.anchor = anchor_of(positions)
        # What the offset of the anchor says in the log: the last commit's id, or that of a later one, which is under
        # way or was given up without an answer.
        self.commit_id = ""
        self.commit_ids_under_way: set[str] = set()
        # The generation in which that was last looked up.
        self.checked_generation = -1
        self.tables: TaskTables | None = None
        self.source_tables: SourceTables | None = None
        self.changes = TaskChanges()
        self._mark = mark
        self._local = local
        self._fail = shared.fail
        self._tell_damaged = shared.damaged
        self._loop = asyncio.get_running_loop()
        self._shared_homes = shared.homes
        if local is not None:
            self._take_tables(local)
        self._runs, self._dispatcher, self._reached = runs_of(self, agents, local)

    def _take_tables(self, local: LocalState) -> None:
        self.tables = local.open_tables(self.partition, self.outputs, self.clock, self._check_home, self._is_damaged)
        if any(table.source is not None for table in local.tables):
            self.source_tables = SourceTables(local.tables, self.partition, self.tables, self.sensors)
            for tp, each in self.inputs.by_tp.items():
                each.fills_table = tp.topic in self.source_tables

    def _check_home(self, table: Table[Any, Any], key: Any, data: bytes) -> None:
        self._shared_homes.check(self.sub_topology, self.partition, table, key, data)

    def _is_damaged(self) -> None:
        """The local state cannot be used: nothing that stands on it is committed, whatever agents make of the error."""
        self.lost = True
        self._loop.call_soon_threadsafe(self._tell_damaged, self)

    # --- what feeds and turns ask ------------------------------------------------------------------------------

    def start_positions(self) -> dict[TopicPartition, int]:
        """Where the task started."""
        return dict(self._positions)

    def topic_of(self, tp: TopicPartition) -> Topic[Any, Any]:
        """The declared topic of a source partition."""
        return self._topics[tp.topic]

    def _timestamp_of(self, topic: Topic[Any, Any]) -> Callable[[LogRecord], int] | None:
        """The topic's timestamp extractor over raw records; None where the record's own timestamp counts."""
        extract = topic.timestamp_ms_of
        return None if extract is None else partial(_extracted, extract, topic.value_codec)

    def reply_output(self, topic: str) -> OutputTopic | None:
        """Where answers go; None when the asking app's reply topic is unknown here."""
        return self.outputs.to(self._targets[topic].topic) if topic in self._targets else None

    def input_ended(self) -> bool:
        """Whether a bounded run has taken everything there is to take: a unit of take() waits for nothing more."""
        return all(each.has_ended() for each in self.inputs.by_tp.values())

    def flush_inputs_at(self, ends: Mapping[TopicPartition, int]) -> None:
        """In a bounded run: written topics seem to end here."""
        for tp, end in ends.items():
            if tp in self.inputs.by_tp and self.inputs.by_tp[tp].flush_at != end:
                self.inputs.by_tp[tp].flush_at = end
                self.inputs.wake()

    # --- life --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the agents until `close`; owned by the worker's task group."""
        try:
            with self._scope:
                if not await self._restored():
                    return
                self._has_agents = True
                async with anyio.create_task_group() as group:
                    for each in self._runs:
                        group.start_soon(self._patience.run, each)
                    if self._dispatcher is not None:
                        group.start_soon(self._dispatcher.run)
                    for each_input in self.inputs.by_tp.values():
                        self.inputs.ask_more(each_input)
        finally:
            self.state = "closed"
            self._is_over()

    async def _restored(self) -> bool:
        """Bring the tables level with the log; False where that failed, or a stop came first."""
        local = self._local
        if self.tables is not None and local is not None:
            if self.state == "finishing":
                return False
            self.state = "restoring"
            try:
                await local.restorer.restore(
                    self.name,
                    self.tables,
                    self._mark or CommitMark(),
                    is_new=self._mark is None,
                    filled=[] if self.source_tables is None else self.source_tables.all(),
                    starts=self._positions,
                )
                for table in local.tables:
                    await call_on_recover(table, self.partition)
            except StateCorruptedError as error:
                self.tables.is_damaged(error)
                return False
            except TopologyError as error:
                # What does not go together may be from before and after another worker had the task.
                if self.tables.damage is None and not await self.delivery.was_overtaken(self):
                    self._fail(error)
                return False
            except StreamFlowError as error:
                if self.tables.damage is None:  # else it is a consequence, and the task is opened anew
                    self._fail(error)
                return False
            if self.state != "restoring":
                return False
        self.state = "running"
        self.restored.set()
        return True

    async def finish_records(self) -> None:
        """Hand out nothing more and wait until every agent is done with the record in its hands."""
        self.state = "finishing"
        if self.tables is not None and not self._has_agents:
            return
        if self._dispatcher is not None:
            self._dispatcher.stopping = True
        for run in self._runs:
            run.feed.cut()
        for run in self._runs:
            await run.feed.parked.wait()

    def cancel(self, patience_s: float = PATIENCE_S) -> None:
        """Cancel the agents; what is uncommitted is dropped with the task.

        Args:
            patience_s: Seconds after which an agent that goes on is left alone and named, > 0.
        """
        self._patience.seconds = patience_s
        if self.state == "created":
            self._is_over()
        self.state = "closing"
        self.is_closing = True
        self.inputs.close()
        for run in self._runs:
            run.feed.cut()
        self._scope.cancel()

    def _is_over(self) -> None:
        self.restored.set()
        self._ended.set()
        for run in self._runs:
            run.feed.parked.set()  # whoever waits for its records to be done waits no more: they are dropped

    async def closed(self) -> None:
        """Wait until the agents are gone, or patience is over."""
        await self._ended.wait()

    @property
    def deaf(self) -> Mapping[str, asyncio.Task[None]]:
        """Agents that went on after they were cancelled and patience was over, by name."""
        return self._patience.deaf

    async def close_tables(self) -> None:
        """Let go of the store, with what is committed in it; changes that were not committed are told so."""
        self.changes.fail(NotHeld(f"task {self.name} was closed before the change was committed"))
        if self.tables is not None:
            await self.tables.close()

    # --- changes of tables from outside ------------------------------------------------------------------------

    @property
    def is_readable(self) -> bool:
        """Whether its tables may be read from outside of its turns: they are restored, and its own."""
        tables = self.tables
        return tables is not None and tables.is_level and self.state in ("restoring", "running") and not self.lost

    def committed_positions(self, table: str) -> dict[TopicPartition, int]:
        """How far it is committed: in its sources, and in a table's changelog, where that is one of its own."""
        positions = {tp: max(0, offset) for tp, offset in self.committed.items()}  # below 0 is in no commit yet
        if self.tables is not None:
            of_table = (
                (tp, self.tables.positions.get(name)) for tp, name in self.tables.changelogs().items() if name == table
            )
            positions.update((tp, offset) for tp, offset in of_table if offset is not None)
        return positions

    async def change(self, table: str, work: Callable[[Stage], Any]) -> Any:
        """Run a function in a turn of the task's own, between records; see `processing.holding.Holder`."""
        refuse_in_on_recover(table)
        if self.lost or self.state in ("finishing", "closing", "closed"):
            raise NotHeld(f"table {table!r}: partition {self.partition} is leaving this process")
        change = TableChange(table, work)
        self.changes.ask(change)
        self.inputs.wake()
        return await change.result()

    def sweep(self) -> None:
        """Delete a few expired values in a turn of the task's own, if it is time to look for them."""
        if self.tables is None or self.state != "running" or self.changes:
            return
        for sweep in self.tables.sweeps:
            if sweep.is_due:
                self.changes.ask(TableChange(sweep.overlay.name, sweep.delete_some))
                self.inputs.wake()

    def make_changes(self) -> None:
        """Make the changes of tables that were asked for from outside; only between units."""
        if self.tables is not None and self.changes.make(self.tables, self.clock.now_ms()):
            self.delivery.hurry()

    # --- positions ---------------------------------------------------------------------------------------------

    def positions(self) -> Mapping[TopicPartition, int]:
        """Next offset to process per source partition, as of now."""
        return self._reached()

    def uncommitted(self) -> dict[TopicPartition, OffsetMark]:
        """Positions that moved since the last commit; back, too, where a topic was made anew."""
        return {tp: OffsetMark(position) for tp, position in self.positions().items() if position != self.committed[tp]}

    def is_changed(self) -> bool:
        """Whether there is anything to commit."""
        return (
            bool(self.uncommitted())
            or self.outputs.waiting
            or (self.tables is not None and self.tables.dirty_entries > 0)
        )

    def is_full(self) -> bool:
        """Whether it holds as much that is in no commit as it may."""
        if self.tables is not None:
            if self.tables.is_backed_up:
                return True
            if (dirty := self.tables.dirty_entries) >= _DIRTY_TO_COMMIT:
                self.delivery.hurry()
                if dirty >= _MAX_DIRTY:
                    return True
        return self.outputs.sealed_bytes >= self.max_unsent_bytes

    async def make_room(self) -> None:
        """Wait until it is not full any more, or may not be."""
        if self.tables is not None and self.tables.is_backed_up:
            await self.tables.has_room()
        else:
            await self.delivery.make_room(self)

    def seal(self) -> Sealed:
        """Take out what the records that are done have made of outputs, tables and positions, in one step."""
        if self.tables is not None and not self.tables.is_level:
            return Sealed(self, {}, [], False, {}, [])
        marks = self.uncommitted()
        tables_sealed = self.tables is not None and self.tables.seal()
        times = self.tables.times() if self.tables is not None else {}
        return Sealed(self, marks, self.outputs.seal(), tables_sealed, times, self.changes.seal())

    def is_committed_as(self, commit_id: str) -> None:
        """The log has a commit of ours."""
        self.commit_id = commit_id
        self.commit_ids_under_way.clear()

    def set_committed(self, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        """The log has these offsets of ours."""
        for tp, mark in offsets.items():
            if tp in self.committed:
                self.committed[tp] = mark.offset

    def waits_for_time(self) -> bool:
        """Whether an agent waits for StreamFlow's time with records in hand."""
        return self.inputs.waits_for_time or any(run.feed.waits_for_time for run in self._runs)

    def awaits_fetch(self, tp: TopicPartition, end_offset: int) -> bool:
        """Whether records below an offset are still to come from the log, and there is room for them."""
        each = self.inputs.by_tp[tp]
        return each.fetched_to < end_offset and each.wants_more

    def unsettled(self) -> str:
        """What is being processed here, in words; empty when nothing is, or all of it waits for StreamFlow's time."""
        if self.tables is not None and self.state in ("created", "restoring"):
            return f"task {self.name} is being restored"
        if self.changes:
            return f"task {self.name} has a table to change"
        if self._dispatcher is not None and self._dispatcher.has_more():
            return f"task {self.name} has records to hand out"
        for run in self._runs:
            if run.feed.in_hand() and not run.feed.waits_for_time:
                tp, record = run.feed.in_hand()[0]
                return f"agent {run.agent.name!r} has {tp}-{record.offset} in hand"
        waiting = self.waits_for_time()
        behind = [str(tp) for tp, each in self.inputs.by_tp.items() if each.head() is not None]
        return f"task {self.name} has records of {', '.join(behind)} to process" if behind and not waiting else ""

    def oldest_in_flight_s(self) -> float:
        """How long the agent that is slowest now has had its record, in seconds; 0 between records."""
        return max((run.feed.in_hand_s() for run in self._runs), default=0.0)


def _extracted(extract: Callable[[Any], int], codec: BoundCodec[Any], record: LogRecord) -> int:
    try:
        return extract(codec.decode(record.value, record.headers))
    except Exception:
        return record.timestamp  # it does not decode: its turn says so, with its place
