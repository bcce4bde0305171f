"""Committed values of a table, folded from its changelog: beside running workers, and without opening their stores.

What is committed is decided as a restore decides it (`runtime/restore.py`): everything below the high watermark where
changelog and offsets are committed together, else everything below the positions in the task's commit mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamflow.clock import SystemClock
from streamflow.config import nearest
from streamflow.errors import ConfigurationError, OffsetOutOfRangeError, ProductionError, StreamFlowError
from streamflow.log.api import Admin, Fetched, Log, OffsetMark, TopicDescription
from streamflow.log.batch import RecordBatch
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.changelogs import MIN_COMPACTION_LAG_MS
from streamflow.runtime.commit_mark import CommitMark, letters_of, refuse_other_serializers
from streamflow.runtime.homes import Homes
from streamflow.sensors import Sensors


@dataclass(slots=True)
class Fold:
    """What one partition of a changelog comes to.

    Attributes:
        partition: Its number.
        values: By key bytes: the record's timestamp and value bytes.
        uncommitted: Value and timestamp of the newest record of a key that no offset was committed with.
        stream_time_ms: Where values expire: the time they are held against; -1 where there is none yet.
        records: How many records were read.
    """

    partition: int
    values: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    uncommitted: dict[bytes, tuple[int, bytes | None]] = field(default_factory=dict)
    stream_time_ms: int = -1
    records: int = 0

    def live(self, ttl_s: float | None) -> dict[bytes, bytes]:
        """Key and value bytes without what has expired.

        Args:
            ttl_s: The table's.
        """
        if ttl_s is None:
            return {key: value for key, (_, value) in self.values.items()}
        ttl_ms = round(ttl_s * 1000)
        return {key: value for key, (at_ms, value) in self.values.items() if at_ms + ttl_ms > self.stream_time_ms}


@dataclass(slots=True)
class _Span:
    fold: Fold
    acknowledged: int
    target: int


@dataclass(frozen=True, slots=True)
class TableLog:
    """A table's changelog in a log, and the task partitions it belongs to.

    Attributes:
        table: The table.
        sub: What it is processed with.
        changelog: The topic as it is.
        sources: Per partition the source partitions of its task.
        homes: Knows the partitions of keys.
    """

    table: Table[Any, Any]
    sub: SubTopology
    changelog: TopicDescription
    sources: Sequence[Sequence[TopicPartition]]
    homes: Homes

    @classmethod
    async def find(cls, app: Declarations, name: str, admin: Admin) -> TableLog:
        """Look a table up.

        Args:
            app: The app.
            name: The table's name.
            admin: The log's.

        Raises:
            ConfigurationError: The app has no such table, or no agent uses it.
            StreamFlowError: The log has no changelog of it yet.
        """
        table, sub = table_of(app, name), sub_of(app, name)
        described = await admin.describe([table.changelog.name, *sub.topics])
        changelog = described.get(table.changelog.name)
        if changelog is None:
            raise StreamFlowError(
                f"table {name!r} has no changelog {table.changelog.name!r} in this log yet: a worker of the app makes "
                "it when it starts"
            )
        sources = [
            [
                TopicPartition(topic, number)
                for topic in sub.topics
                if topic in described and number < described[topic].partitions
            ]
            for number in range(changelog.partitions)
        ]
        counts = dict.fromkeys(sub.topics, changelog.partitions)
        homes = Homes(app.every_topic(), counts, Sensors(), is_strict=True)
        return cls(table, sub, changelog, sources, homes)

    def home_of(self, key: Any) -> int:
        """The partition of a key.

        Raises:
            ProductionError: It is not of the table's key type, or `partition_by=` gives no key of the source.
        """
        return self.homes.of(self.sub, self.table, key)

    def marks(self, offsets: Mapping[TopicPartition, OffsetMark]) -> list[CommitMark]:
        """The commit mark of each partition's task.

        Args:
            offsets: What the app's group has committed.
        """
        if self.table.source is not None:  # its values are the source's records that were processed
            tps = [TopicPartition(self.changelog.name, number) for number in range(self.changelog.partitions)]
            return [CommitMark("", {self.table.name: offsets[tp].offset if tp in offsets else 0}) for tp in tps]
        return [CommitMark.of_task({tp: offsets.get(tp) for tp in each}) or CommitMark() for each in self.sources]

    @property
    def letters(self) -> str:
        """How its changelog is written under its types of today, see `letters_of`."""
        return letters_of(self.table.changelog.value_codec.serializer, self.table.key_codec.serializer)

    def refuse_other_serializers(self, marks: Sequence[CommitMark]) -> None:
        """Refuse to read what other serializers wrote, as a worker's start does; one partition of it refuses all.

        Args:
            marks: Of `marks`.

        Raises:
            TopologyError: A partition was written so.
        """
        for number, mark in enumerate(marks):
            refuse_other_serializers(f"partition {number}", {self.table.name: self.letters}, mark)

    async def fold(
        self,
        log: Log,
        marks: Mapping[int, CommitMark],
        *,
        wanted: Callable[[bytes], bool] = lambda key: True,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Fold]:
        """Read partitions of the changelog from their start to their high watermark, read committed.

        Args:
            log: The open log.
            marks: What the tasks' last commits say, by partition: these partitions are read.
            wanted: Called once per record with its key; what it does not want is not kept.
            on_progress: Told of offsets passed and offsets to pass.

        Returns:
            One per partition, in order of number.

        Cancellation: nothing is left behind.
        """
        topic, name = self.changelog.name, self.table.name
        tps = {TopicPartition(topic, number): marks[number] for number in sorted(marks)}
        starts = await log.admin.start_offsets(list(tps))
        targets = await log.admin.high_watermarks(list(tps))
        spans = {
            tp: _Span(
                Fold(tp.partition, stream_time_ms=mark.times.get(name, -1)), _end(mark, name, targets[tp]), targets[tp]
            )
            for tp, mark in tps.items()
        }
        total = sum(targets[tp] - starts[tp] for tp in tps)
        positions = dict(starts)
        async with log.reader("tables") as reader:
            for tp in tps:
                if starts[tp] < targets[tp]:
                    reader.add(tp, starts[tp])
                    reader.ask(tp)
            while any(positions[tp] < targets[tp] for tp in tps):
                for fetched in await reader.receive():
                    tp = fetched.tp
                    if fetched.error is not None:
                        positions[tp] = _restarted(spans[tp], fetched)
                        reader.add(tp, positions[tp])
                    else:
                        _take(spans[tp], fetched, wanted)
                        positions[tp] = fetched.next_offset
                    if positions[tp] < targets[tp]:
                        reader.ask(tp)
                on_progress(sum(min(positions[tp], targets[tp]) - starts[tp] for tp in tps), total)
        for span in spans.values() if self.table.source is None else ():
            self._keep_what_was_compacted(span.fold)
        return [span.fold for span in spans.values()]

    def _keep_what_was_compacted(self, fold: Fold) -> None:
        """Old updates that are in no commit stand where nothing older is left, as a restore has it."""
        gone_before_ms = SystemClock().now_ms() - MIN_COMPACTION_LAG_MS
        for key, (at_ms, value) in list(fold.uncommitted.items()):
            if self.table.ttl_s is None and at_ms < gone_before_ms and value is not None and key not in fold.values:
                fold.values[key] = (at_ms, value)
                del fold.uncommitted[key]


def table_of(app: Declarations, name: str) -> Table[Any, Any]:
    """A table by its name.

    Raises:
        ConfigurationError: The app has none of that name.
    """
    if name in app.global_tables:
        raise ConfigurationError(
            f"{name!r} is a global table: its values are the records of topic {app.global_tables[name].source.name!r}, "
            "which `streamflow tail` shows and `streamflow send` writes"
        )
    if name not in app.tables:
        raise ConfigurationError(f"app {app.id!r} has no table {name!r}{nearest(name, list(app.tables))}")
    return app.tables[name]


def changelog_key(table: Table[Any, Any], key: Any) -> bytes:
    """A key as the changelog has it, whichever of its equals it is (0.0 and -0.0, one moment in two time zones).

    Raises:
        ProductionError: It is not of the table's key type, or has no place in the order.
    """
    order = table.keys_in_order
    place = order.encode(key)
    data = table.key_codec.encode(key if order.is_canonical else order.decode(place))
    if data is None:
        raise ProductionError(f"table {table.name!r}: a key cannot be null")
    return data


def sub_of(app: Declarations, name: str) -> SubTopology:
    """What a table is processed with.

    Raises:
        ConfigurationError: No agent uses it.
    """
    for sub in app.topology().sub_topologies:
        if name in sub.tables:
            return sub
    raise ConfigurationError(
        f"no agent uses table {name!r} ({app.tables[name].place}), so nothing keeps it: name it in an agent, or in its "
        "tables="
    )


def _end(mark: CommitMark, table: str, target: int) -> int:
    return target if mark.changelogs is None else min(target, mark.changelogs.get(table, target))


def _restarted(span: _Span, fetched: Fetched) -> int:
    """The changelog was purged under the reader: what it begins with now is all there is."""
    if not isinstance(fetched.error, OffsetOutOfRangeError):
        raise fetched.error or StreamFlowError(f"{fetched.tp}: nothing was fetched")
    span.fold.values.clear()
    span.fold.uncommitted.clear()
    return fetched.error.log_start


def _take(span: _Span, fetched: Fetched, wanted: Callable[[bytes], bool]) -> None:
    for batch in fetched.batches:
        _take_batch(span, batch, wanted)


def _take_batch(span: _Span, batch: RecordBatch, wanted: Callable[[bytes], bool]) -> None:
    fold = span.fold
    for record in batch.open():
        offset, key, value = record.offset, record.key, record.value
        if offset >= span.target or key is None:
            continue
        fold.records += 1
        if offset >= span.acknowledged:
            if not wanted(key):
                continue
            fold.uncommitted[key] = (record.timestamp, value)
            continue
        if record.timestamp > fold.stream_time_ms:
            fold.stream_time_ms = record.timestamp
        if not wanted(key):
            continue
        if value is None:
            fold.values.pop(key, None)
        else:
            fold.values[key] = (record.timestamp, value)
