"""A source topic that gets more partitions while a worker runs: they are told of, and processed whole."""

import sqlite3
from collections.abc import AsyncIterator

import pytest

import streamflow as sf
from streamflow.log.api import Assigned, Lost
from streamflow.log.sqlite.log import SqliteLog
from streamflow.runtime.client import Client
from tests.runtime.machine import Machine
from tests.runtime.waiting import until


async def grow(machine: Machine, topic: str, count: int) -> None:
    """Give a topic more partitions: what Kafka's `create_partitions` does."""
    log = machine.log
    assert isinstance(log, SqliteLog)

    def work(sql: sqlite3.Connection) -> None:
        number, before = sql.execute("SELECT id, partitions FROM topics WHERE name = ?", (topic,)).fetchone()
        sql.execute("UPDATE topics SET partitions = ? WHERE id = ?", (count, number))
        sql.executemany(
            "INSERT INTO partitions (topic_id, partition) VALUES (?, ?)",
            [(number, each) for each in range(before, count)],
        )

    await log._database.writer.write(work)


def notice(machine: Machine) -> None:
    """Let the group look at the topics."""
    machine.log._database.wrote(members=True)  # type: ignore[attr-defined]  # `grow` knows which log it is
    machine.clock.advance(0.6)


@pytest.mark.parametrize("reset", ["earliest", "latest"])
async def test_new_partitions_are_told_of_and_processed_whole(reset: str, caplog: pytest.LogCaptureFixture) -> None:
    app = sf.App("grows")
    numbers = app.topic("numbers", key_type=str, value_type=int)
    seen: list[int] = []

    @app.agent(numbers)
    def work(number: int) -> None:
        seen.append(number)

    async with Machine(app, partitions=2, heartbeat_interval_ms=500, auto_offset_reset=reset) as machine:
        running = await machine.start()
        await machine.send(numbers, 1, key="k", partition=1)
        await machine.settle()
        await grow(machine, "numbers", 4)
        async with Client(app, machine.settings, clock=machine.clock) as client:
            for number in range(10, 13):  # before the worker knows of the partition
                await client.send(numbers, key="k", value=number, partition=3)
        notice(machine)
        await until(lambda: "numbers-3" in running.tasks)
        await machine.settle()
        assert seen == [1, 10, 11, 12]
        assert (await machine.committed())[sf.TopicPartition("numbers", 3)] == 3
        assert "topic numbers has 4 partitions or more, and had 2 when this worker started" in caplog.text
        await machine.stop(running)
        caplog.clear()
        await machine.start()
        await machine.settle()
        assert seen == [1, 10, 11, 12]
        assert "when this worker started" not in caplog.text


async def test_a_task_that_another_topics_new_partition_joins_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    app = sf.App("grow-one-by-one")
    first = app.topic("first", key_type=str, value_type=int)
    second = app.topic("second", key_type=str, value_type=int)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent([first, second], sink=out)
    def work(number: int) -> int:
        return number

    async with Machine(app, partitions=1, heartbeat_interval_ms=500) as machine:
        running = await machine.start()
        for topic, number in ((first, 1), (second, 2)):
            await grow(machine, topic.name, 2)
            async with Client(app, machine.settings, clock=machine.clock) as client:
                await client.send(topic, key="k", value=number, partition=1)
            notice(machine)
            await machine.settle()
            assert machine.values(out) == list(range(1, number + 1))
        async with Client(app, machine.settings, clock=machine.clock) as client:
            await client.send(first, key="k", value=3, partition=1)
        await machine.settle()
        assert machine.values(out) == [1, 2, 3]
        (task,) = (task for task in running.tasks.values() if task.partition == 1)
        assert set(task.committed) == {sf.TopicPartition("first", 1), sf.TopicPartition("second", 1)}
        assert caplog.text.count("when this worker started") == 2


async def test_a_shorter_topic_that_grows_joins_the_task_that_the_longer_one_has() -> None:
    app = sf.App("grow-to-the-other")
    short = app.topic("short", key_type=str, value_type=int, partitions=1)
    long = app.topic("long", key_type=str, value_type=int, partitions=2)
    seen: list[int] = []

    @app.agent([short, long])
    def work(number: int) -> None:
        seen.append(number)

    async with Machine(app, heartbeat_interval_ms=500) as machine:
        await machine.start()
        await machine.send(long, 1, key="k", partition=1)
        await machine.settle()
        await grow(machine, "short", 2)
        short.partitions = 2  # clients that start look at what is declared
        async with Client(app, machine.settings, clock=machine.clock) as client:
            await client.send(short, key="k", value=2, partition=1)
        notice(machine)
        await until(lambda: seen == [1, 2])


async def test_a_part_of_a_tasks_partitions_that_goes_and_comes_back_has_the_task_opened_again() -> None:
    """As where workers of before lead, to whom they are two tasks."""
    app = sf.App("parts")
    first = app.topic("first", key_type=str, value_type=int, partitions=1)
    second = app.topic("second", key_type=str, value_type=int, partitions=1)
    seen: list[int] = []

    @app.agent([first, second])
    def work(number: int) -> None:
        seen.append(number)

    async with Machine(app) as machine:
        running = await machine.start()
        manager = running.worker.manager
        assert manager is not None
        part = frozenset({sf.TopicPartition("first", 0)})
        await manager.handle(Lost(part, "it is another worker's"))
        assert not running.tasks
        await manager.handle(Assigned(part, 1))
        assert list(running.tasks) == ["first-0"]
        for topic in (first, second):
            await machine.send(topic, len(seen), key="k")
            await machine.settle()
        assert seen == [0, 1]


async def test_a_topic_that_is_grouped_may_grow_and_the_groups_keep_their_partitions() -> None:
    app = sf.App("grow-and-group")
    numbers = app.topic("numbers", key_type=str, value_type=int)
    counts = app.table("counts", key_type=int, value_type=int, default=int)
    out = app.topic("out", key_type=int, value_type=int, partitions=1)

    @app.agent(numbers.group_by(lambda number: number % 3, name="by-rest", key_type=int), sink=out)
    async def count(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for event in stream.events():
            counts[event.key] += 1
            yield counts[event.key]

    async with Machine(app, partitions=2, heartbeat_interval_ms=500) as machine:
        running = await machine.start()
        for number in (0, 1):
            await machine.send(numbers, number, key="k", partition=1)
        await machine.settle()
        await grow(machine, "numbers", 3)
        notice(machine)
        await until(lambda: "numbers-2" in running.tasks)
        await machine.stop(running)
        running = await machine.start()  # a worker that comes later has to do with it, too
        async with Client(app, machine.settings, clock=machine.clock) as client:  # which knows of the partition
            for number in (3, 4):
                await client.send(numbers, key="k", value=number, partition=2)
        await machine.settle()
        assert sorted(machine.values(out)) == [1, 1, 2, 2]
        assert sorted(running.tasks) == [
            *(f"grow-and-group-by-rest-repartition-{number}" for number in range(2)),
            *(f"numbers-{number}" for number in range(3)),
        ]
