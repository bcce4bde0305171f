"""The loop of simulations: its time, its order, and processes that are stopped and killed."""

import asyncio
from collections.abc import Coroutine
from time import perf_counter
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

import streamflow as sf
from streamflow.testing import TestApp, simulate
from streamflow.virtual_loop import NothingLeftError
from tests.simulation.processes import Process, ProcessLoop


def test_sleeps_take_no_time_and_end_in_their_order() -> None:
    async def run() -> list[tuple[str, float]]:
        ended: list[tuple[str, float]] = []

        async def sleeper(name: str, seconds: float) -> None:
            await (asyncio.sleep if name == "a" else anyio.sleep)(seconds)
            ended.append((name, asyncio.get_running_loop().time()))

        async with anyio.create_task_group() as group:
            group.start_soon(sleeper, "a", 86_400.0)
            group.start_soon(sleeper, "b", 0.5)
            with anyio.move_on_after(3600):
                await asyncio.sleep(7200)
            ended.append(("moved on", anyio.current_time()))
        return ended

    started_s = perf_counter()
    assert simulate(run) == [("b", 0.5), ("moved on", 3600.0), ("a", 86_400.0)]
    assert perf_counter() - started_s < 3600


async def order_of_tasks() -> list[int]:
    done: list[int] = []

    async def step(number: int) -> None:
        await asyncio.sleep(0)
        done.append(number)

    await asyncio.gather(*map(step, range(6)))
    return done


def test_the_seed_decides_which_task_goes_first() -> None:
    orders = [simulate(order_of_tasks, seed=seed) for seed in range(5)]
    assert orders == [simulate(order_of_tasks, seed=seed) for seed in range(5)]
    assert len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == list(range(6)) for order in orders)


def test_callbacks_keep_their_order() -> None:
    async def run() -> list[int]:
        called: list[int] = []
        for number in range(20):
            asyncio.get_running_loop().call_soon(called.append, number)
        await asyncio.sleep(0.1)
        return called

    assert all(simulate(run, seed=seed) == list(range(20)) for seed in range(5))


def test_work_for_threads_runs_on_the_spot() -> None:
    async def run() -> tuple[int, int]:
        return await anyio.to_thread.run_sync(lambda: 1), await asyncio.to_thread(lambda: 2)

    assert simulate(run) == (1, 2)


def test_waiting_for_nobody_is_an_error_and_so_is_running_in_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    async def run_in_circles() -> None:
        while True:
            await anyio.lowlevel.checkpoint()

    with pytest.raises(NothingLeftError, match="no timer is set"):
        simulate(wait)
    monkeypatch.setattr("streamflow.virtual_loop._MAX_ROUNDS", 1000)
    with pytest.raises(NothingLeftError, match="no time passes"):
        simulate(run_in_circles)


def run_on(loop: ProcessLoop, main: Coroutine[Any, Any, Any]) -> None:
    try:
        loop.run_until_complete(main)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def test_a_stopped_process_goes_on_where_it_was_and_a_dead_one_does_not() -> None:
    loop, ticks = ProcessLoop(0), dict[str, list[float]]()
    processes = {name: Process(name) for name in ("well", "stopped", "dead")}

    async def live(name: str) -> None:
        try:
            while True:
                await asyncio.sleep(1)
                ticks.setdefault(name, []).append(loop.time())
                # What it starts is its own, too.
                await asyncio.create_task(asyncio.sleep(0))
        finally:
            ticks.setdefault(name, []).append(-1)

    async def main() -> None:
        for name, process in processes.items():
            loop.create_task(live(name), context=process.context())
        await asyncio.sleep(2.5)
        processes["stopped"].state, processes["dead"].state = "stopped", "dead"
        await asyncio.sleep(2)
        loop.let_run(processes["stopped"])
        await asyncio.sleep(1.2)
        assert ticks == {"well": [1, 2, 3, 4, 5], "stopped": [1, 2, 4.5, 5.5], "dead": [1, 2]}
        loop.let_run(processes["dead"])  # so that it can be cleaned up

    run_on(loop, main())


def test_what_is_nobodys_runs_whoever_started_it() -> None:
    loop, process, done = ProcessLoop(0), Process("dead"), list[float]()

    async def carried() -> None:
        await asyncio.sleep(1)
        done.append(loop.time())

    async def live() -> None:
        loop.run_as_nobody(carried())
        process.state = "dead"

    async def main() -> None:
        loop.create_task(live(), context=process.context())
        await asyncio.sleep(2)
        assert done == [1]
        loop.let_run(process)

    run_on(loop, main())


@pytest.mark.parametrize("seed", range(3))
def test_an_app_whose_agents_sleep_runs_in_no_time(seed: int) -> None:
    app = sf.App("sleepy")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=2)
    out = app.topic("out", key_type=int, value_type=int, partitions=1)

    @app.agent(numbers, sink=out, concurrency=2)
    async def sleep(number: int) -> int:
        await asyncio.sleep(100 - number)
        return number

    async def run() -> list[int]:
        async with TestApp(app) as test:
            for number in range(6):
                await test.send(numbers, number, key=number)
            await test.settle()
            return [event.value for event in test.records(out)]

    assert sorted(simulate(run, seed=seed)) == list(range(6))
