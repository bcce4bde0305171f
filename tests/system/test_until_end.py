"""Bounded runs: everything that was there, and everything that follows from it, then exit 0."""

import pytest
from aiokafka import AIOKafkaProducer

from tests.system.harness import CHAIN, STOPPED, System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow]

COUNT = 5_000
APP = (
    CHAIN
    + """
units = app.topic(ID + "-units", key_type=str, value_type=int)

@app.agent(middle.group_by(last_digit, name="by-digit", key_type=str), sink=grouped)
async def third(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number

@app.agent(results, sink=units)
async def sums(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
    async for unit in stream.take(7):
        yield sf.Out(sum(unit), key="all")
"""
)


async def check(system: System, count: int, *, left_in_units: int = 0) -> None:
    """All that follows from `numbered(count)` is there, once."""
    rows = numbered(count)
    assert sorted(await system.rows("results")) == sorted((key, 2 * value + 2) for key, value in rows)
    assert sorted(await system.rows("grouped")) == sorted((b"d%d" % ((v + 1) % 10), v + 1) for _, v in rows)
    if not left_in_units:
        assert sum(value for _, value in await system.rows("units")) == sum(2 * value + 2 for _, value in rows)


async def settled(system: System, count: int) -> None:
    """Wait until a streaming run has done all that much."""
    await system.has("results", count)
    await system.has("grouped", count)
    await system.has_committed("numbers", count)


async def test_it_ends_with_all_that_the_streaming_run_makes(system: System) -> None:
    system.write_app(APP)
    await system.create("numbers")
    await system.write("numbers", numbered(COUNT))
    assert await system.start("--until-end").ends() == STOPPED
    await check(system, COUNT)
    # Where it stopped, the streaming run goes on, and comes to the same.
    await system.write("numbers", numbered(COUNT, start=COUNT))
    worker = await system.started()
    await settled(system, 2 * COUNT)
    assert await worker.stops() == STOPPED
    await check(system, 2 * COUNT, left_in_units=7)
    # And a bounded run ends what a streaming one left: the last units were not full.
    assert await system.start("--until-end").ends() == STOPPED
    await check(system, 2 * COUNT)


async def test_again_with_nothing_to_do(system: System) -> None:
    system.write_app(APP)
    for _ in range(2):
        assert await system.start("--until-end").ends() == STOPPED
    await system.write("numbers", numbered(10))
    for _ in range(2):
        assert await system.start("--until-end").ends() == STOPPED
        await check(system, 10)


async def test_what_comes_later_is_left(system: System) -> None:
    system.write_app()
    await system.create("numbers")
    await system.write("numbers", numbered(COUNT))
    async with system.load("numbers", per_s=2000):
        assert await system.start("--until-end").ends() == STOPPED
    made, written = await system.count("results"), await system.count("numbers")
    assert COUNT <= made < written
    assert sum((await system.committed("numbers")).values()) == made
    worker = await system.started()
    await system.has_committed("numbers", written)
    assert await worker.stops() == STOPPED
    taken, results = await system.read("numbers"), await system.read("results")
    assert results == {partition: [(key, 2 * value) for key, value in rows] for partition, rows in taken.items()}


@pytest.mark.parametrize("supervised", [True, False])
async def test_two_processes_share_it(system: System, supervised: bool) -> None:
    system.write_app(APP)
    await system.create("numbers")
    await system.write("numbers", numbered(COUNT))
    if supervised:
        assert await system.start("--until-end", "--processes", "2").ends() == STOPPED
    else:
        workers = [system.start("--until-end"), system.start("--until-end")]
        assert [await worker.ends() for worker in workers] == [STOPPED, STOPPED]
    await check(system, COUNT)


async def test_errors_on_the_way_do_not_keep_it_from_ending(system: System) -> None:
    body = """
letters = app.topic(ID + "-letters")

@app.agent(numbers, sink=results, on_error=sf.Retry(1, backoff_s=0.01, then=sf.DeadLetter(letters)))
async def picky(number: int) -> int:
    if number % 10 == 3:
        raise ValueError("not this one")
    return number
"""
    system.write_app(body)
    await system.create("numbers")
    await system.write("numbers", numbered(100))
    assert await system.start("--until-end").ends() == STOPPED
    assert await system.count("results") == 90
    assert sorted(await system.rows("letters")) == [row for row in sorted(numbered(100)) if row[1] % 10 == 3]


@pytest.mark.kafka
async def test_an_input_that_ends_in_aborted_records_and_markers(kafka: System) -> None:
    """Its last offsets hold nothing that anybody may read: it is at its end all the same, and nothing of it comes."""
    kafka.write_app()
    await kafka.create("numbers", partitions=2)
    servers, transactional_id = kafka.broker.removeprefix("kafka://"), kafka.topic("writer")
    good = []
    async with AIOKafkaProducer(bootstrap_servers=servers, transactional_id=transactional_id) as producer:
        for number in range(12):
            await producer.begin_transaction()
            for partition in (0, 1):
                value = number.to_bytes(8, "big")
                await producer.send_and_wait(kafka.topic("numbers"), value, key=b"k", partition=partition)
            if number % 3 == 0:
                await producer.commit_transaction()
                good += [(b"k", 2 * number)] * 2
            else:
                await producer.abort_transaction()
    assert await kafka.start("--until-end").ends() == STOPPED
    assert sorted(await kafka.rows("results")) == good
    again = kafka.start("--until-end")  # there is nothing left, and it knows that
    assert await again.ends() == STOPPED
    await kafka.write("numbers", [(b"k", 100)])
    worker = await kafka.started()
    await kafka.has("results", len(good) + 1)
    assert await worker.stops() == STOPPED
    assert sorted(await kafka.rows("results")) == [*good, (b"k", 200)]
