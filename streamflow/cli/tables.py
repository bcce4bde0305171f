"""`streamflow tables APP`: what tables an app has, and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, run_async, table, write
from streamflow.cli.progress import progress
from streamflow.clock import SystemClock
from streamflow.log.api import Admin, Log
from streamflow.log.connect import connect
from streamflow.model.record import TopicPartition
from streamflow.processing.topology import SubTopology, TableNode
from streamflow.runtime.local_files import local_bytes
from streamflow.runtime.table_reader import TableLog


@dataclass(frozen=True)
class _Changelog:
    topic: str
    exists: bool
    records: int
    end_offsets: list[int]


@dataclass(frozen=True)
class _Table:
    table: str
    key_type: str
    value_type: str
    kind: str
    agents: list[str]
    partitions: int
    changelog: _Changelog
    entries: int
    entries_are_exact: bool
    local_bytes: int
    local_shared_with: list[str]
    ttl_s: float | None
    help: str
    place: str


def tables(
    session: Session,
    count: Annotated[
        bool, typer.Option("--count", help="Read the changelogs to count entries; else they are at most so many.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, one line a table.")] = False,
) -> None:
    """List the app's tables with their types, agents, changelogs and sizes; no store is opened."""
    introduce(session)

    async def run() -> None:
        broker = session.settings.broker
        async with connect(broker, clock=SystemClock(), client_id=f"{session.app.id}-tables") as log:
            found = await _look(session, log, count=count)
        write([as_json(asdict(each)) for each in found] if json else _for_people(found))

    run_async(run)


async def _look(session: Session, log: Log, *, count: bool) -> list[_Table]:
    topology = session.app.topology()
    subs = {name: sub for sub in topology.sub_topologies for name in sub.tables}
    nodes = [node for node in topology.nodes if isinstance(node, TableNode)]
    changelogs = await _changelogs(log.admin, [node.changelog for node in nodes])
    found: list[_Table] = []
    for node in nodes:
        changelog, sub = changelogs[node.changelog], subs.get(node.name)
        counted = await _count(session, log, node.name) if count and sub is not None and changelog.exists else None
        readers = [edge.source for edge in topology.edges if edge.kind == "uses" and edge.target == node.id]
        found.append(_described(session, node, readers, sub, changelog, counted))
    return found


async def _changelogs(admin: Admin, names: list[str]) -> Mapping[str, _Changelog]:
    described = await admin.describe(names)
    tps = {
        name: [TopicPartition(name, number) for number in range(described[name].partitions)]
        for name in names
        if name in described
    }
    everything = [tp for each in tps.values() for tp in each]
    starts = await admin.start_offsets(everything) if everything else {}
    ends = await admin.end_offsets(everything) if everything else {}
    return {
        name: _Changelog(
            name,
            name in described,
            sum(ends[tp] - starts[tp] for tp in tps.get(name, ())),
            [ends[tp] for tp in tps.get(name, ())],
        )
        for name in names
    }


async def _count(session: Session, log: Log, name: str) -> int:
    found = await TableLog.find(session.app, name, log.admin)
    marks = found.marks(await log.admin.group_offsets(session.app.id))
    with progress(f"counting {name}") as report:
        folds = await found.fold(log, dict(enumerate(marks)), on_progress=report)
    return sum(len(fold.live(found.table.ttl_s)) for fold in folds)


def _described(
    session: Session,
    node: TableNode,
    readers: list[str],
    sub: SubTopology | None,
    changelog: _Changelog,
    counted: int | None,
) -> _Table:
    partitions = len(changelog.end_offsets)
    return _Table(
        node.name,
        node.key_type,
        node.value_type,
        node.kind,
        sorted(reader.removeprefix("agent:") for reader in readers),
        partitions,
        changelog,
        # A key has at least one record in the changelog for each time it was written and not compacted away.
        changelog.records if counted is None else counted,
        counted is not None,
        0 if sub is None else local_bytes(session.app, session.settings, sub, partitions),
        [] if sub is None else [name for name in sub.tables if name != node.name],
        node.ttl_s,
        node.help,
        node.place,
    )


def _for_people(found: list[_Table]) -> list[str]:
    rows: list[list[Any]] = []
    for each in found:
        changelog = each.changelog
        shared = f" with {', '.join(each.local_shared_with)}" if each.local_shared_with else ""
        rows.append(
            [
                each.table if each.kind == "changelog" else f"{each.table} ({each.kind})",
                each.key_type,
                each.value_type,
                ", ".join(each.agents) or None,
                each.partitions if changelog.exists else None,
                changelog.topic if changelog.exists else f"{changelog.topic} (does not exist yet)",
                changelog.records if changelog.exists else None,
                " ".join(map(str, changelog.end_offsets)) or None,
                _entries(each),
                f"{_size(each.local_bytes)}{shared}" if each.local_bytes else None,
                None if each.ttl_s is None else f"{each.ttl_s:g} s",
                each.help or None,
            ]
        )
    head = ["table", "key", "value", "agents", "partitions", "changelog", "records", "ends", "entries", "local state"]
    return table([*head, "ttl", "help"], rows, right=("partitions", "records", "entries"))


def _entries(each: _Table) -> str | None:
    if not each.changelog.exists:
        return None
    return str(each.entries) if each.entries_are_exact else f"at most {each.entries}"


def _size(size_bytes: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}" if unit != "bytes" else f"{size_bytes} bytes"
        size_bytes /= 1000  # type: ignore[assignment]
    return f"{size_bytes:.3g} GB"
