"""What the workers of a simulation run, and what it has to come to: a fold over each input partition.

The folds know nothing of tasks, turns, stages, ledgers and commits.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import streamflow as sf
from streamflow.log.batch import LogRecord

GROUPS = 3
APP_ID = "simulated"


@dataclass(frozen=True)
class Seen:
    """A record as a fold sees it."""

    offset: int
    key: int
    value: int | None
    """None: it does not decode."""

    @classmethod
    def of(cls, record: LogRecord) -> "Seen":
        assert record.key is not None
        assert record.value is not None
        value = int.from_bytes(record.value, "big", signed=True) if len(record.value) == 8 else None
        return cls(record.offset, int.from_bytes(record.key, "big", signed=True), value)

    def fails(self, work: "Work") -> bool:
        """Whether the agent can make nothing of it; a unit of take() would go as a whole, so that none fails."""
        return self.value is None or (work.kind != "take" and fails(self.value))


@dataclass(frozen=True)
class Work:
    """One agent."""

    kind: str
    source: str
    sink: str
    concurrency: int
    policy: str
    is_slow: bool
    ttl_s: float | None

    @property
    def dead(self) -> str:
        return f"{self.sink}-dead"

    @property
    def table(self) -> str | None:
        return {"sums": f"{self.sink}-sums", "distinct": f"{self.sink}-seen"}.get(self.kind)

    @property
    def input(self) -> str:
        """The topic that the agent itself reads."""
        return f"{APP_ID}-{self.sink}-by-group-repartition" if self.kind == "distinct" else self.source

    @classmethod
    def drawn(cls, draw: random.Random, number: int, source: str) -> "Work":
        kind = draw.choice(["echo", "sums", "sums", "distinct", "take"])
        return cls(
            kind,
            source,
            f"{kind}-{number}",
            concurrency=draw.choice([1, 1, 2, 3]) if kind != "take" else 1,
            policy=draw.choice(["skip", "dead", "retry"]),
            is_slow=draw.random() < 0.4,
            ttl_s=draw.choice([None, None, 86_400.0]),
        )


@dataclass(frozen=True)
class Built:
    """An app as one process has it."""

    app: sf.App
    tables: dict[str, "sf.Table[Any, Any]"] = field(default_factory=dict)


def build(works: Sequence[Work], partitions: int, keys: int, hangs: float, settings: dict[str, Any]) -> Built:
    """Make the app anew, as every process does; so many of its records take seconds."""
    app = sf.App(APP_ID, **settings)
    built = Built(app)
    sources = {name: app.topic(name, key_type=int, value_type=int) for name in sorted({work.source for work in works})}
    for work in works:
        _add(built, work, sources[work.source], partitions, keys, hangs)
    return built


def _add(built: Built, work: Work, source: "sf.Topic[int, int]", partitions: int, keys: int, hangs: float) -> None:
    app = built.app
    sink = app.topic(work.sink, key_type=int, value_type=str, partitions=partitions)
    options: dict[str, Any] = {"name": work.sink, "sink": sink, "concurrency": work.concurrency}
    last = sf.DeadLetter(app.topic(work.dead, partitions=1)) if work.policy == "dead" else sf.Skip()
    options["on_error"] = sf.Retry(1, backoff_s=0.05, then=last) if work.policy == "retry" else last
    # Drawn anew in each process: how long things take is nobody's promise.
    pace = random.Random(random.random())

    async def takes_time(value: int = 0) -> None:
        if hangs and pace.random() < hangs:
            await asyncio.sleep(pace.uniform(1.0, 5.0))
        if work.is_slow and (pace.random() < 0.3 or fails(value)):  # what fails does so late
            await asyncio.sleep(pace.uniform(0, 0.3))

    if work.kind == "echo":

        @app.agent(source, **options)
        async def echo(stream: sf.Stream[int]) -> AsyncIterator[str]:
            async for value in stream:
                await takes_time(value)
                yield echoed(value)

    elif work.kind == "take":

        @app.agent(source, **options)
        async def take(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[str]]:
            async for unit in stream.take(4, within_s=0.3):
                await takes_time()
                for value in unit:
                    yield sf.Out(f"{value}:", key=key_of(value, keys))

    elif work.kind == "sums":
        sums = app.table(str(work.table), key_type=int, value_type=int, default=int, ttl_s=work.ttl_s)
        built.tables[sums.name] = sums

        @app.agent(source, tables=[sums], **options)
        async def add(stream: sf.Stream[int]) -> AsyncIterator[str]:
            async for event in stream.events():
                sums[event.key] += event.value
                await takes_time(event.value)
                check(event.value)
                yield f"{event.value}:{sums[event.key]}"

    else:
        groups = source.group_by(group_of, name=f"{work.sink}-by-group", key_type=int)
        seen = app.table(str(work.table), key_type=int, value_type=list[int], default=list, ttl_s=work.ttl_s)
        built.tables[seen.name] = seen

        @app.agent(groups, tables=[seen], **options)
        async def count(stream: sf.Stream[int]) -> AsyncIterator[str]:
            async for event in stream.events():
                kept = seen[event.key]
                if event.value not in kept:
                    seen[event.key] = [*kept, event.value]
                await takes_time(event.value)
                check(event.value)
                yield f"{event.value}:{len(seen[event.key])}"


def fails(value: int) -> bool:
    return value % 11 == 10


def check(value: int) -> None:
    if fails(value):
        raise ValueError(f"simulated: {value}")


def echoed(value: int) -> str:
    check(value)
    return f"{value}:"


def key_of(number: int, keys: int) -> int:
    """The key of an input record, of so many."""
    return number * 7 % keys


def group_of(value: int) -> int:
    return value % GROUPS


# --- what it has to come to --------------------------------------------------------------------------------------


@dataclass
class Folded:
    """What one agent makes of one input partition: outputs in order, table, and what it could not process."""

    outputs: list[tuple[int, str]] = field(default_factory=list)
    table: dict[int, Any] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)


def fold(work: Work, records: Iterable[Seen]) -> Folded:
    """What an agent makes of its input (for `distinct`, of a partition of its repartition topic)."""
    folded, table = Folded(), {}
    for each in records:
        if each.fails(work):
            folded.failed.append(each.offset)
            continue
        assert each.value is not None
        if work.kind == "sums":
            table[each.key] = table.get(each.key, 0) + each.value
            folded.outputs.append((each.key, f"{each.value}:{table[each.key]}"))
        elif work.kind == "distinct":
            kept = table.setdefault(each.key, [])
            if each.value not in kept:
                kept.append(each.value)
            folded.outputs.append((each.key, f"{each.value}:{len(kept)}"))
        else:
            folded.outputs.append((each.key, f"{each.value}:"))
    folded.table = table
    return folded
