"""The worker's loops against a group that speaks while the manager is still busy."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import anyio

from streamflow.clock import VirtualClock
from streamflow.config import Settings
from streamflow.log.api import Assigned, Group, GroupEvent, Lost
from streamflow.model.record import TopicPartition
from streamflow.runtime.loops import Loops
from streamflow.runtime.open_log import OpenLog
from streamflow.sensors import Sensors
from tests.runtime.test_commit import FakeGroup

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


async def test_what_is_lost_is_known_while_an_earlier_event_is_acted_on() -> None:
    events: list[GroupEvent] = [Assigned(frozenset({A}), 1), Lost(frozenset({A}), "gone"), Assigned(frozenset({A}), 2)]
    manager = BusyManager()
    group = cast(Group, SpeakingGroup(list(events)))
    nothing: Any = None
    loops = Loops(Settings(), VirtualClock(), Sensors(), OpenLog(group, nothing, nothing, cast(Any, SimpleNamespace())))
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
