"""Bounded runs: all that is there and all that follows from it, then the end; the result is the streaming run's."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import streamflow as sf
from streamflow.runtime.status import Progress
from tests.runtime.machine import Machine


async def run_bounded(
    app: sf.App, inputs: Callable[[Machine], Any], **settings: Any
) -> tuple[dict[str, list[Any]], Machine]:
    """The values in every topic after a bounded run."""
    settings = {"commit_interval_ms": 100, **settings}
    async with Machine(app, **settings) as machine:
        await inputs(machine)
        running = await machine.start(until_end=True)
        await machine.ran_out(running)
        await machine.look()
        return {name: machine.values(name) for name in app.topics}, machine


async def run_streaming(app: sf.App, inputs: Callable[[Machine], Any]) -> dict[str, list[Any]]:
    async with Machine(app) as machine:
        await inputs(machine)
        running = await machine.start()
        await machine.settle()
        await machine.stop(running)
        await machine.look()
        return {name: machine.values(name) for name in app.topics}


def chained() -> sf.App:
    app = sf.App("chained")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=3)
    squares = app.topic("squares", key_type=str, value_type=int, partitions=2)
    sums = app.topic("sums", key_type=int, value_type=int, partitions=1)
    app.topic("unused", key_type=str)

    @app.agent(numbers, sink=squares)
    async def square(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            yield number * number

    @app.agent(squares.group_by(lambda number: number % 4, name="by-rest", key_type=int), sink=sums)
    async def regroup(stream: sf.Stream[int, int]) -> AsyncIterator[int]:
        async for number in stream:
            yield number

    return app


async def send_numbers(machine: Machine) -> None:
    for number in range(50):
        await machine.send(machine.app.topics["numbers"], number, key=f"k{number % 7}")


async def test_chained_and_repartitioned_records_are_included_and_equal_the_streaming_run() -> None:
    bounded, _ = await run_bounded(chained(), send_numbers)
    streamed = await run_streaming(chained(), send_numbers)
    assert {name: Counter(values) for name, values in bounded.items()} == {
        name: Counter(values) for name, values in streamed.items()
    }
    assert sorted(bounded["sums"]) == [number * number for number in range(50)]


async def test_progress_is_told_and_reaches_the_total() -> None:
    told: list[Progress] = []
    app = chained()
    async with Machine(app, commit_interval_ms=100) as machine:
        await send_numbers(machine)
        running = await machine.start(until_end=True, on_progress=told.append)
        await machine.ran_out(running)
    assert told[-1] == Progress(50, 50)


async def test_the_outcome_counts_every_topic_that_is_read() -> None:
    app = chained()
    async with Machine(app, commit_interval_ms=100) as machine:
        await send_numbers(machine)
        for count in (50, 0):
            running = await machine.start(until_end=True)
            await machine.ran_out(running)
            outcome = running.worker.outcome()
            assert outcome is not None
            assert outcome.finished
            assert {(topic.topic, topic.processed, topic.left) for topic in outcome.topics} == {
                (name, count, 0) for name in ("numbers", "squares", "chained-by-rest-repartition")
            }


async def test_what_latest_passes_over_is_not_counted() -> None:
    told: list[Progress] = []
    app = chained()
    async with Machine(app, commit_interval_ms=100, auto_offset_reset="latest") as machine:
        await send_numbers(machine)
        running = await machine.start(until_end=True, on_progress=told.append)
        await machine.ran_out(running)
        outcome = running.worker.outcome()
    assert told[-1] == Progress(0, 0)
    assert outcome is not None
    assert [(topic.processed, topic.left) for topic in outcome.topics] == [(0, 0)] * 3


async def test_the_outcome_of_a_run_that_was_stopped_says_what_is_left() -> None:
    app = sf.App("stopped")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    doubled = app.topic("doubled", key_type=str, value_type=int, partitions=1)
    at_seven, at_three = asyncio.Event(), asyncio.Event()

    @app.agent(numbers, sink=doubled)
    async def double(number: int) -> int:
        if number == 7:
            at_seven.set()
            await at_three.wait()
        return 2 * number

    @app.agent(doubled)
    async def take(number: int) -> None:
        if number == 6:
            at_three.set()
            await asyncio.Event().wait()

    async with Machine(app, commit_interval_ms=100, shutdown_timeout_s=0.2) as machine:
        for number in range(10):
            await machine.send(numbers, number, key="k")
        running = await machine.start(until_end=True)
        assert running.worker.outcome() is not None
        await machine.until(lambda: _told(at_seven))
        await machine.until(lambda: _told(at_three))
        await machine.until(lambda: _reached(machine, numbers, 8))
        running.worker.request_stop()
        await machine.ran_out(running)
        outcome = running.worker.outcome()
        committed = await machine.committed()
        await machine.look()
        written = len(machine.values(doubled))
    assert outcome is not None
    assert not outcome.finished
    done = committed[sf.TopicPartition("numbers", 0)]
    assert done >= 8
    assert {(topic.topic, topic.processed, topic.left) for topic in outcome.topics} == {
        ("numbers", done, 10 - done),
        ("doubled", 3, written - 3),
    }


async def _told(event: asyncio.Event) -> bool:
    return event.is_set()


async def _reached(machine: Machine, topic: "sf.Topic[Any, Any]", offset: int) -> bool:
    return (await machine.committed()).get(sf.TopicPartition(topic.name, 0), 0) >= offset


async def test_empty_topics_end_at_once() -> None:
    async def nothing(machine: Machine) -> None: ...

    bounded, _ = await run_bounded(chained(), nothing)
    assert all(values == [] for values in bounded.values())


async def test_latest_takes_nothing_and_ends() -> None:
    bounded, _ = await run_bounded(chained(), send_numbers, auto_offset_reset="latest")
    assert bounded["squares"] == []


async def test_a_second_run_has_nothing_left_to_do() -> None:
    app = chained()
    async with Machine(app, commit_interval_ms=100) as machine:
        await send_numbers(machine)
        for _ in range(2):
            running = await machine.start(until_end=True)
            await machine.ran_out(running)
        await machine.look()
        assert len(machine.values("sums")) == 50


@pytest.mark.parametrize("agents", [1, 2])
async def test_units_that_are_not_full_are_flushed_along_the_chain(agents: int) -> None:
    app = sf.App("units")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    sums = app.topic("sums", key_type=str, value_type=int, partitions=1)
    totals = app.topic("totals", key_type=str, value_type=list[int], partitions=1)

    @app.agent(numbers, sink=sums)
    async def batch(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
        async for unit in stream.take(4):
            yield sf.Out(sum(unit), key="k")

    @app.agent(sums, sink=totals)
    async def total(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[list[int]]]:
        async for unit in stream.take(100, within_s=3600):
            yield sf.Out(unit, key="k")

    if agents == 2:

        @app.agent(numbers)
        def other(number: int) -> None: ...

    async def send(machine: Machine) -> None:
        for number in range(10):
            await machine.send(numbers, number, key="k")

    bounded, _ = await run_bounded(app, send)
    assert bounded["sums"] == [6, 22, 17]
    assert bounded["totals"] == [[6, 22, 17]]


async def test_a_unit_over_an_external_and_a_written_topic_is_flushed() -> None:
    app = sf.App("both")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    doubled = app.topic("doubled", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, sink=doubled)
    def double(number: int) -> int:
        return number * 2

    @app.agent([numbers, doubled], sink=out)
    async def batch(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
        async for unit in stream.take(1000):
            for number in unit:
                yield sf.Out(number, key="k")

    async def send(machine: Machine) -> None:
        for number in range(5):
            await machine.send(numbers, number, key="k")

    bounded, _ = await run_bounded(app, send)
    assert sorted(bounded["out"]) == sorted([*range(5), *range(0, 10, 2)])


async def test_an_agent_that_feeds_itself_is_drained() -> None:
    app = sf.App("itself")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    done = app.topic("done", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers)
    async def count_down(number: int) -> None:
        await (numbers if number else done).send(key="k", value=max(0, number - 1))

    async def send(machine: Machine) -> None:
        await machine.send(numbers, 6, key="k")

    bounded, _ = await run_bounded(app, send)
    assert bounded["numbers"] == [6, 5, 4, 3, 2, 1, 0]
    assert bounded["done"] == [0]


async def test_records_that_come_after_the_start_are_left_for_the_next_run() -> None:
    app = sf.App("later")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)
    gate = asyncio.Event()

    @app.agent(numbers, sink=out)
    async def work(number: int) -> int:
        await gate.wait()
        return number

    async with Machine(app, commit_interval_ms=100) as machine:
        await machine.send(numbers, 1, key="k")
        running = await machine.start(until_end=True)
        await machine.send(numbers, 2, key="k")
        gate.set()
        await machine.ran_out(running)
        await machine.look()
        assert machine.values(out) == [1]


async def test_two_workers_share_a_bounded_run() -> None:
    app = chained()
    async with Machine(app, commit_interval_ms=100) as machine:
        await send_numbers(machine)
        both = [await machine.start(until_end=True) for _ in range(2)]
        for running in both:
            await machine.ran_out(running)
        await machine.look()
        assert sorted(machine.values("sums")) == [number * number for number in range(50)]


# --- visits ----------------------------------------------------------------------------------------------------------


def visited(*, on_leader: bool = False) -> tuple[sf.App, Any, list[Any]]:
    """An app whose task visits its table at once."""
    app = sf.App("visited")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=3)
    sums = app.table("sums", key_type=str, value_type=int, default=int)
    found: list[Any] = []

    @app.agent(numbers, tables=[sums])
    async def add(stream: sf.Stream[int, str]) -> None:
        async for key, number in stream.items():
            sums[key] += number

    @app.task(on_leader=on_leader)
    async def migrate() -> None:
        found.append(await app.visit(sums, lambda key, value: value + 100))
        found.append(await app.visit(sums, lambda key, value: None))

    return app, sums, found


@pytest.mark.parametrize("on_leader", [False, True])
async def test_a_run_to_the_end_waits_for_the_visits_of_its_tasks(on_leader: bool):
    app, sums, found = visited(on_leader=on_leader)
    async with Machine(app, commit_interval_ms=100) as machine:
        for number in range(1200):
            await machine.send(app.topics["numbers"], number, key=f"k{number}")
        await machine.ran_out(await machine.start(until_end=True))
        await machine.ran_out(await machine.start(until_end=True))  # nothing to process
        await machine.look()
        kept = {event.key: event.value for event in machine.records(sums.changelog)}
    assert [done.partitions for done in found] == [frozenset(range(3))] * 4
    assert not any(done.left for done in found)
    assert found[2].keys == found[2].written == found[3].keys == 1200
    assert all(value >= 100 for value in kept.values())
