# ruff: noqa: PERF401 - an agent's own loop is what is tested
"""How much of a task is in flight when a unit of `take` waits beside another agent, and what a crash then leaves."""

import asyncio

import pytest

import streamflow as sf
from streamflow.runtime import lanes
from streamflow.runtime.ledger import Ledger
from tests.runtime.machine import Machine, Running
from tests.runtime.waiting import until

_BOUND = 64


def ledger_of(running: Running) -> Ledger:
    manager = running.worker.manager
    assert manager is not None
    (task,) = manager.running()
    assert task._dispatcher is not None
    return task._dispatcher._ledger


class Beside:
    """An app with `batch`, which takes units, beside `each`, which processes one record per opening of its gate."""

    def __init__(self, name: str, unit: int, within_s: float | None = None) -> None:
        self.app = sf.App(name)
        self.numbers = self.app.topic("numbers", key_type=str, value_type=int, partitions=1)
        self.gate = asyncio.Event()
        self.units: list[list[int]] = []
        self.seen: list[int] = []

        @self.app.agent(self.numbers)
        async def batch(stream: sf.Stream[int]) -> None:
            async for numbers in stream.take(unit, within_s):
                self.units.append(numbers)

        @self.app.agent(self.numbers)
        async def each(number: int) -> None:
            await self.gate.wait()
            self.seen.append(number)


async def send(machine: Machine, topic: "sf.Topic[str, int]", count: int) -> None:
    """Send at once, so that the records share batches."""
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(machine.send(topic, number, key="k"))


async def at_rest(ledger: Ledger) -> int:
    """How many records are in flight once that does not change any more."""
    length, same = -1, 0
    while same < 200:
        same = same + 1 if len(ledger) == length else 0
        length = len(ledger)
        await asyncio.sleep(0)
    return length


async def test_a_unit_that_waits_gets_what_it_lacks_and_no_more_while_another_agent_is_slow() -> None:
    beside = Beside("lacks", 100)
    async with Machine(beside.app) as machine:
        await send(machine, beside.numbers, 2000)
        running = await machine.start()
        await until(lambda: beside.units)
        assert await at_rest(ledger_of(running)) <= _BOUND + 100
        beside.gate.set()
        await machine.settle()
        assert beside.units == [list(range(start, start + 100)) for start in range(0, 2000, 100)]
        assert beside.seen == list(range(2000))


async def test_what_is_in_flight_is_bounded_however_fast_the_units_are() -> None:
    app = sf.App("bounded")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    in_flight: list[int] = []

    @app.agent(numbers)
    async def batch(stream: sf.Stream[int]) -> None:
        async for _ in stream.take(7):
            in_flight.append(len(ledger_of(running)))

    @app.agent(numbers)
    async def slow(number: int) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        in_flight.append(len(ledger_of(running)))

    async with Machine(app) as machine:
        await send(machine, numbers, 1000)
        running = await machine.start()
        await until(lambda: len(in_flight) >= 1000)
        assert max(in_flight) <= _BOUND + 7


@pytest.mark.parametrize("limit", ["records", "bytes"])
async def test_at_the_limit_of_what_is_held_a_unit_is_handed_out_short(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "records":
        monkeypatch.setattr(lanes, "_MAX_IN_FLIGHT", 300)
    else:
        monkeypatch.setattr(lanes, "_MAX_BEYOND_BYTES", 500)
    beside = Beside("short", 1000)
    async with Machine(beside.app) as machine:
        await send(machine, beside.numbers, 2000)
        running = await machine.start()
        await until(lambda: beside.units)
        held = await at_rest(ledger_of(running))
        assert held == len(beside.units[0]) <= 300
        beside.gate.set()
        await until(lambda: len(beside.seen) == 2000)
        await machine.stop(running)
        taken = [number for unit in beside.units for number in unit]
        assert taken == list(range(len(taken)))
        assert await machine.committed() == {sf.TopicPartition("numbers", 0): len(taken)}


async def test_a_crash_leaves_nothing_committed_that_is_unfinished() -> None:
    beside = Beside("crash", 100)
    async with Machine(beside.app) as machine:
        await send(machine, beside.numbers, 500)
        running = await machine.start()
        await until(lambda: beside.units)
        await at_rest(ledger_of(running))
        await machine.commit(running)
        assert await machine.committed() == {sf.TopicPartition("numbers", 0): 0}
        await machine.crash(running)
        assert beside.seen == []
        beside.units.clear()
        beside.gate.set()
        await machine.start()
        await machine.settle()
        assert beside.seen == list(range(500))
        assert [number for unit in beside.units for number in unit] == list(range(500))


async def test_a_unit_that_waits_for_a_silent_topic_holds_up_nobody_and_is_short_at_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "_MAX_IN_FLIGHT", 400)
    app = sf.App("silent")
    quiet = app.topic("quiet", key_type=str, value_type=int, partitions=1)
    lively = app.topic("lively", key_type=str, value_type=int, partitions=1)
    units: list[int] = []
    seen: list[int] = []

    @app.agent(quiet)
    async def batch(stream: sf.Stream[int]) -> None:
        async for unit in stream.take(1000):
            units.append(len(unit))

    @app.agent([quiet, lively])
    async def each(number: int) -> None:
        for _ in range(number % 3):
            await asyncio.sleep(0)
        seen.append(number)

    async with Machine(app) as machine:
        for number in range(100):
            await machine.send(quiet, number, key="k")
        running = await machine.start()
        await until(lambda: len(seen) == 100)
        for number in range(100, 350):
            await machine.send(lively, number, key="k")
        await until(lambda: len(seen) == 350)
        assert units == []
        assert await at_rest(ledger_of(running)) == 350
        for number in range(350, 1000):
            await machine.send(lively, number, key="k")
        await until(lambda: len(seen) == 1000)
        assert units == [100]
        await machine.settle()
