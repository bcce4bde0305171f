"""Timers, crontabs, tasks and hooks over a virtual clock."""

import asyncio
import dataclasses
import datetime
import logging
from typing import Any

import pytest

import streamflow as sf
from streamflow.testing import TestApp
from tests.runtime.machine import Machine
from tests.runtime.waiting import until

DAY_S = 86_400


def at(text: str) -> int:
    return round(datetime.datetime.fromisoformat(text).timestamp() * 1000)


async def test_missed_intervals_of_a_timer_are_not_made_up() -> None:
    app = sf.App("missed")
    fired: list[float] = []

    @app.timer(10)
    async def tick() -> None:
        fired.append(test.clock.monotonic())

    async with TestApp(app) as test:
        await test.advance(20)
        assert fired == [10, 20]
        test.clock.advance(35)  # as after a machine's sleep: 30, 40 and 50 are past
        await test.advance(10)
        assert fired == [10, 20, 55, 60]


async def test_a_timer_that_raises_is_logged_and_comes_again(caplog: pytest.LogCaptureFixture) -> None:
    app = sf.App("raises")
    fired: list[int] = []

    @app.timer(5)
    def tick() -> None:
        fired.append(1)
        raise ValueError("not now")

    async with TestApp(app) as test:
        await test.advance(11)
    assert len(fired) == 2
    assert caplog.text.count("tick raised") == 2
    assert "not now" in caplog.text


async def test_a_crontab_follows_its_zone_over_a_change_of_the_clocks() -> None:
    app = sf.App("zones")
    fired: list[str] = []

    @app.crontab("30 1 * * *", timezone="Europe/Berlin")
    def nightly() -> None:
        moment = datetime.datetime.fromtimestamp(test.clock.now_ms() / 1000, datetime.UTC)
        fired.append(moment.strftime("%d %H:%M"))

    async with TestApp(app, start_ms=at("2025-03-29T00:29:30+00:00")) as test:
        await test.advance(60)
        test.clock.advance(DAY_S - 120)
        await test.advance(180)
        test.clock.advance(DAY_S - 3600 - 120)
        await test.advance(180)
    assert fired == ["29 00:30", "30 00:30", "30 23:30"]  # an hour earlier in UTC once summer time has begun


async def test_a_task_runs_once_beside_the_agents_and_its_sends_leave_at_once() -> None:
    app = sf.App("tasks")
    out = app.topic("out", key_type=str, value_type=int, partitions=1)
    metadata: list[sf.RecordMetadata | None] = []

    @app.task
    async def begin() -> None:
        metadata.append(await out.send(key="k", value=1))
        out.send_nowait(key="k", value=2)

    async with TestApp(app) as test:
        await until(lambda: metadata)
        await test.settle()
        await until_records(test, 2)
        assert [event.value for event in test.records(out)] == [1, 2]
    assert isinstance(metadata[0], sf.RecordMetadata)


async def until_records(test: TestApp, count: int) -> None:
    while len(test.records("out")) < count:
        await test.settle()
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("with_agent", [True, False])
async def test_a_task_that_raises_stops_the_worker_cleanly(with_agent: bool) -> None:
    app = sf.App("failing")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    go = asyncio.Event()
    seen: list[int] = []

    @app.task
    async def fail() -> None:
        await go.wait()
        raise ValueError("broken")

    if with_agent:

        @app.agent(numbers)
        def work(number: int) -> None:
            seen.append(number)

    async with Machine(app) as machine:
        running = await machine.start()
        if with_agent:
            await machine.send(numbers, 1, key="k")
            await until(lambda: seen)
        go.set()
        with pytest.raises(sf.StreamFlowError, match="task 'fail' raised ValueError: broken"):
            await machine.ended(running)
        if with_agent:  # what was done is committed
            assert await machine.committed() == {sf.TopicPartition("numbers", 0): 1}


async def test_the_leader_alone_runs_leader_timers_and_their_sends_join_its_commit() -> None:
    app = sf.App("leader")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=4)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)
    fired: list[int] = []

    @app.agent(numbers)
    def work(number: int) -> None: ...

    @app.timer(10, on_leader=True)
    async def tick() -> None:
        fired.append(1)
        assert await out.send(key="k", value=len(fired)) is None
        if len(fired) == 2:
            raise ValueError("its send goes with it")

    async with Machine(app) as machine:
        first, second = await machine.start(), await machine.start()
        await until(lambda: len(first.tasks) == len(second.tasks) == 2)
        for count in (1, 2, 3):
            machine.clock.advance(10)
            await until(lambda count=count: len(fired) >= count)
        assert len(fired) == 3
        await machine.look()
        assert machine.values(out) == []  # not committed yet
        await machine.settle()
        for running in (first, second):
            await machine.commit(running)
        await machine.look()
        assert machine.values(out) == [1, 3]
        leader = first if "numbers-0" in first.tasks else second
        await machine.crash(leader)
        other = machine.workers[0]
        await until(lambda: "numbers-0" in other.tasks)
        machine.clock.advance(10)
        await until(lambda: len(fired) == 4)


async def test_leader_timers_read_what_is_committed_of_tables_and_change_it_like_other_timers() -> None:
    app = sf.App("leader", partitions=1)
    numbers = app.topic("numbers", key_type=str, value_type=int)
    counts = app.table("counts", key_type=str, value_type=int)
    tags = app.set_table("tags", key_type=str, member_type=str)
    read: list[Any] = []

    @app.agent(numbers, tables=[counts, tags])
    def work(number: int) -> None:
        counts["k"] = number
        tags["k"].add("one")

    @app.timer(10, on_leader=True)
    async def tick() -> None:
        read.append((counts["k"], "k" in counts, dict(counts.items()), set(tags["k"])))
        for refused in (lambda: counts.update(k=1), lambda: counts.pop("k"), lambda: tags["k"].add("two")):
            with pytest.raises(sf.ClosedError, match="update_async"):
                refused()
        assert await counts.update_async("k", lambda count: (count or 0) + 1) == 6
        read.append(counts["k"])

    async with TestApp(app) as test:
        await test.send(numbers, 5, key="k")
        await test.settle()
        await test.advance(10)
        await test.settle()
        assert read == [(5, True, {"k": 5}, {"one"}), 6]


async def test_a_leader_task_that_never_ends_sends_all_the_same() -> None:
    app = sf.App("endless")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers)
    def work(number: int) -> None: ...

    @app.task(on_leader=True)
    async def feed() -> None:
        await out.send(key="k", value=1)
        await asyncio.Event().wait()

    async with TestApp(app) as test:
        await test.advance(1)  # it looks every quarter of a second whether it leads
        await until_records(test, 1)


@pytest.mark.parametrize("kind", ["task", "timer"])
@pytest.mark.parametrize("is_caught", [False, True])
async def test_what_sends_while_the_leader_moves_stops_no_worker(
    kind: str, is_caught: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A send is refused once the leader task goes, and mostly before it is noticed that another one leads."""
    caplog.set_level(logging.INFO, "streamflow.jobs")
    begun: list[sf.App] = []
    refused: list[sf.App] = []

    def make() -> sf.App:
        app = sf.App("moving")
        numbers = app.topic("numbers", key_type=str, value_type=int, partitions=4)
        out = app.topic("out", key_type=str, value_type=int, partitions=1)

        @app.agent(numbers)
        def work(number: int) -> None: ...

        async def lead() -> None:
            begun.append(app)
            while True:
                try:
                    await out.send(key="k", value=1)
                except sf.ClosedError as error:
                    refused.append(app)
                    if is_caught:
                        raise RuntimeError("wrapped") from error
                    raise
                await asyncio.sleep(0.001)

        if kind == "task":
            app.task(on_leader=True)(lead)
        else:
            app.timer(1, on_leader=True)(lead)
        return app

    async with Machine(make()) as machine:
        first = await machine.start()
        await until(lambda: len(first.tasks) == 4)
        machine.clock.advance(1)
        await until(lambda: begun == [machine.app])
        machine.settings = dataclasses.replace(machine.settings, capacity=1000)
        second = await machine.start(app=make())
        await until(lambda: refused == [machine.app])
        await until(lambda: "numbers-0" in second.tasks)
        machine.clock.advance(1)
        await until(lambda: begun == [machine.app, second.worker.app])
        assert not first.ended.is_set()
        assert "the leader task has moved while it ran" in caplog.text
        assert "Traceback" not in caplog.text


async def test_a_task_that_raises_while_it_leads_is_named_with_its_error() -> None:
    app = sf.App("failing")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers)
    def work(number: int) -> None: ...

    @app.task(on_leader=True)
    async def fail() -> None:
        raise ValueError("broken")

    async with Machine(app) as machine:
        running = await machine.start()
        await until(lambda: "numbers-0" in running.tasks)
        machine.clock.advance(1)
        with pytest.raises(sf.StreamFlowError, match="task 'fail' raised ValueError: broken"):
            await machine.ended(running)


async def test_hooks_are_called_in_order_sync_and_async() -> None:
    app = sf.App("hooks")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=2)
    calls: list[object] = []

    @app.agent(numbers)
    def work(number: int) -> None:
        calls.append(number)

    @app.on_start
    def start() -> None:
        calls.append("start")

    @app.on_start
    async def start_too() -> None:
        await numbers.send(key="k", value=7)
        calls.append("start too")

    @app.on_assigned
    async def assigned(partitions: set[sf.TopicPartition]) -> None:
        calls.append(sorted(tp.partition for tp in partitions))

    @app.on_revoked
    def revoked(partitions: set[sf.TopicPartition]) -> None:
        calls.append(("revoked", len(partitions)))

    @app.on_stop
    async def stop() -> None:
        calls.append("stop")

    async with TestApp(app) as test:
        await test.settle()
    assert calls == ["start", "start too", [0, 1], 7, ("revoked", 2), "stop"]


async def test_an_error_of_on_start_refuses_the_start() -> None:
    app = sf.App("refused")

    @app.on_start
    def start() -> None:
        raise OSError("no such file")

    async with Machine(app) as machine:
        running = await machine.start()
        with pytest.raises(sf.StreamFlowError, match=r"@app.on_start hook 'start' raised OSError: no such file"):
            await machine.ended(running)


@pytest.mark.parametrize("kind", ["on_assigned", "on_revoked", "on_stop"])
async def test_an_error_of_another_hook_stops_the_worker_and_the_others_are_called(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = sf.App("hook-errors")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    called: list[str] = []

    @app.agent(numbers)
    def work(number: int) -> None: ...

    def fail(*_: object) -> None:
        raise ValueError("hook")

    def fine(*_: object) -> None:
        called.append(kind)

    if kind == "on_stop":
        app.on_stop(lambda: fail())
        app.on_stop(lambda: fine())
    else:
        register = app.on_assigned if kind == "on_assigned" else app.on_revoked
        register(lambda partitions: fail(partitions))
        register(lambda partitions: fine(partitions))
    with caplog.at_level(logging.ERROR):
        async with Machine(app) as machine:
            running = await machine.start()
            running.worker.request_stop()
            with pytest.raises(sf.StreamFlowError, match=f"@app.{kind} hook .* raised ValueError: hook"):
                await machine.ended(running)
    assert called == [kind]
    assert "raised ValueError: hook" in caplog.text
