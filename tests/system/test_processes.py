"""`--processes N`: the work is shared, what crashes comes back, what fails stops all, nothing outlives its parent."""

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from tests.system.harness import STOPPED, System, Worker, numbered, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

PROCESSES = 3
APP = """
@app.agent(numbers, sink=results)
async def double(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        if number == 666:
            raise ValueError("the number of the beast")
        yield number * 2
"""


async def fleet(system: System, *arguments: str) -> Worker:
    return await system.start("--processes", str(PROCESSES), *arguments).ready()


def pids(worker: Worker) -> dict[int, int]:
    """The newest pid of each process."""
    return {int(number): int(pid) for number, pid in re.findall(r"process (\d+) started \(pid (\d+)\)", worker.said)}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def gone(numbers: dict[int, int], within_s: float) -> None:
    await until(lambda: not any(map(alive, numbers.values())), f"the end of processes {numbers}", within_s)


async def shares(system: System, worker: Worker) -> list[set[int]]:
    """Partitions of each process, once all are assigned."""
    topic = system.topic("numbers")

    async def look() -> list[set[int]]:
        _, metrics = await worker.get("/metrics")
        found: dict[str, set[int]] = {}
        for labels in re.findall(r"streamflow_lag_records\{(.*?)\}", metrics):
            told = dict(re.findall(r'(\w+)="(.*?)"', labels))
            if told["topic"] == topic:
                found.setdefault(told["process"], set()).add(int(told["partition"]))
        complete = len(found) == PROCESSES and sum(len(owned) for owned in found.values()) == 6
        return list(found.values()) if complete else []

    found: list[set[int]] = await until(look, system.told)
    return found


async def test_they_share_the_partitions_and_one_killed_comes_back(system: System) -> None:
    system.write_app(APP, partitions=6)
    async with asyncio.TaskGroup():
        worker = await fleet(system)
        assert set().union(*await shares(system, worker)) == set(range(6))
        async with system.load("numbers", per_s=1000) as sent:
            await system.has("results", 500)
            killed = pids(worker)[1]
            os.kill(killed, signal.SIGKILL)
            await worker.says(r"process 1 ended with SIGKILL; starting it again in 0\.5 s")
            await until(lambda: pids(worker)[1] != killed, worker.said)
            await worker.ready()
            assert set().union(*await shares(system, worker)) == set(range(6))
        await system.has_committed("numbers", sent.total())
        children = pids(worker)
        assert await worker.stops(10) == STOPPED
        await gone(children, 1)
    taken, made = await system.read("numbers"), await system.read("results")
    assert made == {partition: [(key, 2 * value) for key, value in rows] for partition, rows in taken.items()}


async def test_logs_and_metrics_tell_them_apart(sqlite: System) -> None:
    sqlite.write_app(APP, partitions=6)
    worker = await fleet(sqlite, "--log-format", "json")
    for number in range(PROCESSES):
        await worker.says(rf'"process": ?{number}\b')
    _, metrics = await worker.get("/metrics")
    for number in range(PROCESSES):
        assert f'process="{number}"' in metrics
    assert await worker.stops(10) == STOPPED


async def test_a_record_that_stops_one_stops_all(system: System) -> None:
    system.write_app(APP, partitions=6)
    worker = await fleet(system)
    await system.write("numbers", [*numbered(100), (b"k1", 666)])
    children = pids(worker)
    assert await worker.ends() == 1
    assert "the number of the beast" in worker.said
    await gone(children, 1)


async def test_what_is_refused_by_one_stops_all(sqlite: System) -> None:
    sqlite.write_app("strict = app.topic(ID + '-strict', partitions=3)\n" + APP)
    await sqlite.create("strict", partitions=5)
    worker = sqlite.start("--processes", str(PROCESSES))
    assert await worker.ends() == 2
    assert "5 partitions" in worker.said
    await gone(pids(worker), 1)


async def test_a_stop_right_after_the_start(sqlite: System) -> None:
    sqlite.write_app(APP, partitions=6)
    worker = sqlite.start("--processes", str(PROCESSES))
    await worker.says("agents ")
    assert await worker.stops(10) == STOPPED
    await gone(pids(worker), 1)


async def test_a_killed_parent_leaves_nobody_behind(system: System) -> None:
    system.write_app(APP, partitions=6)
    worker = await fleet(system)
    children = pids(worker)
    assert len(children) == PROCESSES
    worker.kill()
    await gone(children, 12)
