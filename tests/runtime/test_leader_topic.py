"""An app without agents: who owns its leader topic leads."""

import asyncio
import os
from typing import Any

import anyio
import pytest

import streamflow as sf
from streamflow.testing import TestApp
from tests.runtime.machine import Machine
from tests.runtime.waiting import until

LEADER = sf.TopicPartition("clock-leader", 0)


def clock() -> tuple[sf.App, Any, list[int]]:
    app = sf.App("clock")
    ticks = app.topic("ticks", key_type=str, value_type=int, partitions=1)
    fired: list[int] = []

    @app.timer(10, on_leader=True)
    async def tick() -> None:
        fired.append(1)
        await ticks.send(key="k", value=len(fired))
        if len(fired) == 2:
            raise ValueError("its send goes with it")

    return app, ticks, fired


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_one_of_several_workers_leads_and_its_sends_are_committed(guarantee: str) -> None:
    app, ticks, fired = clock()
    async with Machine(app, processing_guarantee=guarantee) as machine:
        first, second = await machine.start(), await machine.start()
        await until(lambda: len(first.tasks) + len(second.tasks) == 1)
        for count in (1, 2, 3):
            machine.clock.advance(10)
            await until(lambda count=count: len(fired) >= count)
        assert len(fired) == 3
        await machine.look()
        if guarantee == "exactly_once":
            assert machine.values(ticks) == []  # not committed yet
        leader, other = (first, second) if first.tasks else (second, first)
        await machine.commit(leader)
        await machine.look()
        assert machine.values(ticks) == [1, 3]
        await machine.crash(leader)
        await until(lambda: list(other.tasks) == ["clock-leader-0"])
        machine.clock.advance(10)
        await until(lambda: len(fired) == 4)
        await machine.stop(other)
        await machine.look()
        assert machine.values(ticks) == [1, 3, 4]


async def test_what_a_stranger_writes_into_its_topic_is_passed_over() -> None:
    app, ticks, fired = clock()
    async with Machine(app) as machine:
        running = await machine.start()
        await until(lambda: list(running.tasks) == ["clock-leader-0"])
        for _ in range(3):
            await machine.send(app.leader_topic, b"what", key=b"k")
        await machine.settle()
        assert (await machine.committed())[LEADER] == 3
        machine.clock.advance(10)
        await until(lambda: len(fired) == 1)
        await machine.stop(running)
        await machine.look()
        assert machine.values(ticks) == [1]


async def test_a_run_to_the_end_ends() -> None:
    app, ticks, _ = clock()
    done: list[int] = []

    @app.task(on_leader=True)
    async def once() -> None:
        done.append(1)
        await ticks.send(key="k", value=-1)

    async with Machine(app, commit_interval_ms=100) as machine:
        await machine.ran_out(await machine.start(until_end=True))
        assert done == [1]
        await machine.look()
        assert machine.values(ticks) == [-1]


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_task_that_sends_without_end_holds_up_nobody_and_waits_for_room(guarantee: str) -> None:
    app = sf.App("clock", memory_budget_bytes=16 << 20)
    blobs = app.topic("blobs", key_type=str, value_type=bytes, partitions=1)
    held: list[int] = []
    seen: set[int] = set()
    count = 8_000

    @app.task(on_leader=True)
    async def produce() -> None:
        for _ in range(count):
            await blobs.send(key="k", value=os.urandom(1000))
            (task,) = running.tasks.values()
            held.append(task.outputs.sealed_bytes)

    async with Machine(app, processing_guarantee=guarantee) as machine:
        running = await machine.start()
        with anyio.fail_after(20):
            while len(held) < count:
                seen.add(len(held))
                machine.clock.advance(0.25)
                await asyncio.sleep(0)
        assert seen - {0}, "nothing else ran until all was sent"
        assert max(held) <= (2 << 20) + (1 << 20)  # an eighth of the budget, and what the batch that filled it has more
        await machine.stop(running)
        await machine.look()
        assert len(machine.values(blobs)) == count


async def test_with_an_agent_the_app_has_no_such_topic_and_takes_the_offsets_of_its_own() -> None:
    app, _, _ = clock()
    async with Machine(app) as machine:
        running = await machine.start()
        await until(lambda: list(running.tasks) == ["clock-leader-0"])
        await machine.stop(running)
        assert "clock-leader" in await machine.log.admin.topics()
        grown, _, later = clock()
        numbers = grown.topic("numbers", key_type=str, value_type=int, partitions=2)

        @grown.agent(numbers)
        def work(number: int) -> None: ...

        assert grown.leader_topic is None
        running = await machine.start(app=grown)
        await until(lambda: sorted(running.tasks) == ["numbers-0", "numbers-1"])
        machine.clock.advance(10)
        await until(lambda: bool(later))


async def test_leader_timers_run_in_tests_of_the_app() -> None:
    app, ticks, _ = clock()
    async with TestApp(app) as test:
        await test.advance(10)
        await test.settle()
        assert [event.value for event in test.records(ticks)] == [1]


def test_a_topic_of_its_name_is_refused() -> None:
    app, _, _ = clock()
    app.topic("clock-leader")
    with pytest.raises(sf.TopologyError, match=r"'clock-leader' \(.*test_leader_topic.py:\d+\).*give it another name"):
        app.topology()


def test_without_anything_on_the_leader_there_is_no_such_topic() -> None:
    app = sf.App("clock")

    @app.timer(10)
    def tick() -> None: ...

    assert app.leader_topic is None
    assert app.topology().sub_topologies == ()
