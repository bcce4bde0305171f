"""Values of tables that need schemas from a registry: after a restart these are loaded before anything is read."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

import streamflow as sf
from streamflow.runtime import stored_schemas
from streamflow.testing import TestApp
from tests.runtime.machine import Machine
from tests.runtime.waiting import until


class Registry:
    """Schemas by id, for every process; each schema is the name of a field."""

    def __init__(self) -> None:
        self.schemas: dict[int, str] = {}
        self.is_away = False

    def serializer(self, writes: int, **options: Any) -> Registered:
        """What one process has: it knows the schema that it writes."""
        self.schemas.setdefault(writes, f"field{writes}")
        return Registered(self, writes, **options)


class Registered:
    """A serializer as those for Confluent's registry are: an id, then what the schema of that id says."""

    def __init__(self, registry: Registry, writes: int, *, knows_own: bool = True, forgets: bool = False) -> None:
        self.registry = registry
        self.writes = writes
        self.known = {writes: registry.schemas[writes]} if knows_own else {}
        self.forgets = forgets
        self.loads: list[int] = []

    def bind(self, type: Any, *, topic: str, part: str) -> Registered:
        return self

    def encode(self, value: dict[str, int], headers: Any) -> bytes:
        return bytes([self.writes]) + json.dumps({self.registry.schemas[self.writes]: value["n"]}).encode()

    def decode(self, data: bytes, headers: Any) -> dict[str, int]:
        if data[0] not in self.known:
            raise sf.NeedSchema(data[0])
        return {"n": json.loads(data[1:])[self.known[data[0]]]}

    async def load_schema(self, id: int | str) -> None:
        await asyncio.sleep(0)
        if self.registry.is_away:
            raise ConnectionError("the registry does not answer")
        self.loads.append(int(id))
        if not self.forgets:
            self.known[int(id)] = self.registry.schemas[int(id)]


def counting(serializer: Any) -> tuple[sf.App, Any, Any]:
    """An app that counts by key, in values that the serializer writes."""
    app = sf.App("t", partitions=2)
    source = app.topic("source", key_type=str, value_type=int)
    sink = app.topic("sink", key_type=str, value_type=int)
    counts = app.table("counts", key_type=str, value_type=dict[str, int], value_serializer=serializer)

    @app.agent(source, sink=sink)
    async def count(stream: sf.Stream[int, str]):
        async for event in stream.events():
            entry = counts.get(event.key, {"n": 0})
            counts[event.key] = {"n": entry["n"] + 1}
            yield counts[event.key]["n"]

    return app, source, counts


KEYS = [f"k{number}" for number in range(20)]


async def worked(machine: Machine, made: tuple[sf.App, Any, Any], keys: list[str] = KEYS) -> dict[str, int]:
    """Let one worker of that app process a record for each key; what it then reads outside of turns."""
    app, source, counts = made
    running = await machine.start(app=app)
    for key in keys:
        await machine.send(source, 1, key=key)
    await machine.settle()
    found = {key: counts[key]["n"] for key in KEYS}
    assert {key: value["n"] for key, value in counts.items()} == found
    await machine.stop(running)
    return found


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
@pytest.mark.parametrize("keeps_its_state", [True, False])
async def test_after_a_restart_every_schema_is_there_before_anything_is_read(
    tmp_path, monkeypatch, keeps_its_state, guarantee
):
    monkeypatch.setattr(stored_schemas, "_VALUES_AT_ONCE", 3)
    registry = Registry()
    wanted = Counter[str]()
    for writes, keys in ((1, KEYS), (2, KEYS[:10]), (3, KEYS)):
        serializer = registry.serializer(writes)
        app, source, counts = counting(serializer)
        folder = tmp_path / ("data" if keeps_its_state else str(writes))
        options = {"data_dir": str(folder), "processing_guarantee": guarantee, "commit_interval_ms": 20}
        async with app.running(broker=f"sqlite:///{tmp_path}/log.db", **options):
            assert {key: value["n"] for key, value in counts.items()} == wanted
            for key in keys:
                await source.send(key=key, value=1)
            wanted.update(keys)
            await until(lambda: {key: value["n"] for key, value in counts.items()} == wanted, within_s=20)  # noqa: B023
        assert set(serializer.loads) == set(range(1, writes))


async def test_a_crash_leaves_nothing_that_cannot_be_read():
    registry = Registry()
    app, source, counts = counting(registry.serializer(1))
    async with Machine(app, processing_guarantee="at_least_once") as machine:
        await worked(machine, (app, source, counts))
        running = await machine.start(app=app)
        for key in KEYS:
            await machine.send(source, 1, key=key)
        await machine.crash(running)
        assert await worked(machine, counting(registry.serializer(2)), []) == dict.fromkeys(KEYS, 2)


async def test_changes_and_visits_read_old_values_too():
    registry = Registry()
    first = counting(registry.serializer(1))
    async with Machine(first[0]) as machine:
        await worked(machine, first)
        app, _, counts = counting(registry.serializer(2))
        running = await machine.start(app=app)
        changing = asyncio.create_task(counts.update_async("k1", lambda value: {"n": value["n"] + 10}))
        visiting = asyncio.create_task(app.visit(counts, lambda key, value: {"n": value["n"] + 100}))
        await machine.until(lambda: done(changing, visiting))
        assert counts["k1"]["n"] == 111
        assert counts["k2"] == {"n": 101}
        await machine.stop(running)


async def done(*tasks: asyncio.Task[Any]) -> bool:
    await asyncio.sleep(0)
    return all(task.done() for task in tasks)


async def test_a_registry_that_is_away_stops_the_worker_before_it_processes_anything():
    registry = Registry()
    first = counting(registry.serializer(1))
    async with Machine(first[0]) as machine:
        await worked(machine, first)
        before = await machine.committed()
        registry.is_away = True
        app, source, _ = counting(registry.serializer(2))
        await machine.send(source, 1, key="k1")
        running = machine.launch(app=app)
        with pytest.raises(
            sf.StateError, match=r"table 'counts', partition \d: stored values need schema 1.*ConnectionError"
        ):
            await machine.ended(running)
        assert await machine.committed() == before
        registry.is_away = False
        assert (await worked(machine, counting(registry.serializer(2)), []))["k1"] == 2


async def test_a_codec_that_keeps_nothing_is_named():
    registry = Registry()
    first = counting(registry.serializer(1))
    async with Machine(first[0]) as machine:
        await worked(machine, first)
        running = machine.launch(app=counting(registry.serializer(2, forgets=True))[0])
        with pytest.raises(sf.StateError, match=r"still asks for when load_schema\(1\) is done"):
            await machine.ended(running)


async def test_a_schema_that_was_forgotten_later_is_an_error_of_who_reads():
    registry = Registry()
    serializer = registry.serializer(1)
    app, source, counts = counting(serializer)
    async with TestApp(app) as test:
        await test.send(source, 1, key="k1")
        await test.settle()
        serializer.known.clear()
        with pytest.raises(
            sf.StateError, match="value of the key 'k1' needs schema 1, which its serializer has not got"
        ):
            counts["k1"]


async def test_what_a_serializer_cannot_read_back_is_not_written():
    app, source, _ = counting(Registry().serializer(1, knows_own=False))

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(source, 1, key="k1")
            await test.settle()

    with pytest.raises(sf.ProductionError, match="table 'counts': its serializer wrote a value with schema 1"):
        await run()


def test_keys_that_need_schemas_are_refused():
    with pytest.raises(sf.SchemaError, match=r"table 'x' \(.*\): key_serializer=Registered loads schemas, so one key"):
        sf.App("t").table("x", key_type=str, value_type=int, key_serializer=Registry().serializer(1))
