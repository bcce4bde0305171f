"""What a stream made of records equals what a loop over the same records makes, whatever fails, and whenever.

The model knows nothing of turns, stages, ledgers or commits: it is a fold over the records of each partition.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamflow as sf
from streamflow.testing import TestApp
from tests.runtime.machine import Machine
from tests.runtime.waiting import until

SLOW = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Step:
    """One record: its key, how often it fails before it succeeds, and whether it sends before it fails."""

    key: int
    failures: int
    sends_first: bool
    decodes: bool


steps = st.lists(
    st.builds(
        Step,
        key=st.integers(0, 4),
        failures=st.sampled_from([0, 0, 0, 0, 1, 2, 99]),
        sends_first=st.booleans(),
        decodes=st.sampled_from([True] * 9 + [False]),
    ),
    max_size=25,
)
POLICIES = {
    "skip": (0, "skip"),
    "retry-skip": (2, "skip"),
    "dead-letter": (0, "dead"),
    "retry-dead-letter": (1, "dead"),
}


def policy_of(name: str, dead: "sf.Topic[Any, Any]") -> Any:
    retries, end = POLICIES[name]
    last: Any = sf.Skip() if end == "skip" else sf.DeadLetter(dead)
    return sf.Retry(retries, backoff_s=1, then=last) if retries else last


def model(records: list[Step], retries: int) -> tuple[list[int], list[int]]:
    """What goes to the sink, and what is left over for the policy, in order."""
    passed = [number for number, step in enumerate(records) if step.decodes and step.failures <= retries]
    failed = [number for number in range(len(records)) if number not in set(passed)]
    return passed, failed


class Work:
    """User code that fails as the steps say."""

    def __init__(self, records: list[Step], side: "sf.Topic[Any, Any]", schedule: random.Random | None = None) -> None:
        self.records = records
        self.side = side
        self.tries: dict[int, int] = {}
        self.schedule = schedule
        self.now: dict[int, int] = {}
        self.all_sent = asyncio.Event()

    async def __call__(self, number: int) -> int:
        await self.all_sent.wait()  # so that as many are in flight as can be
        step = self.records[number]
        assert step.key not in self.now, "two records of one key at once"
        self.now[step.key] = number
        try:
            if step.sends_first:
                await self.side.send(key="s", value=number)
            if self.schedule is not None:
                for _ in range(self.schedule.randrange(4)):
                    await asyncio.sleep(0)
            self.tries[number] = self.tries.get(number, 0) + 1
            if self.tries[number] <= step.failures:
                raise ValueError(number)
            if not step.sends_first:
                await self.side.send(key="s", value=number)
            return number
        finally:
            del self.now[step.key]


@SLOW
@given(
    records=steps,
    policy=st.sampled_from(sorted(POLICIES)),
    concurrency=st.sampled_from([1, 2, 5]),
    agents=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_failures_anywhere(records: list[Step], policy: str, concurrency: int, agents: int, seed: int) -> None:
    asyncio.run(failures_anywhere(records, policy, concurrency, agents, seed))


async def failures_anywhere(records: list[Step], policy: str, concurrency: int, agents: int, seed: int) -> None:
    app = sf.App("failures")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=1)
    out = app.topic("out", key_type=int, value_type=int, partitions=1)
    side = app.topic("side", key_type=str, value_type=int, partitions=1)
    dead = app.topic("dead", partitions=1)
    work = Work(records, side, random.Random(seed))
    seen: list[int] = []

    @app.agent(numbers, sink=out, on_error=policy_of(policy, dead), concurrency=concurrency)
    async def agent(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            yield await work(number)

    if agents == 2:

        @app.agent(numbers, on_error=sf.Skip())
        async def watch(number: int) -> None:
            await asyncio.sleep(0)
            seen.append(number)

    async with TestApp(app) as test:
        for number, step in enumerate(records):
            if step.decodes:
                await test.send(numbers, number, key=step.key)
            else:
                await test.send_bytes(numbers, b"?", key=step.key.to_bytes(8, "big"), partition=0)
        work.all_sent.set()
        await test.advance(1000)
        passed, failed = model(records, POLICIES[policy][0])
        assert [event.value for event in test.records(out)] == passed
        assert [event.value for event in test.records(side)] == passed
        assert [event.key for event in test.records(out)] == [records[number].key for number in passed]
        letters = [int(dict(e.headers)["streamflow-dead-letter-offset"] or b"") for e in test.records(dead)]
        assert letters == (failed if POLICIES[policy][1] == "dead" else [])
        manager = test.worker.manager
        assert manager is not None
        assert [offset for task in manager.running() for offset in task.committed.values()] == [len(records)]
        assert agents == 1 or seen == [number for number, step in enumerate(records) if step.decodes]


@SLOW
@given(sizes=st.lists(st.booleans(), max_size=30), size=st.integers(1, 5), policy=st.sampled_from(sorted(POLICIES)))
def test_units_fail_whole(sizes: list[bool], size: int, policy: str) -> None:
    asyncio.run(units_fail_whole(sizes, size, policy))


async def units_fail_whole(fails: list[bool], size: int, policy: str) -> None:
    app = sf.App("units")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)
    dead = app.topic("dead", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, sink=out, on_error=policy_of(policy, dead))
    async def agent(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
        async for unit in stream.take(size, within_s=5):
            for number in unit:
                yield sf.Out(number, key="k")
                if fails[number]:
                    raise ValueError(number)

    async with TestApp(app) as test:
        for number in range(len(fails)):
            await test.send(numbers, number, key="k")
        await test.advance(100)
        units = [list(range(start, min(start + size, len(fails)))) for start in range(0, len(fails), size)]
        good = [number for unit in units if not any(fails[n] for n in unit) for number in unit]
        bad = [number for unit in units if any(fails[n] for n in unit) for number in unit]
        assert [event.value for event in test.records(out)] == good
        assert [event.value for event in test.records(dead)] == (bad if POLICIES[policy][1] == "dead" else [])


@SLOW
@given(stop_at=st.integers(0, 19), concurrency=st.sampled_from([1, 3]), seed=st.integers(0, 1000))
def test_stop_leaves_a_prefix(stop_at: int, concurrency: int, seed: int) -> None:
    asyncio.run(stop_leaves_a_prefix(stop_at, concurrency, seed))


async def stop_leaves_a_prefix(stop_at: int, concurrency: int, seed: int) -> None:
    app = sf.App("prefix")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=1)
    out = app.topic("out", key_type=int, value_type=int, partitions=1)
    schedule = random.Random(seed)

    @app.agent(numbers, sink=out, concurrency=concurrency)
    async def agent(number: int) -> int:
        for _ in range(schedule.randrange(4)):
            await asyncio.sleep(0)
        if number == stop_at:
            raise ValueError(number)
        return number

    async with Machine(app) as machine:
        for number in range(20):
            await machine.send(numbers, number, key=number % 5)
        running = await machine.start()
        with pytest.raises(sf.ProcessingError) as raised:
            await machine.ended(running)
        await machine.look()
        assert raised.value.position == f"numbers-0-{stop_at}"
        assert machine.values(out) == list(range(stop_at))
        assert await machine.committed() == {sf.TopicPartition("numbers", 0): stop_at}


@SLOW
@given(
    count=st.integers(1, 60),
    concurrency=st.sampled_from([1, 2, 4]),
    guarantee=st.sampled_from(["exactly_once", "at_least_once"]),
    agents=st.sampled_from([1, 2]),
    seed=st.integers(0, 10_000),
)
def test_crashes_anywhere(count: int, concurrency: int, guarantee: str, agents: int, seed: int) -> None:
    asyncio.run(crashes_anywhere(count, concurrency, guarantee, agents, random.Random(seed)))


async def crashes_anywhere(count: int, concurrency: int, guarantee: str, agents: int, chance: random.Random) -> None:
    app = sf.App("crashes")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=2)
    out = app.topic("out", key_type=int, value_type=int, partitions=2)
    last: dict[int, int] = {}

    @app.agent(numbers, sink=out, concurrency=concurrency)
    async def agent(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            last[number % 5] = number
            yield number

    if agents == 2:

        @app.agent(numbers)
        async def other(stream: sf.Stream[int]) -> None:
            async for _ in stream.take(3, within_s=1):
                await asyncio.sleep(0)

    async with Machine(app, processing_guarantee=guarantee) as machine:
        for number in range(count):
            await machine.send(numbers, number, key=number % 5)
        before: dict[sf.TopicPartition, int] = {}
        for _ in range(4):
            running = await machine.start()
            for _ in range(chance.randrange(40)):
                await asyncio.sleep(0)
                if chance.random() < 0.1:
                    await machine.commit(running)
            await (machine.crash if chance.random() < 0.8 else machine.stop)(running)
            committed = await machine.committed()
            assert all(committed.get(tp, 0) >= offset for tp, offset in before.items())
            await machine.look()
            assert_prefixes(machine, numbers, committed, guarantee)
            before = committed
        running = await machine.start()
        if agents == 2:  # the last unit is not full
            await finish_units(machine, count)
        else:
            await machine.settle()
        await machine.look()
        got = machine.values(out)
        assert set(got) == set(range(count))
        if guarantee == "exactly_once":
            assert_prefixes(machine, numbers, await machine.committed(), guarantee)
            assert len(got) == count
            for key in range(5):
                ordered = [number for number in got if number % 5 == key]
                assert ordered == sorted(ordered)


async def finish_units(machine: Machine, count: int) -> None:
    async def done() -> bool:
        machine.clock.advance(1.1)
        return sum((await machine.committed()).values()) == count

    await machine.until(done)


def assert_prefixes(
    machine: Machine, numbers: "sf.Topic[int, int]", committed: dict[sf.TopicPartition, int], guarantee: str
) -> None:
    """The outputs are those of the committed records, in the order of each partition; never fewer."""
    got = machine.values("out")
    for partition in (0, 1):
        source = [event.value for event in machine.records(numbers) if event.partition == partition]
        done = source[: committed.get(sf.TopicPartition("numbers", partition), 0)]
        mine = [number for number in got if number in set(source)]
        if guarantee == "exactly_once":
            # One sink partition holds keys of several source partitions: compare as sets, then order per key.
            assert sorted(mine) == sorted(done)
        else:
            assert set(done) <= set(mine)


@SLOW
@given(count=st.integers(1, 80), concurrency=st.sampled_from([1, 3]), seed=st.integers(0, 10_000))
def test_two_workers_that_come_and_go(count: int, concurrency: int, seed: int) -> None:
    asyncio.run(two_workers_that_come_and_go(count, concurrency, random.Random(seed)))


async def two_workers_that_come_and_go(count: int, concurrency: int, chance: random.Random) -> None:
    app = sf.App("pairs")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=3)
    out = app.topic("out", key_type=int, value_type=int, partitions=1)

    @app.agent(
        numbers.group_by(lambda number: number % 7, name="by-rest", key_type=int), sink=out, concurrency=concurrency
    )
    async def agent(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            await asyncio.sleep(0)
            yield number

    async with Machine(app) as machine:
        await machine.start()
        for number in range(count):
            await machine.send(numbers, number, key=number)
            if chance.random() < 0.15:
                if len(machine.workers) < 2:
                    await machine.start()
                else:
                    await chance.choice([machine.stop, machine.crash])(chance.choice(machine.workers))
            if chance.random() < 0.1:
                await machine.commit(chance.choice(machine.workers))
        await machine.settle()
        await until(lambda: sum(len(running.tasks) for running in machine.workers) == 6)
        await machine.settle()
        assert sorted(machine.values(out)) == list(range(count))
