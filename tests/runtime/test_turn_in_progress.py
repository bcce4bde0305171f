"""Commits while a turn is in progress: they hold nothing of it, and what it goes on to see is its own writes."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.testing import TestApp
from tests.runtime.waiting import until

VALUES: dict[str, tuple[Any, Callable[[int], Any], Callable[[Any], int]]] = {
    "plain": (int, int, int),
    "changeable": (list[int], lambda n: [n], lambda value: value[0]),
}


class Job:
    """An app whose agent writes, waits in the middle of its turn until it is told, and writes again."""

    def __init__(self, kind: str, path: Path, *, in_tasks: bool = False) -> None:
        form, self.make, self.plain = VALUES[kind]
        self.state = path / "state"
        broker = f"sqlite:///{path}/log.db"
        self.app = sf.App("t", broker=broker, data_dir=str(self.state), partitions=1, commit_interval_ms=10)
        self.source = self.app.topic("source", key_type=str, value_type=int)
        self.out = self.app.topic("out", key_type=str, value_type=int)
        self.table = self.app.table("t", key_type=str, value_type=form)
        self.waits, self.goes_on, self.fails = asyncio.Event(), asyncio.Event(), False
        self.in_tasks = in_tasks

        @self.app.agent(self.source, sink=self.out, tables=[self.table], on_error=sf.Skip())
        async def run(stream: sf.Stream[int, str]) -> AsyncIterator[int]:
            async for key, number in stream.items():
                yield await self.work(key, number)

    async def work(self, key: str, number: int) -> int:
        table, make = self.table, self.make
        if number == 0:
            table["deleted"] = make(0)
            return 0
        table[key] = make(number)
        table["both"] = make(number)
        table.pop("deleted", None)
        if number == 2:
            self.waits.set()
            if self.in_tasks:
                await asyncio.gather(self.add_slowly(), self.add_slowly())
            await self.goes_on.wait()
            if self.fails:
                raise ValueError("no")
        assert "deleted" not in table
        table[key] = make(self.plain(table[key]) + 10)
        table["after"] = make(number)
        return self.plain(table["both"])

    async def add_slowly(self) -> None:
        for _ in range(50):
            self.table["both"] = self.make(self.plain(self.table["both"]) + 1)
            assert dict(self.table.scan())["both"] == self.table["both"]
            await asyncio.sleep(0.01)

    def committed(self) -> dict[str, int]:
        return {key: self.plain(value) for key, value in self.table.items()}

    async def reach_the_middle(self) -> None:
        """Two turns done, the next in its middle, and commits that have passed since."""
        for number in range(3):
            await self.source.send(key="a", value=number)
        await self.waits.wait()
        await until(lambda: self.committed() == {"a": 11, "both": 1, "after": 1})
        await asyncio.sleep(0.1)
        assert self.committed() == {"a": 11, "both": 1, "after": 1}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("in_tasks", [False, True])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_commit_holds_nothing_of_the_turn_in_progress(kind, in_tasks, fails, tmp_path):
    job = Job(kind, tmp_path, in_tasks=in_tasks)
    job.fails = fails
    async with job.app.running():
        await job.reach_the_middle()
        job.goes_on.set()
        await job.source.send(key="b", value=3)
        await until(lambda: "b" in job.committed())
        again = [] if fails else [("a", 12)]
        assert job.committed() == {"a": 11, **dict(again), "b": 13, "both": 3, "after": 3}
    shutil.rmtree(job.state)
    async with job.app.running():  # what the changelog says
        assert job.committed() == {"a": 11, **dict(again), "b": 13, "both": 3, "after": 3}


async def test_a_turn_that_fails_after_commits_leaves_what_its_tasks_wrote_out(tmp_path):
    job = Job("plain", tmp_path, in_tasks=True)
    job.fails = True
    async with job.app.running():
        await job.reach_the_middle()
        job.goes_on.set()
        await job.source.send(key="b", value=0)
        await until(lambda: "deleted" in job.committed())
        assert job.committed() == {"a": 11, "both": 1, "after": 1, "deleted": 0}


@pytest.mark.parametrize("value_type", [int, list[int]])
async def test_a_thread_of_an_agent_reads_nothing_older_than_what_the_turn_has_written(value_type):
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("t", key_type=str, value_type=value_type)
    found: list[str] = []

    @app.agent(source, tables=[table])
    async def run(stream: sf.Stream[int]) -> None:
        async for number in stream:
            table["n"] = number if value_type is int else [number]
            suspended = threading.Event()

            def read(suspended: threading.Event = suspended) -> Any:
                suspended.wait()
                return table["n"]

            reading = asyncio.create_task(asyncio.to_thread(read))
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(suspended.set)
            try:
                found.append(str(await reading))
            except sf.ClosedError as error:
                found.append(str(error))

    async with TestApp(app) as test:
        await test.send(source, 1, key="a")
        await test.settle()
        await test.send(source, 2, key="a")
        await test.settle()
        assert await asyncio.to_thread(lambda: table["n"]) == (2 if value_type is int else [2])
    assert [text.split(":")[0] for text in found] == ["agent 'run'"] * 2
    assert all("give the thread the value" in text for text in found)


async def test_a_task_that_outlives_its_turn_does_not_touch_the_table():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("t", key_type=str, value_type=int)
    late: list[asyncio.Task[None]] = []
    refused: list[str] = []

    async def write_later() -> None:
        await asyncio.sleep(1)
        try:
            table["late"] = 1
        except sf.ClosedError as error:
            refused.append(str(error))

    @app.agent(source, tables=[table])
    async def run(stream: sf.Stream[int]) -> None:
        async for number in stream:
            table["n"] = number
            if number == 1:
                late.append(asyncio.create_task(write_later()))

    async with TestApp(app) as test:
        await test.send(source, 1, key="a")
        await test.settle()
        await test.send(source, 2, key="a")
        await test.settle()
        await asyncio.gather(*late)
        await test.settle()
        assert dict(table) == {"n": 2}
    assert len(refused) == 1
