"""`streamflow topics APP`: partitions, offsets and the lag of each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, run_async, table, write
from streamflow.clock import SystemClock
from streamflow.log.api import Admin, OffsetMark, TopicDescription
from streamflow.log.connect import connect
from streamflow.model.record import TopicPartition


@dataclass(frozen=True)
class _Partition:
    partition: int
    start_offset: int
    end_offset: int


@dataclass(frozen=True)
class _Committed:
    partition: int
    offset: int
    lag: int


@dataclass(frozen=True)
class _Group:
    group: str
    lag: int
    partitions: list[_Committed]


@dataclass(frozen=True)
class _Topic:
    topic: str
    exists: bool
    internal: bool
    partitions: list[_Partition]
    groups: list[_Group]


def topics(
    session: Session,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, one line a topic.")] = False,
) -> None:
    """List the app's topics with partitions, offsets and the lag of each group that reads them."""
    introduce(session)

    async def run() -> None:
        broker = session.settings.broker
        async with connect(broker, clock=SystemClock(), client_id=f"{session.app.id}-topics") as log:
            found = await _look(log.admin, {name: topic.internal for name, topic in session.app.every_topic().items()})
        write([as_json(asdict(topic)) for topic in found] if json else _for_people(found))

    run_async(run)


async def _look(admin: Admin, declared: Mapping[str, bool]) -> list[_Topic]:
    described = await admin.describe(list(declared))
    partitions = [
        TopicPartition(name, number) for name, topic in described.items() for number in range(topic.partitions)
    ]
    starts = await admin.start_offsets(partitions)
    ends = await admin.end_offsets(partitions)
    groups = {group: await admin.group_offsets(group) for group in await admin.groups()}
    return [_topic(described.get(name), name, internal, starts, ends, groups) for name, internal in declared.items()]


def _topic(
    found: TopicDescription | None,
    name: str,
    internal: bool,
    starts: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    groups: Mapping[str, Mapping[TopicPartition, OffsetMark]],
) -> _Topic:
    if found is None:
        return _Topic(name, False, internal, [], [])
    all_of_it = [TopicPartition(name, number) for number in range(found.partitions)]
    readers: list[_Group] = []
    for group, marks in groups.items():
        committed = [
            _Committed(tp.partition, marks[tp].offset, max(0, ends[tp] - marks[tp].offset))
            for tp in all_of_it
            if tp in marks
        ]
        if committed:
            # A partition without a committed offset is behind by all of it.
            rest = sum(ends[tp] - starts[tp] for tp in all_of_it if tp not in marks)
            readers.append(_Group(group, sum(one.lag for one in committed) + rest, committed))
    partitions = [_Partition(tp.partition, starts[tp], ends[tp]) for tp in all_of_it]
    return _Topic(name, True, internal, partitions, readers)


def _for_people(found: list[_Topic]) -> list[str]:
    rows: list[list[Any]] = []
    for topic in found:
        if not topic.exists:
            rows.append([topic.topic, "does not exist yet", None, None, None, None, None])
        for partition in topic.partitions:
            marks = [
                (g.group, one) for g in topic.groups for one in g.partitions if one.partition == partition.partition
            ]
            row = [topic.topic, partition.partition, partition.start_offset, partition.end_offset]
            if not marks:
                rows.append([*row, None, None, None])
            rows.extend([*row, group, mark.offset, mark.lag] for group, mark in marks)
    numbers = ("start", "end", "committed", "lag")
    return table(["topic", "partition", "start", "end", "group", "committed", "lag"], rows, right=numbers)
