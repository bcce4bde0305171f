"""User code that lets a cancellation or an exit escape fails like any other, and not without a word."""

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

import streamflow as sf
from streamflow.testing import TestApp
from tests.runtime.waiting import until


async def await_something_cancelled() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.mark.parametrize("form", ["generator", "stream", "record", "lanes"])
async def test_a_stray_cancellation_is_an_error_of_its_record(form: str) -> None:
    app = sf.App(f"stray-{form}")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    async def work(number: int) -> int:
        if number == 1:
            await await_something_cancelled()
        return number

    if form == "generator":

        @app.agent(numbers, sink=out, on_error=sf.Skip())
        async def generator(stream: sf.Stream[int]) -> AsyncIterator[int]:
            async for number in stream:
                yield await work(number)

    elif form == "stream":

        @app.agent(numbers, on_error=sf.Skip())
        async def over_stream(stream: sf.Stream[int]) -> None:
            async for number in stream:
                await out.send(key="k", value=await work(number))

    else:
        app.agent(numbers, sink=out, on_error=sf.Skip(), concurrency=4 if form == "lanes" else 1)(work)

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert [event.value for event in test.records(out)] == [0, 2]


async def test_a_stray_cancellation_stops_the_worker_by_default() -> None:
    app = sf.App("stray-stop")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers)
    async def work(number: int) -> None:
        await await_something_cancelled()

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(numbers, 1, key="k")
            await test.settle()

    with pytest.raises(sf.StreamFlowError, match=r"something it awaited was cancelled.*numbers"):
        await run()


@pytest.mark.parametrize("thread", [False, True])
async def test_an_agent_that_exits_is_an_error_of_its_record(thread: bool) -> None:
    app = sf.App("exits")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, sink=out, on_error=sf.Skip(), thread=thread)
    def work(number: int) -> int:
        if number == 1:
            sys.exit(0)
        return number

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert [event.value for event in test.records(out)] == [0, 2]


async def test_a_timer_goes_on_after_a_stray_cancellation() -> None:
    app = sf.App("stray-timer")
    calls: list[int] = []

    @app.timer(1.0)
    async def tick() -> None:
        calls.append(1)
        if len(calls) == 1:
            await await_something_cancelled()

    async with TestApp(app) as test:
        await test.advance(1)
        await test.advance(1)
        await until(lambda: len(calls) >= 2)


async def test_a_hook_that_lets_a_cancellation_escape_refuses_the_start() -> None:
    app = sf.App("stray-hook")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    app.on_start(await_something_cancelled)

    @app.agent(numbers)
    async def work(number: int) -> None: ...

    with pytest.raises(sf.StreamFlowError, match=r"on_start.*something it awaited was cancelled"):
        async with TestApp(app):
            pass


async def test_an_agent_that_cancels_the_task_it_runs_in_stops_the_worker_and_says_so() -> None:
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)

    @app.agent(source, on_error=sf.Skip())
    async def work(number: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async def process_one() -> None:
        async with TestApp(app) as test:
            await test.send(source, 1, key="a")
            await test.settle()

    with pytest.raises(sf.StreamFlowError, match="agent 'work' of task source-0 was cancelled, and not by its worker"):
        await process_one()
