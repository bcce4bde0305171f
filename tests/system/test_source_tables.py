"""Tables that a topic fills, in real processes: killed, restarted and wiped, on both logs.

The oracle: a join of orders with users in one order of time is the same whenever the worker was killed.
"""

import asyncio
import random
import re
import shutil

import pytest

from streamflow.log.api import NewTopic
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import NONE
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition
from tests.system.harness import System, Worker

pytestmark = [pytest.mark.system, pytest.mark.slow]

JOIN = """
users = app.table("people", source=app.topic(ID + "-users", key_type=str, value_type=int, compacting=True))

@app.agent(numbers, sink=results)
async def join(stream: sf.Stream[int, str]) -> AsyncIterator[int]:
    async for key, number in stream.items():
        yield number * 1_000_000 + users.get(key, 0)
"""
PARTITIONS = 2
STEPS = 1200
KEYS = 40


async def made(system: System) -> None:
    """The topics, and the app."""
    await system.create("numbers", "results", partitions=PARTITIONS)
    compact = {"cleanup.policy": "compact"}
    await (await system.log()).admin.create([NewTopic(system.topic("users"), PARTITIONS, config=compact)])
    system.write_app(JOIN, max_task_idle_ms=500)


class History:
    """Orders and changes of users in one order of time, and what their join is."""

    def __init__(self) -> None:
        self._dice = random.Random(11)
        self._now: dict[bytes, int] = {}
        self._at_ms = 1_700_000_000_000
        self._number = 0
        self.expected: dict[bytes, list[int]] = {}
        self.orders = 0
        self.changes = 0

    async def go_on(self, system: System, steps: int) -> None:
        """Write some more of it, interleaved as it happened."""
        builders: dict[TopicPartition, BatchBuilder] = {}
        for _ in range(steps):
            self._at_ms += 1
            self._number += 1
            key = b"k%d" % self._dice.randrange(KEYS)
            if self._dice.random() < 0.5:
                name, value = "users", None if self._dice.random() < 0.1 else self._number
                self._now[key] = value or 0
                self.changes += 1
            else:
                name, value = "numbers", self._number
                self.expected.setdefault(key, []).append(self._number * 1_000_000 + self._now.get(key, 0))
                self.orders += 1
            tp = TopicPartition(system.topic(name), partition_for(key, PARTITIONS))
            builder = builders.setdefault(tp, BatchBuilder(NONE, 1 << 20))
            data = None if value is None else value.to_bytes(8, "big", signed=True)
            assert builder.append(self._at_ms, key, data, [])
        async with (await system.log()).producer() as producer:
            for tp in sorted(builders, reverse=True):  # users first, so that a task knows of them
                await producer.enqueue(tp, builders[tp].seal())
            await producer.flush()

    async def is_joined(self, system: System) -> None:
        """Wait until all of it is processed, and compare."""
        await system.has_committed("numbers", self.orders)
        await system.has_committed("users", self.changes)
        found: dict[bytes, list[int]] = {}
        for key, value in await system.rows("results"):
            assert key is not None
            found.setdefault(key, []).append(value)
        assert found == self.expected


async def test_a_worker_that_is_killed_again_and_again_joins_as_one_that_is_not(system: System) -> None:
    await made(system)
    history = History()
    dice = random.Random(5)
    worker = await system.started()
    for turn in range(4):
        await history.go_on(system, STEPS)
        await asyncio.sleep(dice.uniform(0, 0.3))  # at any point of a commit
        worker.kill()
        if turn == 2:
            shutil.rmtree(system.folder / "data")
        worker = await system.started()
    await history.is_joined(system)
    assert await worker.stops() == 0


async def test_a_restart_reads_nothing_again_and_what_is_wiped_comes_back(system: System) -> None:
    await made(system)
    history = History()
    worker = await system.started()
    await history.go_on(system, STEPS)
    await history.is_joined(system)
    assert await worker.stops() == 0
    worker = await system.started()
    assert restored(worker) == 0
    await history.go_on(system, STEPS)
    await history.is_joined(system)
    assert await worker.stops() == 0
    shutil.rmtree(system.folder / "data")
    worker = await system.started()
    assert restored(worker) > 0
    await history.go_on(system, STEPS)
    await history.is_joined(system)
    assert await worker.stops() == 0
    names = await (await system.log()).admin.topics()
    assert not [name for name in names if name.startswith(system.app_id) and "changelog" in name]


def restored(worker: Worker) -> int:
    """How many records its tasks restored."""
    found = [each.split(", ") for each in re.findall(r"restored \d+ records in .*: (.*)", worker.said)]
    assert sum(map(len, found)) == PARTITIONS, worker.said
    return sum(int(task.split()[-1]) for tasks in found for task in tasks)


async def test_a_second_worker_takes_half_of_it(system: System) -> None:
    await made(system)
    history = History()
    first = await system.started()
    await history.go_on(system, STEPS)
    await history.is_joined(system)
    second = await system.started()
    for worker in (first, second):
        await worker.owns(system.topic("numbers"), 1)
        assert await worker.owned(system.topic("users")) == await worker.owned(system.topic("numbers"))
    await history.go_on(system, STEPS)
    await history.is_joined(system)
    second.kill()
    await history.go_on(system, STEPS)
    await history.is_joined(system)
    assert await first.stops() == 0
