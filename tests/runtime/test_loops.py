"""The worker's loops against a group that speaks while the manager is still busy."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from streamflow.clock import VirtualClock
from streamflow.config import Settings
from streamflow.errors import StateFullError
from streamflow.log.api import Assigned, Group, GroupEvent, Lost, Revoked, Told
from streamflow.model.record import TopicPartition
from streamflow.runtime.loops import Loops
from streamflow.runtime.open_log import OpenLog
from streamflow.runtime.task import Task
from streamflow.sensors import Sensors
from tests.runtime.test_commit import FakeGroup
from tests.runtime.waiting import until

A = TopicPartition("a", 0)


class SpeakingGroup(FakeGroup):
    def __init__(self, events: list[GroupEvent]) -> None:
        super().__init__()
        self.events = events

    async def next_event(self) -> GroupEvent:
        if not self.events:
            await asyncio.Event().wait()
        return self.events.pop(0)


class BusyManager:
    def __init__(self) -> None:
        self.foreseen: list[GroupEvent] = []
        self.handled: list[GroupEvent] = []
        self.free = asyncio.Event()

    def foresee(self, event: GroupEvent) -> None:
        self.foreseen.append(event)

    async def handle(self, event: GroupEvent) -> None:
        await self.free.wait()
        self.handled.append(event)


def following(events: list[GroupEvent]) -> Loops:
    group = cast(Group, SpeakingGroup(list(events)))
    nothing: Any = None
    return Loops(Settings(), VirtualClock(), Sensors(), OpenLog(group, nothing, nothing, cast(Any, SimpleNamespace())))


async def test_what_is_lost_is_known_while_an_earlier_event_is_acted_on() -> None:
    events: list[GroupEvent] = [Assigned(frozenset({A}), 1), Lost(frozenset({A}), "gone"), Assigned(frozenset({A}), 2)]
    manager = BusyManager()
    loops = following(events)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loops._follow_group, manager)
        for _ in range(10):
            await asyncio.sleep(0)
        assert manager.foreseen == events
        assert manager.handled == []
        manager.free.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert manager.handled == events
        tasks.cancel_scope.cancel()


async def test_what_is_asked_for_in_several_rounds_goes_in_one_unless_something_of_it_came_back() -> None:
    b, c, d = (TopicPartition("a", number) for number in (1, 2, 3))
    events: list[GroupEvent] = [
        Revoked(frozenset({A})),
        Revoked(frozenset({b})),
        Told(b"one", 2),
        Revoked(frozenset({c})),
        Assigned(frozenset({b}), 3),
        Revoked(frozenset({d})),
        Told(b"two", 4),
    ]
    manager = BusyManager()
    loops = following(events)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loops._follow_group, manager)
        for _ in range(20):
            await asyncio.sleep(0)
        assert manager.foreseen == events
        manager.free.set()
        for _ in range(20):
            await asyncio.sleep(0)
        tasks.cancel_scope.cancel()
    assert manager.handled == [
        Revoked(frozenset({A, b, c})),
        Told(b"one", 2),
        Assigned(frozenset({b}), 3),
        Revoked(frozenset({d})),
        Told(b"two", 4),
    ]


async def test_a_blocked_event_loop_is_told_once_the_app_may_have_blocked_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamflow.runtime.loops._WATCH_S", 0.001)
    monkeypatch.setattr("streamflow.runtime.loops._WARNED_STALL_S", 0.02)
    stalls: list[float] = []
    manager: Any = SimpleNamespace(running=list[Task])
    has_begun = False
    loops = following([])
    monkeypatch.setattr(loops._group, "report_progress", lambda: None, raising=False)
    monkeypatch.setattr(loops._sensors, "loop_stalled", stalls.append)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loops._watch, manager, lambda: has_begun)
        await asyncio.sleep(0.01)
        time.sleep(0.05)  # noqa: ASYNC251 - opens stores, imports
        await until(lambda: max(stalls, default=0) > 0.02)
        assert caplog.messages == []
        has_begun = True
        time.sleep(0.05)  # noqa: ASYNC251 - the first thing that an agent does
        await until(lambda: caplog.messages)
        has_begun = False  # its task has gone to another worker
        caplog.clear()
        time.sleep(0.05)  # noqa: ASYNC251
        await until(lambda: caplog.messages)
        tasks.cancel_scope.cancel()
    assert caplog.messages[0].startswith("the event loop was blocked for ")


class FakeStored:
    """A task whose store is due at every look."""

    def __init__(self, name: str) -> None:
        self.tables = self
        self.is_due = True
        self.name = name
        self.is_full = False
        self.looks = 0

    def sweep(self) -> None:
        pass

    async def write_store(self) -> None:
        self.looks += 1
        if self.is_full:
            raise StateFullError(f"{self.name}: no room")


async def test_a_full_store_beside_a_fine_one_is_told_once_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamflow.runtime.loops._STORE_POLL_S", 0)
    first, fine, second = FakeStored("first"), FakeStored("fine"), FakeStored("second")
    nothing: Any = None
    group = cast(Group, SpeakingGroup([]))
    loops = Loops(Settings(), VirtualClock(), Sensors(), OpenLog(group, nothing, nothing, cast(Any, SimpleNamespace())))

    async def look() -> list[str]:
        caplog.clear()
        enough = second.looks + 5
        await until(lambda: second.looks >= enough)
        return sorted(message.partition(":")[0] for message in caplog.messages)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loops._store, SimpleNamespace(running=lambda: [first, fine, second]))
        first.is_full = second.is_full = True
        assert await look() == ["first", "second"]
        assert await look() == []
        first.is_full = False
        assert await look() == []
        first.is_full = True
        assert await look() == ["first"]
        tasks.cancel_scope.cancel()
