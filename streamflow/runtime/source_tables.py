"""The tables of one task that are filled from a topic: each of its records takes effect at its place in the order.

A record that fills a table is done at once, by nobody's code. Turns of later records see what it says, those of earlier
ones that are still in progress do not; a unit of `take` sees the table as of its last record, or of the moment it is
handed out. The table is what the topic's partition says up to the task's position, and the store has what it says up to
the committed offset: it is restored from the topic itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.runtime.outputs import Staged
from streamflow.runtime.source_records import SourceRecords
from streamflow.runtime.task_tables import TaskTables
from streamflow.runtime.turn_tables import Written
from streamflow.sensors import Sensors
from streamflow.state.overlay import Overlay
from streamflow.state.shared_stage import SharedEffects
from streamflow.state.stage import Effects
from streamflow.state.values import MISSING


class SourceTable:
    """One table of one task that is filled from a topic.

    Args:
        tp: The source partition.
        table: The table.
        tables: The task's tables.
        sensors: Told of records that cannot be read.
    """

    def __init__(self, tp: TopicPartition, table: Table[Any, Any], tables: TaskTables, sensors: Sensors) -> None:
        self.tp = tp
        self.name = table.name
        self.overlay: Overlay = tables.overlays[table.name]
        self.waiting = tables.waiting_of(table.name)
        self.records = SourceRecords(table.name, table.changelog, table.keys_in_order, sensors)
        self._are_objects = self.overlay.values.are_objects

    async def writes(self, records: Sequence[LogRecord]) -> dict[Any, Any]:
        """What records say, as a table holds it; one that cannot be read is passed over."""
        held: dict[Any, Any] = {}
        for record in records:
            entry = await self.records.entry_loading(self.tp, record)
            if entry is not None:
                _, key, value = entry
                held[key] = value if value is MISSING or self._are_objects else record.value
        return held


class SourceTables:
    """All tables of one task that are filled from topics.

    Args:
        declared: The task's tables.
        partition: The task's partition.
        tables: The same, as the task holds them.
        sensors: Told of records that cannot be read.
    """

    def __init__(
        self, declared: Sequence[Table[Any, Any]], partition: int, tables: TaskTables, sensors: Sensors
    ) -> None:
        self.by_topic: dict[str, list[SourceTable]] = {}
        for table in declared:
            if table.source is not None:
                tp = TopicPartition(table.source.name, partition)
                filled = SourceTable(tp, table, tables, sensors)
                self.by_topic.setdefault(tp.topic, []).append(filled)

    def __contains__(self, topic: object) -> bool:
        """Whether a topic fills a table."""
        return topic in self.by_topic

    def all(self) -> list[SourceTable]:
        """Every table."""
        return [table for tables in self.by_topic.values() for table in tables]

    async def fill(self, topic: str, records: Sequence[LogRecord]) -> None:
        """Let records take effect at once: nothing earlier is in progress."""
        for table in self.by_topic[topic]:
            writes = await table.writes(records)
            if writes:
                table.overlay.merge(writes)

    async def writes(self, topic: str, record: LogRecord) -> list[tuple[SourceTable, dict[Any, Any]]]:
        """What a record says, by table; nothing where it cannot be read."""
        return [(table, writes) for table in self.by_topic[topic] if (writes := await table.writes([record]))]

    def staged(self, writes: Sequence[tuple[SourceTable, dict[Any, Any]]], number: int) -> list[Staged]:
        """Let what a record says be seen by turns of later records, while those of earlier ones are in progress.

        Args:
            writes: What it says.
            number: Its place in the ledger.

        Returns:
            What joins the task's values when the record's turn has come.
        """
        if not writes:
            return []
        effects: list[Effects] = [SharedEffects(table.waiting, held, -1, number) for table, held in writes]
        return [(Written(effects), 0, None, None, [])]
