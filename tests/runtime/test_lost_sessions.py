"""Workers that lose their sessions have the state of their tasks yet, and say so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from streamflow.log.sqlite import membership
from streamflow.log.sqlite.membership import Step
from streamflow.runtime import conversation
from streamflow.runtime.assignment.cluster import UNKNOWN_LAG, TaskId
from streamflow.runtime.assignment.words import Says
from streamflow.runtime.restore import Restorer
from streamflow.runtime.standby import Standby
from streamflow.runtime.task_manager import TaskManager
from streamflow.state.store import Checkpoint
from tests.runtime.machine import Machine, Running
from tests.runtime.test_standbys import Counted, Summing, follows, level, standbys_of, two
from tests.runtime.waiting import until

GUARANTEES = ["exactly_once", "at_least_once"]


async def expire(machine: Machine, *workers: Running) -> None:
    """The group forgets these members at once, as it does when it has heard nothing of them for a whole session."""
    gone = {group.membership.member_id for each in workers if (group := each.worker.group) and group.membership}
    database = machine.log._database  # type: ignore[attr-defined]
    app_id = machine.app.id

    def forget(sql: object) -> None:
        for member_id in gone:
            assert membership.remove_member(sql, app_id, member_id)  # type: ignore[arg-type]
        sql.execute("UPDATE groups SET version = version + 1 WHERE id = ?", (app_id,))  # type: ignore[attr-defined]

    await database.writer.write(forget)
    database.wrote(members=True)


@asynccontextmanager
async def passing(machine: Machine) -> AsyncIterator[None]:
    """Time passes while the block runs: who was taken for dead was fenced, and tries again after a moment."""

    async def pass_on() -> None:
        while True:
            machine.clock.advance(0.1)
            await asyncio.sleep(0.001)

    async with anyio.create_task_group() as group:
        group.start_soon(pass_on)
        yield
        group.cancel_scope.cancel()


def tasks_of(workers: Iterable[Running]) -> list[set[str]]:
    return [set(each.tasks) for each in workers]


def words_of(running: Running) -> Says:
    """What it said last, which its next join says."""
    group: Any = running.worker.group
    return Says.decode(group.wishes.says, "")


def are_running(workers: Iterable[Running], count: int) -> bool:
    tasks = [task for each in workers for task in each.tasks.values()]
    return len(tasks) == count and all(task.state == "running" for task in tasks)


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_all_lose_their_sessions_at_once_and_each_gets_back_what_it_had(
    monkeypatch: pytest.MonkeyPatch, guarantee: str
) -> None:
    """Who comes first is given everything for a moment: what it is not level with takes long to restore."""
    spans = Restorer._spans

    async def long_if_not_level(self: Restorer, *args: Any, **options: Any) -> Any:
        found = await spans(self, *args, **options)
        if any(span.position < span.target for span in found):
            await anyio.sleep_forever()
        return found

    # Copies that lie elsewhere are known not to be level any more.
    monkeypatch.setattr("streamflow.runtime.standbys._DORMANT_EVERY_S", 0.05)
    summing = Summing(partitions=12)
    async with Machine(summing.app, processing_guarantee=guarantee, acceptable_lag_records=0) as machine:
        counted = Counted()
        first, *workers = [await machine.start(sensors=counted) for _ in range(3)]
        await until(lambda: are_running([first, *workers], 12) and len(first.tasks) == 4)
        await machine.stop(first)  # so that who has what is not what comes about if all start anew
        workers.append(await machine.start(sensors=counted))
        await until(lambda: are_running(workers, 12) and sorted(map(len, tasks_of(workers))) == [4, 4, 4])
        await summing.send(machine, 1_000, keys=250)
        await machine.settle()
        await until(lambda: all(all(words_of(each).lags.values()) for each in workers))
        await until(lambda: [set(map(str, words_of(each).ran or ())) for each in workers] == tasks_of(workers))
        before, opened = tasks_of(workers), {id(task) for each in workers for task in each.tasks.values()}
        counted.applied.clear()
        monkeypatch.setattr(Restorer, "_spans", long_if_not_level)
        await expire(machine, *workers)
        await until(lambda: not opened & {id(task) for each in workers for task in each.tasks.values()})
        await until(lambda: are_running(workers, 12) and tasks_of(workers) == before)
        assert {task.tables.restoring.records for each in workers for task in each.tasks.values()} == {0}
        assert not counted.applied  # nor did they have to be warmed up
        await summing.send(machine, 250, keys=250)
        async with passing(machine):
            await machine.settle()
        assert sorted(dict(summing.totals).items()) == sorted((f"k{number}", 5) for number in range(250))
        assert tasks_of(workers) == before


class Sleeper:
    """A worker whose heart stands still, as that of a process that is stopped.

    Attributes:
        tasks: What it ran.
    """

    def __init__(self, running: Running) -> None:
        self.tasks = set(running.tasks)
        self._running, self._opened = running, {id(task) for task in running.tasks.values()}
        group: Any = running.worker.group
        self._group, heart = group, group.heart
        heart.is_due = lambda: False
        heart.beat = lambda: Step(heart.standing, [], False)

    def wake(self) -> None:
        del self._group.heart.is_due, self._group.heart.beat
        self._group.wake()

    def has_back(self) -> bool:
        """Whether it runs what it ran, opened anew."""
        tasks = self._running.tasks
        is_anew = not self._opened & {id(task) for task in tasks.values()}
        return is_anew and are_running([self._running], len(self.tasks)) and tasks.keys() == self.tasks


def hold_restores(monkeypatch: pytest.MonkeyPatch) -> anyio.Event:
    """From now on restores have to be let go before they know what they read."""
    goes_on, spans = anyio.Event(), Restorer._spans

    async def late(self: Restorer, *args: Any, **options: Any) -> Any:
        await goes_on.wait()
        return await spans(self, *args, **options)

    monkeypatch.setattr(Restorer, "_spans", late)
    return goes_on


async def three_workers(machine: Machine, summing: Summing) -> list[Running]:
    """Two tasks each, which nobody else is level with."""
    workers = [await machine.start() for _ in range(3)]
    await until(lambda: are_running(workers, 6) and sorted(map(len, tasks_of(workers))) == [2, 2, 2])
    await summing.send(machine, 60, keys=20)
    await machine.settle()
    return workers


async def test_who_comes_back_gets_back_at_once_what_others_have_yet_to_restore(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summing = Summing(partitions=6)
    async with Machine(summing.app, acceptable_lag_records=0) as machine:
        stopped, *others = await three_workers(machine, summing)
        goes_on = hold_restores(monkeypatch)
        sleeper = Sleeper(stopped)
        await expire(machine, stopped)
        await until(lambda: sum(map(len, tasks_of(others))) == 6)
        monkeypatch.undo()  # what it restores itself is not held
        sleeper.wake()
        await until(sleeper.has_back)
        assert not goes_on.is_set()
        await until(lambda: are_running([stopped, *others], 6))
        assert {task.tables.restoring.records for task in stopped.tasks.values()} == {0}


class Rounds:
    """What a worker asks rounds for."""

    def __init__(self, running: Running) -> None:
        self.asked: list[str] = []
        group: Any = running.worker.group
        rejoin = group.rejoin

        def noted(why: str) -> None:
            self.asked.append(why)
            rejoin(why)

        group.rejoin = noted


async def test_what_lies_here_and_is_restored_elsewhere_is_asked_for_once_the_leader_did_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summing = Summing(partitions=6)
    async with Machine(summing.app, acceptable_lag_records=0) as machine:
        stopped, *others = workers = await three_workers(machine, summing)
        ran = TaskManager.ran

        def unsaid(self: TaskManager) -> frozenset[TaskId]:
            return frozenset[TaskId]() if self is stopped.worker.manager else ran(self)

        async def follows_nothing(_: Standby) -> None:
            await anyio.sleep_forever()

        monkeypatch.setattr(conversation, "_ASK_SOON_S", 0.0)
        monkeypatch.setattr(TaskManager, "ran", unsaid)
        monkeypatch.setattr(Standby, "_follow", follows_nothing)
        group: Any = stopped.worker.group
        await until(lambda: words_of(stopped).ran == frozenset())
        asked = [Rounds(each).asked for each in workers]
        with monkeypatch.context() as held:
            hold_restores(held)
            sleeper = Sleeper(stopped)
            await expire(machine, stopped)
            await until(lambda: sum(map(len, tasks_of(others))) == 6)
        sleeper.wake()
        await until(sleeper.has_back)
        # Once for both, or for each as it was measured.
        assert 1 <= len(asked[0]) <= 2
        assert all("is here, and is restored elsewhere" in why for why in asked[0])
        assert asked[1:] == [[], []]
        assert {task.tables.restoring.records for task in stopped.tasks.values()} == {0}
        expected, member = [list(each) for each in asked], group.membership
        await asyncio.sleep(4 * conversation._SAY_EVERY_S)
        assert asked == expected
        assert group.membership == member


# --- what a task that is opened says of its state ------------------------------------------------------------------


def said(running: Running) -> tuple[dict[str, int], set[str]]:
    """The lags that a worker says now, and what runs with all of its state, by name."""
    manager = running.worker.manager
    assert manager is not None
    return {str(task): lag for task, lag in manager.lags().items()}, set(map(str, manager.ran()))


async def test_who_has_yet_to_look_what_it_restores_does_not_say_that_it_lacks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summing = Summing()
    async with Machine(summing.app) as machine:
        first = await machine.start()
        await summing.send(machine, 50)
        await machine.settle()
        assert said(first) == ({}, {"numbers-0", "numbers-1"})
        await machine.crash(first)
        goes_on = hold_restores(monkeypatch)
        second = machine.launch()
        await until(lambda: [task.state for task in second.tasks.values()] == ["restoring"] * 2)
        assert said(second) == (dict.fromkeys(second.tasks, UNKNOWN_LAG), set())
        assert {task.tables.restoring.status().remaining for task in second.tasks.values()} == {None}
        goes_on.set()
        await until(lambda: are_running([second], 2))
        assert said(second) == ({}, set(second.tasks))


async def test_who_had_a_copy_says_what_that_lacked_until_it_has_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    summing = Summing()
    async with Machine(summing.app, standby_replicas=1) as machine:
        first, second, _ = await two(machine)
        (task,), (own,) = first.tasks, second.tasks
        await follows(second, task)
        await summing.send(machine, 50)
        await machine.settle()
        await level(second, task)
        hold_restores(monkeypatch)
        await machine.crash(first)
        await until(lambda: task in second.tasks and second.tasks[task].state == "restoring")
        assert said(second) == ({task: 0}, {own})


async def test_where_nothing_was_committed_nothing_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    summing = Summing()
    hold_restores(monkeypatch)
    async with Machine(summing.app) as machine:
        only = machine.launch()
        await until(lambda: [task.state for task in only.tasks.values()] == ["restoring"] * 2)
        assert said(only) == (dict.fromkeys(only.tasks, 0), set())


async def test_what_was_closed_is_said_at_once_and_measured_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.runtime.standbys._DORMANT_EVERY_S", 1e9)
    summing = Summing()
    async with Machine(summing.app) as machine:
        first = await machine.start()
        await summing.send(machine, 50)
        await machine.settle()
        second = await machine.start()
        await until(lambda: len(first.tasks) == 1)
        (own,) = first.tasks
        (gone,) = {"numbers-0", "numbers-1"} - {own}
        lags, ran = said(first)
        assert gone in ran or lags == {gone: 0}
        await until(lambda: said(first) == ({gone: 0}, {own}))
        await until(lambda: are_running([first, second], 2))
        assert said(second) == ({}, {gone})


class HeldAdmin:
    """Answers when it is let to."""

    def __init__(self, admin: Any) -> None:
        self._admin = admin
        self.is_asked, self.goes_on = anyio.Event(), anyio.Event()

    async def start_offsets(self, partitions: Any) -> Any:
        self.is_asked.set()
        await self.goes_on.wait()
        return await self._admin.start_offsets(partitions)

    async def high_watermarks(self, partitions: Any) -> Any:
        return await self._admin.high_watermarks(partitions)


async def test_a_measurement_says_nothing_of_what_was_closed_since_it_began() -> None:
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        await summing.send(machine, 50)
        await machine.settle()
        dormant = standbys_of(running).dormant
        held: Any = HeldAdmin(machine.log.admin)
        dormant._admin = held
        zero, one, two_ = (TaskId("numbers", number) for number in (0, 1, 2))
        dormant.left(zero, Checkpoint(), 1)
        dormant.left(one, Checkpoint(), 2)
        marks = await machine.log.admin.group_offsets(machine.app.id)
        async with anyio.create_task_group() as group:
            group.start_soon(dormant.measure, dormant.noted(), marks)
            await held.is_asked.wait()
            dormant.left(one, Checkpoint(), None, ran=True)
            dormant.left(two_, Checkpoint(), 3)
            held.goes_on.set()
        assert dormant.lags == {zero: dormant.lags[zero], two_: 3}
        assert dormant.lags[zero] > 1
        assert dormant.ran == {one}


async def test_a_store_that_is_closed_while_others_are_measured_is_measured_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streamflow.runtime.standbys._DORMANT_EVERY_S", 3_600.0)
    monkeypatch.setattr("streamflow.runtime.standbys._DORMANT_AFTER_S", 0.01)
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        await summing.send(machine, 50)
        await machine.settle()
        standbys = standbys_of(running)
        marks, is_asked, goes_on = standbys._marks, anyio.Event(), anyio.Event()

        async def held() -> Any:
            is_asked.set()
            await goes_on.wait()
            return await marks()

        monkeypatch.setattr(standbys, "_marks", held)
        zero, one = TaskId("numbers", 0), TaskId("numbers", 1)
        standbys.left(zero, Checkpoint(), None)
        await is_asked.wait()
        standbys.left(one, Checkpoint(), None)
        goes_on.set()
        await until(lambda: standbys.dormant.lags.keys() == {zero, one})


async def test_stores_that_are_closed_together_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured one by one, a round was asked for what came first, which dealt the others out before they were known."""
    monkeypatch.setattr("streamflow.runtime.standbys._DORMANT_AFTER_S", 0.5)
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        await summing.send(machine, 50)
        await machine.settle()
        standbys = standbys_of(running)
        measure, measured = standbys.dormant.measure, list[set[TaskId]]()

        async def watched(stores: Any, marks: Any) -> None:
            measured.append(set(stores))
            await measure(stores, marks)

        monkeypatch.setattr(standbys.dormant, "measure", watched)
        zero, one = TaskId("numbers", 0), TaskId("numbers", 1)
        standbys.left(zero, Checkpoint(), None)
        for _ in range(50):
            await asyncio.sleep(0)
        standbys.left(one, Checkpoint(), None)
        await until(lambda: standbys.dormant.lags.keys() == {zero, one})
        assert measured == [{zero, one}]
