"""Times that a broker does not take: an error of the record that is made with one, and not of every commit."""

import time
from collections.abc import AsyncIterator

import pytest

import streamflow as sf
from streamflow.log.api import NewTopic
from tests.runtime.waiting import until
from tests.system.harness import System

AHEAD_MS = 7_200_000
LIMIT = {"message.timestamp.after.max.ms": "3600000"}


@pytest.mark.kafka
@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_time_far_ahead_is_an_error_of_its_record(kafka: System, guarantee: str) -> None:
    app = sf.App(
        kafka.app_id, broker=kafka.broker, data_dir=str(kafka.folder), processing_guarantee=guarantee, web=False
    )
    numbers = app.topic(kafka.topic("numbers"), key_type=str, value_type=int, timestamp=lambda ms: ms)
    copied = app.topic(kafka.topic("copied"), key_type=str, value_type=int, config=LIMIT, partitions=1)
    grouped = numbers.group_by(lambda ms: str(ms % 2), name="parity", key_type=str)
    parities = app.table("parities", key_type=str, value_type=int, default=int)

    @app.agent(numbers, sink=copied, on_error=sf.Skip())
    async def copy(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            yield number

    @app.agent(grouped)
    async def count(stream: sf.Stream[int, str]) -> None:
        async for event in stream.events():
            parities[event.key] += 1

    now_ms = int(time.time() * 1000)
    async with app.running():
        for at_ms in (now_ms, now_ms + AHEAD_MS, now_ms):
            await numbers.send(key="k", value=at_ms)
        await until(lambda: sum(parities.values()) == 3)  # a repartition topic takes any time
        await kafka.has("copied", 2)
    assert [value for _, value in await kafka.rows("copied")] == [now_ms, now_ms]


@pytest.mark.kafka
async def test_a_source_that_takes_more_than_the_sink(kafka: System) -> None:
    log = await kafka.log()
    anything = {"message.timestamp.after.max.ms": str(2**63 - 1)}
    await log.admin.create(
        [NewTopic(kafka.topic("numbers"), 1, -1, anything), NewTopic(kafka.topic("results"), 1, -1, LIMIT)]
    )
    app = sf.App(kafka.app_id, broker=kafka.broker, data_dir=str(kafka.folder), web=False)
    numbers = app.topic(kafka.topic("numbers"), key_type=str, value_type=int)
    results = app.topic(kafka.topic("results"), key_type=str, value_type=int)

    @app.agent(numbers, sink=results, on_error=sf.DeadLetter(app.topic(kafka.topic("bad"), config=LIMIT, partitions=1)))
    async def copy(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            yield number

    async with app.running():
        await numbers.send(key="k", value=1)
        await numbers.send(key="k", value=2, timestamp_ms=int(time.time() * 1000) + AHEAD_MS)
        await numbers.send(key="k", value=3)
        with pytest.raises(sf.ProductionError, match="further ahead than topic"):
            await results.send(key="k", value=2, timestamp_ms=int(time.time() * 1000) + AHEAD_MS)
        await kafka.has("results", 2)
        await kafka.has("bad", 1)
    assert [value for _, value in await kafka.rows("results")] == [1, 3]
