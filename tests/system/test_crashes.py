"""`kill -9` in the middle of work, again and again: of the worker, and of the broker.

The oracle of exactly-once: every output partition equals, record by record, the map of its input partition. Under
at-least-once nothing is missing, the first sight of each record is in order, and repeats come only from crashes.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kafka.broker import Broker
from tests.system.harness import CHAIN, DOUBLE, STOPPED, System, Worker, per_key, without_repeats

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(150)]

KILLS = 5
PER_S = 2000
GROUPED_CHAIN = (
    CHAIN
    + """
@app.agent(numbers.group_by(last_digit, name="by-digit", key_type=str), sink=grouped)
async def third(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number
"""
)


@dataclass
class Crashes:
    """What happened: how many records came in, and how many may have been repeated."""

    total: int = 0
    uncommitted: int = 0


async def killed_under_load(
    system: System, *topics: str, sources: tuple[str, ...] = ("numbers",), kills: int = KILLS, per_s: int = PER_S
) -> Crashes:
    """Kill the worker again and again while records come in, then let it finish."""
    dice = random.Random(7)
    crashes = Crashes()
    async with system.load("numbers", per_s=per_s) as sent:
        for _ in range(kills):
            worker = await system.started()
            await system.has(topics[0], await system.count(topics[0]) + 100)
            await asyncio.sleep(dice.uniform(0, 1))  # at any point of a commit
            worker.kill()
            for source in sources:
                behind = await system.count(source) - sum((await system.committed(source)).values())
                crashes.uncommitted += behind
        worker = await system.started()
    crashes.total = sent.total()
    for topic in topics:
        await system.has(topic, crashes.total)
    await system.has_committed("numbers", crashes.total)
    assert await worker.stops() == STOPPED
    return crashes


async def test_a_worker_that_follows_a_killed_one_says_what_it_waits_for(kafka: System) -> None:
    kafka.write_app(session_timeout_ms=60_000)
    await kafka.create("numbers")
    (await kafka.started()).kill()
    worker = kafka.start()
    await worker.says("to let this worker in: it has the members .*until its session ends, at most")
    assert await worker.stops() == STOPPED


async def test_nothing_is_lost_repeated_or_reordered_on_sqlite(sqlite: System) -> None:
    sqlite.write_app()
    await sqlite.create("numbers")
    crashes = await killed_under_load(sqlite, "results")
    taken, made = await sqlite.read("numbers"), await sqlite.read("results")
    assert made == {partition: [(key, 2 * value) for key, value in rows] for partition, rows in taken.items()}
    assert crashes.total == sum(len(rows) for rows in made.values())


async def test_chains_and_repartitioning_are_exact_on_sqlite(sqlite: System) -> None:
    sqlite.write_app(GROUPED_CHAIN)
    await sqlite.create("numbers")
    crashes = await killed_under_load(sqlite, "results", "grouped")
    taken, made = await sqlite.read("numbers"), await sqlite.read("results")
    assert made == {partition: [(key, 2 * value + 2) for key, value in rows] for partition, rows in taken.items()}
    # A digit gathers the numbers of all keys, so that only its own order per source partition is defined.
    grouped = [row for rows in (await sqlite.read("grouped")).values() for row in rows]
    expected = [value for rows in taken.values() for _, value in rows]
    assert sorted(value for _, value in grouped) == sorted(expected)
    assert len(grouped) == crashes.total
    assert all(key == b"d%d" % (value % 10) for key, value in grouped)


VARIANTS = {
    "concurrency": """
import random

@app.agent(numbers, sink=results, concurrency=4)
async def double(number: int) -> int:
    await asyncio.sleep(random.uniform(0, 0.002))
    return number * 2
""",
    "units": """
@app.agent(numbers, sink=results)
async def double(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
    async for unit in stream.items().take(5, within_s=0.05):
        for key, number in unit:
            yield sf.Out(number * 2, key=key)
""",
    "thread": """
@app.agent(numbers, sink=results, thread=True)
def double(number: int) -> int:
    return number * 2
""",
    "retry": """
import random

@app.agent(numbers, sink=results, on_error=sf.Retry(100, backoff_s=0.001, max_backoff_s=0.001))
async def double(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        if random.random() < 0.002:
            raise OSError("now and then")
        yield number * 2
""",
    "sends": """
@app.agent(numbers)
async def double(stream: sf.Stream[int]) -> None:
    async for key, number in stream.items():
        await results.send(key=key, value=number * 2)
""",
}


@pytest.mark.parametrize("variant", VARIANTS)
async def test_every_form_of_agent_is_exact_on_sqlite(variant: str, sqlite: System) -> None:
    sqlite.write_app(VARIANTS[variant])
    await sqlite.create("numbers")
    await killed_under_load(sqlite, "results", kills=2, per_s=1000)
    taken, made = await sqlite.read("numbers"), await sqlite.read("results")
    assert made == {partition: [(key, 2 * value) for key, value in rows] for partition, rows in taken.items()}


@pytest.mark.kafka
async def test_nothing_is_lost_and_order_is_kept_on_kafka(kafka: System) -> None:
    kafka.write_app(GROUPED_CHAIN)
    await kafka.create("numbers")
    crashes = await killed_under_load(kafka, "results", "grouped", sources=("numbers", "middle"))
    taken = per_key(await kafka.rows("numbers"))
    results = per_key(await kafka.rows("results"))
    assert {key: without_repeats(values) for key, values in results.items()} == {
        key: [2 * value + 2 for value in values] for key, values in taken.items()
    }
    grouped = per_key(await kafka.rows("grouped"))
    assert sorted(value for values in grouped.values() for value in set(values)) == sorted(
        {value for values in taken.values() for value in values}
    )
    # A crash repeats at most what was there and not committed; the first agent's repeats are the second one's input.
    repeats = sum(len(values) for values in results.values()) - crashes.total
    assert repeats <= crashes.uncommitted, f"{repeats} repeats of {crashes.total}"


@pytest.mark.kafka
async def test_without_a_crash_nothing_is_repeated_on_kafka(kafka: System) -> None:
    kafka.write_app(GROUPED_CHAIN)
    await kafka.create("numbers")
    async with kafka.load("numbers", per_s=PER_S) as sent:
        for _ in range(3):
            worker = await kafka.started()
            await kafka.has("results", await kafka.count("results") + 500)
            assert await worker.stops() == STOPPED
        worker = await kafka.started()
    await kafka.has("results", sent.total())
    await kafka.has("grouped", sent.total())
    assert await worker.stops() == STOPPED
    assert await kafka.count("results") == sent.total()
    assert await kafka.count("grouped") == sent.total()


# --- the broker -------------------------------------------------------------------------------------------------------


@pytest.mark.kafka
async def test_a_broker_that_is_killed_and_comes_back_is_waited_for(
    make_broker: Callable[..., Broker], tmp_path: Any
) -> None:
    broker = make_broker()
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        system.write_app(DOUBLE, session_timeout_ms=6_000)
        await system.create("numbers")
        async with system.load("numbers", per_s=PER_S) as sent:
            worker = await system.started()
            for _ in range(2):
                await system.has("results", await system.count("results") + 500)
                await asyncio.to_thread(broker.kill)
                await asyncio.sleep(1)
                assert worker.runs, worker.said
                await asyncio.to_thread(broker.start)
            await system.has("results", await system.count("results") + 500)
        await system.has_committed("numbers", sent.total())
        assert await worker.stops() == STOPPED
        taken, results = per_key(await system.rows("numbers")), per_key(await system.rows("results"))
        assert {key: without_repeats(values) for key, values in results.items()} == {
            key: [2 * value for value in values] for key, values in taken.items()
        }
        assert "Traceback" not in worker.said, worker.said


@pytest.mark.kafka
async def test_a_stop_while_the_broker_is_away_is_bounded(make_broker: Callable[..., Broker], tmp_path: Any) -> None:
    body = """
ticks = app.topic(ID + "-ticks", key_type=str, value_type=int)

@app.timer(0.05)
async def tick() -> None:
    ticks.send_nowait(key="t", value=1)

@app.on_stop
async def stopped() -> None:
    await asyncio.sleep(0)
    print("stop hook", flush=True)
"""
    broker = make_broker()
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        system.write_app(body + DOUBLE)
        await system.create("numbers")
        worker = await system.started()
        async with system.load("numbers", per_s=PER_S):
            await system.has("results", 1000)
            await asyncio.to_thread(broker.kill)
            try:
                await worker.says("kafka broker .* (closed|refused)")  # it has noticed, one way or the other
                assert await worker.stops(10) == STOPPED
                assert "were lost" in worker.said
                assert "stop hook" in worker.said
            finally:
                await asyncio.to_thread(broker.start)  # the load ends when its records are taken


@pytest.mark.kafka
async def test_a_broker_that_is_not_there_at_the_start(make_broker: Callable[..., Broker], tmp_path: Any) -> None:
    broker = make_broker()
    broker.kill()
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        system.write_app()
        waiting: Worker = system.start()
        await waiting.says("waiting for it")
        given_up = system.start()
        await given_up.says("waiting for it")
        assert await given_up.stops(5) == STOPPED
        await asyncio.to_thread(broker.start)
        await waiting.ready()
        assert await waiting.stops() == STOPPED
