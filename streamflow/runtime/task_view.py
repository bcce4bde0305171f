"""What feeds, turns and commits need of a task: the seam that keeps the runtime's modules free of import cycles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from streamflow.clock import Clock
from streamflow.errors import RecordError
from streamflow.log.api import OffsetMark
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.processing.topic import Topic
from streamflow.processing.topology import SubTopology
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.derived import Processor
from streamflow.runtime.inputs import Inputs
from streamflow.runtime.outputs import Outputs, OutputTopic, Staged
from streamflow.runtime.source_tables import SourceTables
from streamflow.runtime.table_change import TableChange
from streamflow.runtime.task_changes import TaskChanges
from streamflow.runtime.task_tables import TaskTables
from streamflow.sensors import Sensors


class Delivery(Protocol):
    """How outputs and offsets reach the log: a processing guarantee, as tasks see it."""

    async def idle(self, task: TaskView) -> None:
        """The task's input ran empty: send now what need not wait for a commit."""

    async def make_room(self, task: TaskView) -> None:
        """The task holds as much unsent output as it may: wait until some of it is with the log."""

    async def was_overtaken(self, task: TaskView) -> bool:
        """Look up whether another worker has committed for a task since it was opened; then it is lost, and told."""
        ...

    def hurry(self) -> None:
        """Somebody waits for what is done: do not let it wait for the commit interval."""


class TaskView(Protocol):
    """A task as its feeds and the commit see it; `task.Task` is the one implementation."""

    name: str
    clock: Clock
    sensors: Sensors
    delivery: Delivery
    inputs: Inputs
    outputs: Outputs
    sub_topology: SubTopology
    committed: dict[TopicPartition, int]
    lost: bool
    is_closing: bool
    changes: TaskChanges
    anchor: TopicPartition
    commit_id: str
    commit_ids_under_way: set[str]
    checked_generation: int
    tables: TaskTables | None
    source_tables: SourceTables | None
    failed: Callable[[Processor, RecordError, list[Staged]], None]

    def start_positions(self) -> dict[TopicPartition, int]:
        """Where the task started."""
        ...

    def topic_of(self, tp: TopicPartition) -> Topic[Any, Any]:
        """The declared topic of a source partition."""
        ...

    def reply_output(self, topic: str) -> OutputTopic | None:
        """Where answers go; None when the asking app's reply topic is unknown here."""
        ...

    def input_ended(self) -> bool:
        """Whether a bounded run has taken everything there is to take."""
        ...

    def make_changes(self) -> None:
        """Make the changes of tables that were asked for from outside; only between units."""

    def is_full(self) -> bool:
        """Whether it holds as much that is in no commit as it may."""
        ...

    async def make_room(self) -> None:
        """Wait until it is not full any more, or may not be."""

    def is_changed(self) -> bool:
        """Whether there is anything to commit."""
        ...

    def seal(self) -> Sealed:
        """Take out what the records that are done have made of outputs, tables and positions, in one step."""
        ...

    def uncommitted(self) -> dict[TopicPartition, OffsetMark]:
        """Positions that moved since the last commit."""
        ...

    def is_committed_as(self, commit_id: str) -> None:
        """The log has a commit of ours."""

    def set_committed(self, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        """The log has these offsets of ours."""


@dataclass(slots=True)
class Sealed:
    """What one task has to commit; it stays as it is until the log has decided about it.

    Attributes:
        task: The task.
        marks: The positions that moved.
        batches: Outputs and changelog records, in order.
        tables_sealed: Whether its tables changed.
        times: Stream time of tables whose values expire.
        changes: Changes from outside that are in it.
    """

    task: TaskView
    marks: dict[TopicPartition, OffsetMark]
    batches: list[tuple[TopicPartition, SealedBatch]]
    tables_sealed: bool
    times: Mapping[str, int]
    changes: Sequence[TableChange]

    def __bool__(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.marks or self.batches or self.tables_sealed)

    def marked(self, commit_id: str, changelogs: Mapping[str, int] | None = None) -> dict[TopicPartition, OffsetMark]:
        """The positions, the anchor's with a commit mark; it is there even where it did not move.

        Args:
            commit_id: The commit's id.
            changelogs: See `CommitMark`.
        """
        anchor = self.task.anchor
        offset = self.marks[anchor].offset if anchor in self.marks else self.task.committed[anchor]
        tables = self.task.tables
        incarnations, serializers = ({}, {}) if tables is None else (tables.incarnations, tables.serializers)
        mark = CommitMark(commit_id, changelogs, self.times, incarnations, serializers)
        return {**self.marks, anchor: OffsetMark(offset, mark.metadata())}

    def committed(self, commit_id: str, ends: Mapping[TopicPartition, int]) -> None:
        """The log has it.

        Args:
            commit_id: The commit's id.
            ends: The offset after the last record, per partition that was written.
        """
        task = self.task
        task.set_committed(self.marks)
        task.is_committed_as(commit_id)
        if task.tables is not None:
            task.tables.reached(self.marks)
        if task.tables is not None and self.tables_sealed:
            task.tables.settle(ends, self.times)
        for change in self.changes:
            change.committed()
