"""Workers that come and go on one log: handing over, crashing, restarting, stopping, and what they say about it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import streamflow as sf
from streamflow.errors import LogUnavailableError
from streamflow.log.api import AtomicCommit, Lost, Revoked
from streamflow.log.sqlite.admin import SqliteAdmin
from streamflow.log.sqlite.group import SqliteGroup
from streamflow.log.sqlite.producer import SqliteTransactionalProducer
from streamflow.metrics import PrometheusSensors
from streamflow.runtime import patience
from streamflow.runtime.local_state import LocalStates
from tests.runtime.machine import Machine
from tests.runtime.waiting import until


def copying_app(name: str, *, partitions: int = 4) -> tuple[sf.App, "sf.Topic[str, int]", "sf.Topic[str, int]"]:
    app = sf.App(name)
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=partitions)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            await asyncio.sleep(0)
            yield number

    return app, numbers, out


async def sent(machine: Machine, topic: "sf.Topic[str, int]", numbers: range) -> None:
    for number in numbers:
        await machine.send(topic, number, key=f"k{number % 13}")


async def test_two_workers_split_the_partitions_and_hand_over_at_a_stop() -> None:
    app, numbers, out = copying_app("split")
    async with Machine(app) as machine:
        first = await machine.start()
        assert len(first.tasks) == 4
        kept = dict(first.tasks)
        await sent(machine, numbers, range(40))
        second = await machine.start()
        await until(lambda: len(second.tasks) == 2)
        assert len(first.tasks) == 2
        assert all(kept[name] is task for name, task in first.tasks.items())  # what stays is not touched
        assert all(task.lost == (name not in first.tasks) for name, task in kept.items())  # what left is in no commit
        await sent(machine, numbers, range(40, 80))
        await machine.settle()
        await machine.stop(first)
        await until(lambda: len(second.tasks) == 4)
        await sent(machine, numbers, range(80, 120))
        await machine.settle()
        assert sorted(machine.values(out)) == list(range(120))


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_crash_loses_nothing(guarantee: str) -> None:
    app, numbers, out = copying_app("crash")
    async with Machine(app, processing_guarantee=guarantee) as machine:
        first, second = await machine.start(), await machine.start()
        await until(lambda: len(first.tasks) == len(second.tasks) == 2)
        await sent(machine, numbers, range(60))
        await machine.commit(first)
        await machine.crash(first)
        await machine.settle()
        assert len(second.tasks) == 4
        got = machine.values(out)
        assert set(got) == set(range(60))
        if guarantee == "exactly_once":
            assert len(got) == 60


async def test_a_restart_after_a_clean_stop_reads_nothing_again() -> None:
    app = sf.App("again")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=2)
    seen: list[int] = []
    gate = asyncio.Event()

    @app.agent(numbers, concurrency=3)
    async def lanes(number: int) -> None:
        if len(seen) > 100:
            await gate.wait()
        seen.append(number)

    async with Machine(app) as machine:
        running = await machine.start()
        await sent(machine, numbers, range(900))
        await until(lambda: len(seen) > 100)
        running.worker.request_stop()
        await until(lambda: running.worker.state == "stopping")
        gate.set()
        await machine.ended(running)  # in the middle of it
        assert len(seen) < 120
        first = len(seen)
        running = await machine.start()
        await machine.settle()
        assert sorted(seen) == list(range(900))
        assert len(seen) > first


async def test_a_stop_in_the_middle_of_a_batch_skips_nothing() -> None:
    app = sf.App("middle")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    seen: list[int] = []
    others: list[int] = []

    @app.agent(numbers)
    async def one(number: int) -> None:
        await asyncio.sleep(0)
        seen.append(number)

    @app.agent(numbers)
    def two(number: int) -> None:
        others.append(number)

    async with Machine(app) as machine:
        await sent(machine, numbers, range(1000))
        while len(seen) < 1000:
            before = len(seen)
            running = await machine.start()
            await until(lambda before=before: len(seen) > before)
            await machine.stop(running)
        assert seen == list(range(1000))
        assert others == list(range(1000))


async def test_a_record_that_takes_too_long_is_left_at_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    app = sf.App("stuck")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, sink=out)
    async def work(number: int) -> int:
        if number == 1 and not released:
            await anyio.sleep_forever()
        return number

    released: list[bool] = []
    async with Machine(app, shutdown_timeout_s=0.2) as machine:
        running = await machine.start()
        await sent(machine, numbers, range(3))
        await until(lambda: running.worker.status().tasks[0].partitions[0].position == 1)
        await machine.stop(running)
        assert await machine.committed() == {sf.TopicPartition("numbers", 0): 1}
        released.append(True)
        await machine.start()
        await machine.settle()
        assert machine.values(out) == [0, 1, 2]


async def test_a_commit_that_fails_is_tried_again_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    app, numbers, out = copying_app("failing", partitions=1)
    failing = [True]
    commit = SqliteTransactionalProducer.commit

    async def fail(self: SqliteTransactionalProducer, commit_: AtomicCommit) -> None:
        if failing:
            raise LogUnavailableError("away")
        await commit(self, commit_)

    monkeypatch.setattr(SqliteTransactionalProducer, "commit", fail)
    async with Machine(app, session_timeout_ms=8_000, heartbeat_interval_ms=1_000) as machine:
        running = await machine.start()
        await sent(machine, numbers, range(5))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(machine.commit, running)
            await until(lambda: running.worker.uncommitted_for_s() >= 0 and machine.clock.next_wake_s() is not None)
            for _ in range(45):
                machine.clock.advance(1.0)
                await asyncio.sleep(0.001)
            status = running.worker.status()
            assert not status.live
            assert "nothing could be committed for" in status.live_reason
            failing.clear()
            for _ in range(3):
                machine.clock.advance(1.0)
                await asyncio.sleep(0.001)
        assert running.worker.status().live
        await machine.settle()
        assert machine.values(out) == list(range(5))


async def test_a_cancelled_commit_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    app, numbers, out = copying_app("cancelled", partitions=1)
    hanging = [True]
    commit = SqliteTransactionalProducer.commit

    async def hang(self: SqliteTransactionalProducer, commit_: AtomicCommit) -> None:
        if hanging and commit_.outputs:
            await anyio.sleep_forever()
        await commit(self, commit_)

    monkeypatch.setattr(SqliteTransactionalProducer, "commit", hang)
    async with Machine(app) as machine:
        running = await machine.start()
        await sent(machine, numbers, range(5))
        await until(lambda: running.worker.status().tasks[0].partitions[0].position == 5)
        with anyio.move_on_after(0.02):
            await machine.commit(running)
        hanging.clear()
        await machine.settle()
        assert machine.values(out) == list(range(5))


async def test_lost_partitions_commit_nothing_and_are_processed_by_the_next_owner() -> None:
    app, numbers, out = copying_app("lost", partitions=2)
    async with Machine(app, session_timeout_ms=10_000, heartbeat_interval_ms=1_000) as machine:
        first = await machine.start()
        await sent(machine, numbers, range(20))
        await until(lambda: sum(p.position for t in first.worker.status().tasks for p in t.partitions) == 20)
        before = set(map(id, first.tasks.values()))
        with_heart: Any = first.worker.group
        heart = with_heart.heart
        heart.session.write(lambda sql: sql.execute("DELETE FROM members"))  # as another member does when it expires
        heart.session.write(lambda sql: sql.execute("UPDATE owners SET member_id = NULL"))
        machine.clock.advance(1.1)
        await until(lambda: first.tasks and not before & set(map(id, first.tasks.values())))
        await machine.settle()
        assert sorted(machine.values(out)) == list(range(20))


@pytest.mark.parametrize("kind", ["agent", "on_assigned", "on_recover", "task", "timer"])
async def test_the_watch_over_the_event_loop_begins_with_code_of_the_app(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = sf.App("watched")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    told: list[bool] = []
    told_while_opening: list[bool] = []
    machine = Machine(app)
    open_state = LocalStates.open

    def note(*_: Any, into: list[bool] = told) -> None:
        (running,) = machine.workers
        into.append(running.worker.runs_user_code())

    async def opened(states: LocalStates, *args: Any) -> Any:
        note(into=told_while_opening)
        return await open_state(states, *args)

    monkeypatch.setattr(LocalStates, "open", opened)

    table = app.table("totals", key_type=str, value_type=int, on_recover=note if kind == "on_recover" else None)
    if kind == "on_assigned":
        app.on_assigned(note)
    if kind == "task":
        app.task(note)
    if kind == "timer":
        app.timer(1.0)(note)

    @app.agent(numbers, tables=[table])
    async def work(stream: sf.Stream[int]) -> None:
        note()
        async for _ in stream:
            pass

    async with machine:
        await machine.start()
        with anyio.fail_after(5):
            while not told:
                machine.clock.advance(1.0)
                await anyio.sleep(0.001)
    assert told[0]
    if kind in {"agent", "on_recover", "timer"}:
        assert told_while_opening == [False]


class Moves:
    """An app whose agent can be held up, and what is said of its partitions."""

    def __init__(self) -> None:
        app = self.app = sf.App("moves")
        numbers = self.numbers = app.topic("numbers", key_type=str, value_type=int, partitions=2)
        self.gate = asyncio.Event()
        self.in_hand = 0
        self.gone: list[sf.TopicPartition] = []

        @app.agent(numbers)
        async def work(number: int) -> None:
            self.in_hand += 1
            await self.gate.wait()

        @app.on_revoked
        def note(partitions: set[sf.TopicPartition]) -> None:
            self.gone.extend(partitions)


async def test_what_was_lost_before_it_could_be_given_back_is_told_as_lost_and_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop was blocked: both events are there when it gets on."""
    caplog.set_level("INFO")
    moves, sensors = Moves(), PrometheusSensors()
    both = frozenset(sf.TopicPartition("numbers", number) for number in range(2))
    kept, lost = sorted(both)
    answered: list[frozenset[sf.TopicPartition]] = []
    monkeypatch.setattr(SqliteGroup, "revoked", lambda _, partitions: answered.append(partitions))
    async with Machine(moves.app) as machine:
        running = await machine.start(sensors=sensors)
        manager = running.worker.manager
        assert manager is not None
        caplog.clear()
        events = [Revoked(both), Lost(frozenset({lost}), "the session expired")]
        for event in events:
            manager.foresee(event)
        for event in events:
            await manager.handle(event)
        assert [line for line in caplog.messages if "numbers-" in line] == [
            "giving back: numbers-0",
            "revoked: numbers-0",
            "lost: numbers-1: the session expired",
        ]
        assert answered == [{kept}]
        assert sensors.moved == {"assigned": 2, "revoked": 1, "lost": 1}
        assert moves.gone == [kept, lost]
        await machine.stop(running)
    assert moves.gone == [kept, lost]


async def test_what_is_not_given_back_in_time_is_told_as_lost_and_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    moves, sensors = Moves(), PrometheusSensors()
    async with Machine(moves.app, session_timeout_ms=10_000, heartbeat_interval_ms=1_000) as machine:
        first = await machine.start(sensors=sensors)
        for key in "abcdef":
            await machine.send(moves.numbers, 1, key=key)
        await until(lambda: moves.in_hand == 2)
        second = machine.launch()  # which is ready when it has its share
        await until(lambda: "giving back: numbers-" in caplog.text)
        assert first.worker.group is not None
        while len(first.worker.group.assignment) == 2:  # it is asked to give one back, and does not
            machine.clock.advance(1.1)
            await anyio.sleep(0.001)
        moves.gate.set()
        await until(lambda: "lost: numbers-" in caplog.text)
        assert "not given back within rebalance_timeout_ms" in caplog.text
        assert "revoked: " not in caplog.text
        await until(lambda: len(moves.gone) == 1)
        assert sensors.moved == {"assigned": 2, "revoked": 0, "lost": 1}
        await until(lambda: len(second.tasks) == 1)
        await machine.stop(first)
        assert sorted(moves.gone) == [sf.TopicPartition("numbers", 0), sf.TopicPartition("numbers", 1)]


async def test_a_stop_does_not_wait_for_records_of_partitions_that_are_lost_meanwhile() -> None:
    """A session that ends while the log is away and the worker stops: it would take all the time it has for nothing."""
    app = sf.App("loses")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    begun = anyio.Event()

    @app.agent(numbers)
    async def work(stream: sf.Stream[int]) -> None:
        async for _ in stream:
            begun.set()
            await anyio.sleep_forever()

    async with Machine(app) as machine:
        running = await machine.start()
        await machine.send(numbers, 1)
        await begun.wait()
        manager = running.worker.manager
        assert manager is not None
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(manager.finish_records)
                await anyio.lowlevel.checkpoint()
                await manager.handle(Lost(frozenset({sf.TopicPartition("numbers", 0)}), "silent for too long"))


async def test_status_tells_positions_lag_and_readiness() -> None:
    app = sf.App("status")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=2)
    gate = asyncio.Event()

    @app.agent(numbers)
    async def work(number: int) -> None:
        await gate.wait()

    async with Machine(app, max_poll_interval_ms=100) as machine:
        running = await machine.start()
        await until(lambda: running.worker.status().ready)
        for number in range(3):
            await machine.send(numbers, number, key="k", partition=1)
        await until(lambda: running.worker.status().tasks[1].partitions[0].lag == 3)
        status = running.worker.status()
        assert [task.task for task in status.tasks] == ["numbers-0", "numbers-1"]
        (first,), (second,) = (task.partitions for task in status.tasks)
        assert (first.position, first.end_offset, first.lag) == (0, 0, 0)
        assert (second.position, second.end_offset, second.lag) == (0, 3, 3)
        assert (status.app, status.state, status.guarantee, status.live) == ("status", "running", "exactly_once", True)
        await until(lambda: not running.worker.status().live)
        assert "task numbers-1 has had a record in hand" in running.worker.status().live_reason
        gate.set()
        await until(lambda: running.worker.status().live)
        await machine.stop(running)
        assert running.worker.status().state == "stopped"
        assert not running.worker.status().ready


async def test_a_unit_that_waits_for_more_is_not_stuck() -> None:
    app = sf.App("waits")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers)
    async def work(stream: sf.Stream[int]) -> None:
        async for _ in stream.take(100):
            pass

    async with Machine(app, max_poll_interval_ms=100) as machine:
        running = await machine.start()
        await machine.send(numbers, 1, key="k")
        await until(lambda: any(task.waits_for_time() for task in running.tasks.values()))
        await asyncio.sleep(0.15)
        assert running.worker.status().live
        await machine.stop(running)
        assert await machine.committed() == {sf.TopicPartition("numbers", 0): 0}


async def test_a_partition_whose_records_were_deleted_holds_up_no_other_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = sf.App("deleted")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=2)
    gone, fine = (sf.TopicPartition("numbers", number) for number in range(2))
    seen: list[int] = []

    @app.agent(numbers)
    def work(number: int) -> None:
        seen.append(number)

    asked: list[sf.TopicPartition] = []
    answer = asyncio.Event()
    start_offsets = SqliteAdmin.start_offsets

    async def slow(self: SqliteAdmin, partitions: Sequence[sf.TopicPartition]) -> Mapping[sf.TopicPartition, int]:
        asked.extend(partitions)
        if len(asked) == 1:
            raise LogUnavailableError("away")
        await answer.wait()
        return await start_offsets(self, partitions)

    async with Machine(app) as machine:
        running = await machine.start()
        await machine.settle()
        await machine.stop(running)
        for number in range(3):
            await machine.send(numbers, number, key="k", partition=0)
        await machine.log.admin.delete_records({gone: 2})
        monkeypatch.setattr(SqliteAdmin, "start_offsets", slow)
        running = await machine.start()
        await until(lambda: asked == [gone])
        running.tasks["numbers-0"].inputs.wake()  # its agent looks again, and asks for nothing
        for number in range(10, 13):
            await machine.send(numbers, number, key="k", partition=1)
            await until(lambda number=number: number in seen)
        machine.clock.advance(1)
        await until(lambda: len(asked) == 2)
        await machine.send(numbers, 13, key="k", partition=1)
        await until(lambda: seen == [10, 11, 12, 13])
        assert asked == [gone, gone]
        answer.set()
        await machine.settle()
        assert seen == [10, 11, 12, 13, 2]
        assert "going on at 2 as auto_offset_reset=earliest says" in caplog.text
        assert await machine.committed() == {gone: 3, fine: 4}


async def test_a_worker_without_partitions_is_ready() -> None:
    app, _, _ = copying_app("idle", partitions=1)
    async with Machine(app) as machine:
        await machine.start()
        second = await machine.start()
        await until(lambda: second.worker.status().ready)
        assert second.worker.status().tasks == ()


async def test_a_topic_of_another_size_and_a_missing_topic_are_refused() -> None:
    app, _, _ = copying_app("sizes", partitions=3)
    async with Machine(app) as machine:
        other = sf.App("sizes")
        other.topic("numbers", key_type=str, value_type=int, partitions=5)
        running = await machine.start(app=other)
        with pytest.raises(sf.TopologyError, match="has 3 partitions, but partitions=5"):
            await machine.ended(running)
        absent = sf.App("absent")
        absent.topic("nowhere", create=False)
        running = await machine.start(app=absent)
        with pytest.raises(sf.TopologyError, match="'nowhere' does not exist"):
            await machine.ended(running)


async def test_an_agent_that_ignores_its_cancellation_holds_up_nobody_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = sf.App("deaf")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    hear, revoked = asyncio.Event(), asyncio.Event()

    @app.agent(numbers)
    async def deaf(stream: sf.Stream[int]) -> None:
        while not hear.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                async for _ in stream:
                    pass

    @app.on_revoked
    def gone(partitions: set[sf.TopicPartition]) -> None:
        revoked.set()

    async with Machine(app) as machine:
        running = await machine.start()
        await machine.send(numbers, 1, key="k")
        await machine.settle()
        running.worker.request_stop()
        with pytest.raises(
            sf.ClosedError, match=r"not agent 'deaf' \(task numbers-0\): it goes on after it was cancelled"
        ):
            await machine.ended(running)
        assert revoked.is_set()
        assert "task numbers-0: agent 'deaf' goes on 0.8 s after it was cancelled" in caplog.text
        assert await machine.committed() == {sf.TopicPartition("numbers", 0): 1}
        again = await machine.start(app=copying_app("deaf", partitions=1)[0])  # the group is left, the log is free
        await machine.stop(again)
        hear.set()


async def test_a_worker_that_is_cancelled_does_not_wait_for_a_deaf_agent_for_ever(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    app = sf.App("deaf-crash")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    hear = asyncio.Event()

    @app.agent(numbers)
    async def deaf(number: int) -> None:
        while not hear.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async with Machine(app) as machine:
        running = await machine.start()
        await machine.send(numbers, 1, key="k")
        await until(lambda: any(each.oldest_in_flight_s() for each in running.tasks.values()))
        await machine.crash(running)
        assert "task numbers-0: agent 'deaf' goes on 0.1 s after it was cancelled" in caplog.text
        hear.set()


async def test_an_agent_that_cleans_up_when_it_is_cancelled_is_waited_for() -> None:
    app = sf.App("cleans-up")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    cleaned: list[str] = []

    @app.agent(numbers)
    async def work(stream: sf.Stream[int]) -> None:
        try:
            async for _ in stream:
                pass
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(0.05)
            cleaned.append("all")

    async with Machine(app) as machine:
        running = await machine.start()
        await machine.stop(running)
        assert cleaned == ["all"]
