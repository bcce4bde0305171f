"""Standbys: stores that follow the changelogs of tasks that run in another worker."""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anyio
import pytest

import streamflow as sf
from streamflow.errors import OffsetOutOfRangeError, StateCorruptedError, StateFullError, StateRefusedError
from streamflow.log.api import Fetched, OffsetMark
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import NONE
from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.fetch_places import FetchPlaces
from streamflow.runtime.standby import Standby
from streamflow.runtime.standbys import Standbys
from streamflow.sensors import Sensors
from streamflow.state.format import unpack
from streamflow.state.memory import MemoryStore
from streamflow.state.store import StoreBatch
from tests.runtime.cut_off import CutOff
from tests.runtime.machine import Machine, Running
from tests.runtime.waiting import until

GUARANTEES = ["exactly_once", "at_least_once"]
PARTITIONS = 2


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.runtime.standby._PAUSE_S", 0.001)
    monkeypatch.setattr("streamflow.runtime.standbys._MARKS_EVERY_S", 0.002)
    monkeypatch.setattr("streamflow.runtime.standbys._MARKS_UNLIMITED_EVERY_S", 0.002)
    monkeypatch.setattr("streamflow.runtime.standbys._ENDS_EVERY_S", 0.002)


class Counted(Sensors):
    """What was restored, and what standbys applied, by table."""

    def __init__(self) -> None:
        self.restored_records: Counter[str] = Counter()
        self.applied: Counter[str] = Counter()

    def restored(self, table: str, records: int) -> None:
        self.restored_records[table] += records

    def standby_applied(self, table: str, records: int) -> None:
        self.applied[table] += records


class Summing:
    """An app that sums by key."""

    def __init__(self, *, partitions: int = PARTITIONS, **table: Any) -> None:
        app = self.app = sf.App("sums")
        numbers = self.numbers = app.topic("numbers", key_type=str, value_type=int, partitions=partitions)
        sums = self.sums = app.topic("sums", key_type=str, value_type=int, partitions=partitions)
        self.totals = totals = app.table("totals", key_type=str, value_type=int, default=int, **table)

        @app.agent(numbers, sink=sums, tables=[totals])
        async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
            async for event in stream.events():
                totals[event.key] += event.value
                yield totals[event.key]

    async def send(self, machine: Machine, count: int, *, keys: int = 10) -> None:
        for number in range(count):
            await machine.send(self.numbers, 1, key=f"k{number % keys}")


def standbys_of(running: Running) -> Standbys:
    assert running.worker.standbys is not None
    return running.worker.standbys


async def follows(running: Running, task: str) -> None:
    """Wait until a worker has been told to follow a task."""
    await until(lambda: TaskId(*_parts(task)) in standbys_of(running).held())


async def is_told(running: Running) -> None:
    """Wait for what the group tells, so that it does not come after what the test tells."""
    conversation = running.worker.conversation
    assert conversation is not None
    await until(lambda: conversation.told.active is not None)


async def follow(running: Running, *tasks: str) -> None:
    """Tell a worker what to follow, beside what the group tells it."""
    assert running.worker.manager is not None
    await standbys_of(running).follow([TaskId(*_parts(task)) for task in tasks], [], running.worker.manager.has)


def _parts(task: str) -> tuple[str, int]:
    sub, _, partition = task.rpartition("-")
    return sub, int(partition)


def standby_of(running: Running, task: str) -> Standby:
    return standbys_of(running).held()[TaskId(*_parts(task))]


async def level(running: Running, task: str) -> Standby:
    """Wait until a standby has all that its task has committed."""
    standby = standby_of(running, task)
    await until(lambda: standby.state is not None and standby._spans and standby.lag == 0)
    return standby


def content(standby: Standby, table: str = "totals") -> dict[str, int]:
    """What a standby's store has."""
    assert standby.state is not None
    rows = standby.state.store.scan(table)
    return {key.decode(): int.from_bytes(unpack(value, table=table)[0], "big") for key, value in rows}


async def two(machine: Machine) -> tuple[Running, Running, Counted]:
    """Two workers, one task each; the second's sensors."""
    counted = Counted()
    first = await machine.start()
    second = await machine.start(sensors=counted)
    await until(lambda: len(first.tasks) == len(second.tasks) == 1)
    return first, second, counted


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_a_standby_follows_and_its_task_comes_with_nothing_to_restore(guarantee: str) -> None:
    summing = Summing()
    async with Machine(summing.app, standby_replicas=1, processing_guarantee=guarantee) as machine:
        first, second, counted = await two(machine)
        (task,) = first.tasks
        await follows(second, task)
        await summing.send(machine, 50)
        await machine.settle()
        standby = await level(second, task)
        await summing.send(machine, 50)
        await machine.settle()
        await until(lambda: sum(content(standby).values()) > 25 and standby.lag == 0)
        applied = counted.applied["totals"]
        assert standby.state is not None
        store = standby.state.store
        assert applied == standby.records > 0
        assert [each.task for each in second.worker.status().standbys] == [task]
        await machine.crash(first)
        await until(lambda: task in second.tasks and second.tasks[task].state == "running")
        assert counted.restored_records["totals"] == 0
        assert second.tasks[task].tables.store is store  # it was handed over open
        assert not second.worker.status().standbys
        await summing.send(machine, 10)
        await machine.settle()
        assert sorted(dict(summing.totals).items()) == [(f"k{number}", 11) for number in range(10)]


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_a_task_that_leaves_becomes_a_standby_and_comes_back_with_nothing_to_restore(guarantee: str) -> None:
    summing = Summing()
    async with Machine(summing.app, standby_replicas=1, processing_guarantee=guarantee) as machine:
        counted = Counted()
        first = await machine.start(sensors=counted)
        await until(lambda: len(first.tasks) == PARTITIONS)
        await summing.send(machine, 50)
        await machine.settle()
        before = set(first.tasks)
        second = await machine.start()
        await until(lambda: len(first.tasks) == len(second.tasks) == 1)
        (gone,) = before - set(first.tasks)
        await follows(first, gone)
        standby = await level(first, gone)
        await summing.send(machine, 50)
        await machine.settle()
        await until(lambda: standby.records > 0 and standby.lag == 0)
        await machine.stop(second)
        await until(lambda: gone in first.tasks and first.tasks[gone].state == "running")
        assert counted.restored_records["totals"] == 0
        await summing.send(machine, 10)
        await machine.settle()
        assert sorted(dict(summing.totals).items()) == [(f"k{number}", 11) for number in range(10)]


async def test_at_least_once_a_standby_has_nothing_that_is_not_committed() -> None:
    """What is written past the last commit may be taken back: a store that had it could not be gone on with."""
    summing = Summing()
    async with Machine(summing.app, standby_replicas=1, processing_guarantee="at_least_once") as machine:
        first, second, counted = await two(machine)
        (task,) = first.tasks
        await follows(second, task)
        await summing.send(machine, 50)
        await machine.settle()
        standby = await level(second, task)
        before = content(standby)
        changelog = TopicPartition("sums-totals-changelog", standby.partition)
        await append(machine, changelog, [(b"k0", 1_000), (b"new", 1_000)])
        ends = await machine.log.admin.end_offsets([changelog])
        heard = standby._marks
        await until(lambda: standby._marks is not heard)
        assert content(standby) == before
        assert standby.positions["totals"] == ends[changelog] - 2
        assert standby.lag == 0
        await machine.crash(first)
        await until(lambda: task in second.tasks and second.tasks[task].state == "running")
        assert counted.restored_records["totals"] == 2
        await summing.send(machine, 10)
        await machine.settle()
        assert sorted(dict(summing.totals).items()) == [(f"k{number}", 6) for number in range(10)]


async def append(machine: Machine, changelog: TopicPartition, rows: list[tuple[bytes, int]]) -> None:
    builder = BatchBuilder(NONE, 1 << 20)
    for key, value in rows:
        builder.append(machine.clock.now_ms(), key, value.to_bytes(8, "big"), [])
    async with machine.log.producer() as producer:
        await producer.enqueue(changelog, builder.seal())
        await producer.flush()


async def test_a_store_that_is_ahead_of_what_is_committed_is_filled_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Followed as exactly once shows it, and then written at least once, of which the standby did not know in time."""
    summing = Summing(partitions=1)
    async with Machine(summing.app, standby_replicas=1) as machine:
        first = await machine.start()
        await summing.send(machine, 20)
        await machine.settle()
        counted = Counted()
        second = await machine.start(sensors=counted)
        await follows(second, "numbers-0")
        standby = await level(second, "numbers-0")
        good = content(standby)
        changelog = TopicPartition("sums-totals-changelog", 0)
        (end,) = (await machine.log.admin.end_offsets([changelog])).values()
        await append(machine, changelog, [(b"k0", 1_000)])
        await until(lambda: content(standby)["k0"] == 1_000)
        group = first.worker.group
        assert group is not None
        assert group.membership is not None
        mark = CommitMark("pinned", {"totals": end})
        await group.commit({TopicPartition("numbers", 0): OffsetMark(20, mark.metadata())}, group.membership)
        await until(lambda: standby.rebuilds == 1 and standby.state is not None and standby._spans)
        await until(lambda: standby.lag == 0)
        assert content(standby) == good
    assert "is committed up to" in caplog.text


SLOW = {"standby_replicas": 1, "max_poll_interval_ms": 7 * 86_400_000}
"""Settings for tests in which days go by."""


async def days_go_by(machine: Machine, days: int) -> None:
    """Let virtual time pass, and the log be compacted; all are heard of meanwhile."""

    def is_heard(running: Running) -> bool:
        group = running.worker.group
        age_s = None if group is None else group.statistics().last_heartbeat_age_s
        return age_s is not None and age_s < 9 * 3600

    log: Any = machine.log
    for _ in range(days * 4):
        for running in machine.workers:
            assert running.worker.group is not None
            running.worker.group.report_progress()
        machine.clock.advance(6 * 3600)
        await log.maintain()
        await until(lambda: all(map(is_heard, machine.workers)))


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_one_that_was_cut_off_for_long_does_not_keep_what_was_deleted_meanwhile(
    guarantee: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = sf.App("stock")
    moves = app.topic("moves", key_type=str, value_type=int, partitions=1)
    totals = app.table("totals", key_type=str, value_type=int)

    @app.agent(moves, tables=[totals])
    async def move(stream: sf.Stream[int]) -> None:
        async for event in stream.events():
            if event.value:
                totals[event.key] = event.value
            else:
                del totals[event.key]

    async with Machine(app, **SLOW, processing_guarantee=guarantee) as machine:
        await machine.start()
        for number in range(5):
            await machine.send(moves, 1, key=f"k{number}")
        await machine.settle()
        second = await machine.start()
        await follows(second, "moves-0")
        standby = await level(second, "moves-0")
        level_at_ms = machine.clock.now_ms()
        cut_off = CutOff(second)
        await machine.send(moves, 0, key="k0")
        for value, times in ((3, 20), (2, 1)):  # so much that the log is compacted; deletions are kept for 7 days then
            for _ in range(times):
                await machine.send(moves, value, key="k1")
                await machine.settle()
            await days_go_by(machine, 6)
        assert standby.state is not None
        assert standby.state.store.checkpoint.caught_up_at_ms <= level_at_ms  # nothing says that it was later
        cut_off.over()
        await until(lambda: standby.state is not None and content(standby).get("k1") == 2)
        await until(lambda: standby.lag == 0)
        assert content(standby) == {"k1": 2, "k2": 1, "k3": 1, "k4": 1}
        assert standby.rebuilds == 1
    assert "was last level with it" in caplog.text


async def test_a_standby_of_what_nobody_changes_says_that_it_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.runtime.standby._LOOK_S", 0.002)
    summing = Summing(partitions=1)
    async with Machine(summing.app, **SLOW) as machine:
        _, second, standby = await one_followed(machine, summing)
        await days_go_by(machine, 6)
        assert standby.state is not None
        store = standby.state.store
        await until(lambda: machine.clock.now_ms() - store.checkpoint.caught_up_at_ms < 3_600_000)
        await follow(second)
        assert standby.rebuilds == 0


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_of_many_that_are_behind_only_some_have_fetches_under_way(
    monkeypatch: pytest.MonkeyPatch, guarantee: str
) -> None:
    """Each may be 1 MiB, which is in no budget; where the disk is slow, it stays there."""
    monkeypatch.setattr("streamflow.runtime.standbys._FETCHES", 2)
    monkeypatch.setattr("streamflow.runtime.standby_fetches._NEAR", 0)
    summing, goes_on, take = Summing(partitions=6), anyio.Event(), Standby._take
    held, most = Counter[str](), 0

    async def slow(standby: Standby, fetched: Fetched) -> None:
        nonlocal most
        held[standby.name] += 1
        most = max(most, len(+held))
        await goes_on.wait()
        await take(standby, fetched)
        held[standby.name] -= 1

    async with Machine(summing.app, processing_guarantee=guarantee) as machine:
        first = await machine.start()
        await summing.send(machine, 120, keys=60)
        await machine.settle()
        monkeypatch.setattr(Standby, "_take", slow)
        second = await machine.start()
        await is_told(second)
        standbys = standbys_of(second)
        tasks = [TaskId("numbers", number) for number in range(6) if f"numbers-{number}" in first.tasks]
        await standbys.follow(tasks, [], lambda _: False)
        await until(lambda: most == 2)
        await anyio.sleep(0.05)  # the others would be there by now
        assert most == 2
        goes_on.set()
        await until(lambda: all(each._spans and each.lag == 0 for each in standbys.held().values()))
        await until(lambda: standbys._shared.places._free == 2)
        await standbys.follow([], [], lambda _: False)
        await until(lambda: standbys._shared.places._free == 2)


def test_who_waits_for_a_place_is_woken_when_there_is_one() -> None:
    places, woken = FetchPlaces(1), list[str]()
    assert places.take(lambda: woken.append("a"))
    assert not places.take(lambda: woken.append("b"))
    assert not places.take(lambda: woken.append("c"))
    places.give_back()
    assert woken == ["b"]
    assert places.take(lambda: None)


class Faults:
    """What the stores of standbys make of writes with changes; those of tasks are not written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raises: list[Exception] = []
        self._monkeypatch = monkeypatch
        write = MemoryStore.write

        def faulty(store: MemoryStore, batch: StoreBatch) -> None:
            if self.raises and batch.changes:
                raise self.raises.pop()
            write(store, batch)

        monkeypatch.setattr(MemoryStore, "write", faulty)

    async def meet(self, machine: Machine, summing: Summing, *raises: Exception) -> tuple[Running, Standby]:
        """Let the only standby meet them; the worker it is in, and it."""
        first = await machine.start()
        await summing.send(machine, 20)
        await machine.settle()
        second = await machine.start()
        await until(lambda: first.tasks)
        await is_told(second)
        await follow(second, "numbers-0")
        standby = await level(second, "numbers-0")
        self._monkeypatch.setattr("streamflow.runtime.task_tables._STORE_EVERY_S", 1e9)
        await self.again(machine, summing, *raises)
        return second, standby

    async def again(self, machine: Machine, summing: Summing, *raises: Exception) -> None:
        self.raises = list(raises)
        await summing.send(machine, 10)
        await machine.settle()


async def one_followed(machine: Machine, summing: Summing) -> tuple[Running, Running, Standby]:
    """A worker with the only task, another one with its standby, which is level."""
    first = await machine.start()
    await summing.send(machine, 20)
    await machine.settle()
    second = await machine.start()
    await follows(second, "numbers-0")
    return first, second, await level(second, "numbers-0")


def damages(times: int) -> list[Exception]:
    return [StateCorruptedError("a file is damaged") for _ in range(times)]


def no_room(times: int) -> list[Exception]:
    return [StateFullError("no room") for _ in range(times)]


async def test_a_damaged_store_is_set_aside_and_filled_anew_however_often_within_a_year(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults, summing = Faults(monkeypatch), Summing(partitions=1)
    async with Machine(summing.app) as machine:
        second, standby = await faults.meet(machine, summing, *damages(1))
        for times in range(1, 6):
            await until(lambda times=times: standby.rebuilds == times and standby._spans and standby.lag == 0)
            assert content(standby) == {f"k{number}": 2 + times for number in range(10)}
            assert not standby.given_up
            machine.clock.advance(250)
            await faults.again(machine, summing, *damages(1))
        assert second.error is None
    assert "a file is damaged" in caplog.text


async def test_records_that_are_gone_while_a_standby_pauses_have_it_filled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summing, paused, goes_on, note = Summing(partitions=1), anyio.Event(), anyio.Event(), Standby._note_level

    async def pausing(standby: Standby) -> None:
        paused.set()
        await goes_on.wait()
        await note(standby)

    async with Machine(summing.app, standby_replicas=1) as machine:
        _, second, standby = await one_followed(machine, summing)
        monkeypatch.setattr(Standby, "_note_level", pausing)
        with anyio.fail_after(5):
            await paused.wait()
        (span,) = standby._spans.values()
        await until(lambda: span.asked_at_ms is not None)
        # As a reader has it: a partition that it cannot go on with is removed.
        standbys_of(second)._reader.remove(span.tp)
        gone = OffsetOutOfRangeError(*span.tp, span.position, 0, span.position - 1)
        standby.take(Fetched(span.tp, [], span.position, span.position - 1, error=gone))
        goes_on.set()
        await until(lambda: standby.rebuilds == 1 and standby._spans and standby.lag == 0)
        assert content(standby) == {f"k{number}": 2 for number in range(10)}
        assert second.error is None


async def test_a_store_that_is_damaged_again_and_again_is_given_up_and_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults, summing = Faults(monkeypatch), Summing(partitions=1)
    async with Machine(summing.app) as machine:
        second, standby = await faults.meet(machine, summing, *damages(9))
        standbys, task = standbys_of(second), TaskId("numbers", 0)
        await until(lambda: standby.given_up)
        assert standby.lag is None
        assert standbys.lags() == {}
        assert standbys.refused() == {task}
        assert second.worker.status().standbys[0].given_up == "a file is damaged"
        assert second.error is None
        faults.raises.clear()
        await until(lambda: machine.clock.next_wake_s() is not None and standby.state is None)
        machine.clock.advance(61)
        await until(lambda: standby.lag == 0 and not standby.given_up)
        assert content(standby) == {f"k{number}": 3 for number in range(10)}
        assert not standbys.refused()
    assert caplog.text.count("is given up") == 1


async def test_what_was_given_up_is_refused_for_a_while_after_it_was_told_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the next round would begin with it anew."""
    faults, summing = Faults(monkeypatch), Summing(partitions=1)
    async with Machine(summing.app) as machine:
        second, standby = await faults.meet(machine, summing, *damages(9))
        standbys, task = standbys_of(second), TaskId("numbers", 0)
        await until(lambda: standby.given_up)
        await follow(second)
        assert not standbys.held()
        assert standbys.refused() == {task}
        machine.clock.advance(601)
        assert not standbys.refused()


async def test_the_leader_takes_a_copy_away_from_who_has_given_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    faults, summing = Faults(monkeypatch), Summing(partitions=1)
    async with Machine(summing.app, standby_replicas=1) as machine:
        second, standby = await faults.meet(machine, summing)
        third = await machine.start()
        assert not standbys_of(third).held()
        await faults.again(machine, summing, *damages(4))
        await follows(third, "numbers-0")
        await until(lambda: not standbys_of(second).held())
        assert standby.given_up
        await level(third, "numbers-0")


async def test_a_full_disk_is_waited_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    faults, summing = Faults(monkeypatch), Summing(partitions=1)
    async with Machine(summing.app) as machine:
        _, standby = await faults.meet(machine, summing, *no_room(3))
        expected = {f"k{number}": 3 for number in range(10)}

        def is_written() -> bool:
            machine.clock.advance(0.1)  # it tries again now and then
            return content(standby) == expected

        await until(is_written)
        assert not faults.raises
        assert standby.rebuilds == 0
    assert caplog.text.count("no room") == 1


async def test_a_worker_whose_disk_is_full_for_long_takes_no_copies_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults, summing = Faults(monkeypatch), Summing(partitions=1)
    async with Machine(summing.app) as machine:
        second, standby = await faults.meet(machine, summing, *no_room(999))
        standbys = standbys_of(second)
        await until(lambda: standby._store.full_since_s is not None)
        assert standbys.has_room  # it may be a matter of moments
        machine.clock.advance(61)
        assert standby.is_stuck
        assert not standbys.has_room
        assert not standbys.refused()
        await follow(second)
        assert not standbys.has_room
        machine.clock.advance(601)
        assert standbys.has_room


async def test_a_standby_is_ended_while_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    faults, summing = Faults(monkeypatch), Summing(partitions=1)
    async with Machine(summing.app) as machine:
        second, _ = await faults.meet(machine, summing, *no_room(9))
        await until(lambda: len(faults.raises) == 8)
        with anyio.fail_after(5):
            await follow(second)
        assert not standbys_of(second).held()


async def test_a_standby_whose_store_cannot_be_closed_stops_its_worker_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summing = Summing(partitions=1)
    async with Machine(summing.app, standby_replicas=1) as machine:
        _, second, standby = await one_followed(machine, summing)
        assert standby.state is not None
        store, close = standby.state.store, MemoryStore.close

        def fails(closed: MemoryStore) -> None:
            close(closed)
            if closed is store:
                raise StateRefusedError("Read-only file system")

        monkeypatch.setattr(MemoryStore, "close", fails)
        with anyio.fail_after(5):
            await follow(second)
        assert not standbys_of(second).held()
        with pytest.raises(StateRefusedError, match="Read-only"):
            await machine.ended(second)


async def test_values_that_expire_do_so_for_a_task_that_was_a_standby() -> None:
    summing = Summing(partitions=1, ttl_s=10)
    async with Machine(summing.app, standby_replicas=1) as machine:
        first, second, standby = await one_followed(machine, summing)
        await machine.send(summing.numbers, 1, key="late", timestamp_ms=machine.clock.now_ms() + 11_000)
        await machine.settle()
        await until(lambda: "late" in content_expiring(standby) and standby.lag == 0)
        await machine.crash(first)
        await until(lambda: "numbers-0" in second.tasks and second.tasks["numbers-0"].state == "running")
        assert dict(summing.totals) == {"late": 1}


def content_expiring(standby: Standby) -> set[str]:
    assert standby.state is not None
    return {key.decode() for key, _ in standby.state.store.scan("totals")}


def enriched() -> sf.App:
    app = sf.App("enriched")
    users = app.topic("users", key_type=str, value_type=str, partitions=1, compacting=True)
    clicks = app.topic("clicks", key_type=str, value_type=int, partitions=1)
    names = app.table("names", source=users)
    totals = app.table("totals", key_type=str, value_type=int, default=int)

    @app.agent(clicks, tables=[names, totals])
    async def count(stream: sf.Stream[int]) -> None:
        async for event in stream.events():
            totals[names.get(event.key, "?")] += event.value

    return app


@pytest.mark.parametrize("late", [3, 99])
async def test_a_commit_that_is_seen_late_takes_no_table_for_ahead_of_its_source(
    late: int, caplog: pytest.LogCaptureFixture
) -> None:
    """On Kafka, what a transaction has committed is told a moment after it has ended."""
    app = enriched()
    users = app.topics["users"]
    async with Machine(app) as machine:
        first = await machine.start()
        for number in range(10):
            await machine.send(users, f"name{number}", key=f"u{number}")
        await machine.settle()
        second = await machine.start()
        await until(lambda: len(first.tasks) == 1)
        await is_told(second)
        (task,) = first.tasks
        await follow(second, task)
        await level(second, task)
        await follow(second)
        admin: Any = standbys_of(second)._admin
        group_offsets, looks = admin.group_offsets, Counter[str]()

        async def seen_late(*args: Any) -> Any:
            looks["marks"] += 1
            marks = await group_offsets(*args)
            source = TopicPartition("users", 0)
            return {**marks, source: replace(marks[source], offset=7)} if looks["marks"] <= late else marks

        admin.group_offsets = seen_late
        await follow(second, task)
        standby = standby_of(second, task)
        await until(lambda: standby._spans and standby.positions["names"] == (10 if late == 3 else 7))
        assert standby.records == (0 if late == 3 else 7)
    assert ("is filled anew" in caplog.text) == (late == 99)  # not for ever: offsets may have been set back


async def test_a_table_filled_from_a_topic_is_followed_up_to_what_its_task_has_committed() -> None:
    app = enriched()
    users, clicks = app.topics["users"], app.topics["clicks"]
    async with Machine(app, standby_replicas=1) as machine:
        counted = Counted()
        first = await machine.start()
        for number in range(10):
            await machine.send(users, f"name{number}", key=f"u{number}")
        await machine.settle()
        second = await machine.start(sensors=counted)
        (task,) = first.tasks
        await follows(second, task)
        standby = await level(second, task)
        assert standby.positions["names"] == 10
        await machine.send(users, "other", key="u0")
        await machine.send(clicks, 5, key="u0")
        await machine.settle()
        await until(lambda: standby.positions["names"] == 11 and content(standby) == {"other": 5})
        await machine.crash(first)
        await until(lambda: task in second.tasks and second.tasks[task].state == "running")
        assert not +counted.restored_records
        assert dict(app.tables["names"])["u0"] == "other"


async def test_nothing_is_followed_of_a_task_that_has_committed_nothing() -> None:
    summing = Summing(partitions=1)
    async with Machine(summing.app, standby_replicas=1) as machine:
        await machine.start()
        second = await machine.start()
        await follows(second, "numbers-0")
        standby = standby_of(second, "numbers-0")
        await until(lambda: standby.lag == 0)
        assert standby.state is None
        assert standbys_of(second).warm([TaskId("numbers", 0)], 0)
        await summing.send(machine, 5)
        await machine.settle()
        await until(lambda: standby.state is not None and standby.lag == 0)


async def test_those_that_are_not_wanted_any_more_are_ended_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each closes a store, and what was assigned to the worker meanwhile waits for all of them."""
    summing, closing, all_close, close = Summing(), Counter[str](), anyio.Event(), Standby.close

    async def waiting(standby: Standby) -> None:
        closing[standby.name] += 1
        if len(closing) == PARTITIONS:
            all_close.set()
        await all_close.wait()
        await close(standby)

    monkeypatch.setattr(Standby, "close", waiting)
    async with Machine(summing.app, acceptable_lag_records=0) as machine:
        first = await machine.start()
        await until(lambda: len(first.tasks) == PARTITIONS)
        standbys = standbys_of(first)
        others = [TaskId("numbers", number) for number in range(PARTITIONS)]
        await standbys.follow(others, [], lambda _: False)
        assert len(standbys.held()) == PARTITIONS
        with anyio.fail_after(5):
            await standbys.follow([], [], lambda _: False)
        assert not standbys.held()


async def test_what_another_version_has_is_not_followed() -> None:
    summing = Summing(partitions=1)
    async with Machine(summing.app, standby_replicas=1) as machine:
        running = await machine.start()
        await follow(running, "others-0", "numbers-7")
        assert not standbys_of(running).held()
        await follow(running, "numbers-0")  # its own
        assert not standbys_of(running).held()


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_a_task_stays_where_it_is_until_the_other_worker_has_its_state(
    monkeypatch: pytest.MonkeyPatch, guarantee: str
) -> None:
    summing, goes_on, take = Summing(), anyio.Event(), Standby._take

    async def late(standby: Standby, fetched: Fetched) -> None:
        await goes_on.wait()
        await take(standby, fetched)

    monkeypatch.setattr(Standby, "_take", late)
    async with Machine(summing.app, processing_guarantee=guarantee, acceptable_lag_records=0) as machine:
        first, counted = await machine.start(), Counted()
        await summing.send(machine, 50)
        await machine.settle()
        second = await machine.start(sensors=counted)
        await until(lambda: standbys_of(second).held())
        (warm_up,) = second.worker.status().standbys
        assert warm_up.warm_up
        await summing.send(machine, 50)
        await machine.settle()
        assert len(first.tasks) == PARTITIONS
        assert not second.tasks
        goes_on.set()
        await until(lambda: {task.state for task in second.tasks.values()} == {"running"})
        assert counted.restored_records["totals"] == 0
        assert second.tasks.keys() == {warm_up.task}
        await summing.send(machine, 10)
        await machine.settle()
        assert sorted(dict(summing.totals).items()) == [(f"k{number}", 11) for number in range(10)]
