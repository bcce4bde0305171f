"""The worker's loops: fetching, committing, lingering outputs, group events, the watch over the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter

import anyio
import anyio.abc

from streamflow.clock import Clock
from streamflow.config import Settings
from streamflow.errors import StateFullError
from streamflow.log.api import GroupEvent, Revoked, Told
from streamflow.runtime.at_least_once import AtLeastOnce
from streamflow.runtime.open_log import OpenLog
from streamflow.runtime.task import Task
from streamflow.runtime.task_manager import Overtaken, TaskManager
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.worker")

_WATCH_S = 0.1
_STALL_S = 0.01
_STORE_POLL_S = 0.25
_WARNED_STALL_S = 1.0


class Loops:
    """What runs beside the tasks while a worker runs.

    Args:
        settings: Intervals.
        clock: Time.
        sensors: Metrics hooks.
        log: What is open of the log.
    """

    def __init__(self, settings: Settings, clock: Clock, sensors: Sensors, log: OpenLog) -> None:
        self._settings = settings
        self._clock = clock
        self._sensors = sensors
        self._group = log.group
        self._reader = log.reader
        self._delivery = log.delivery
        self.output_waits = asyncio.Event()
        self._damaged: asyncio.Queue[Task] = asyncio.Queue()
        # Told of tasks whose local state cannot be used.
        self.damaged = self._damaged.put_nowait

    def start(self, services: anyio.abc.TaskGroup, manager: TaskManager, runs_user_code: Callable[[], bool]) -> None:
        """Start all loops in a task group that the worker cancels.

        Args:
            services: The task group.
            manager: The worker's tasks.
            runs_user_code: Whether code of the app may have begun to run.
        """
        services.start_soon(self._fetch, manager)
        services.start_soon(self._commit, manager)
        services.start_soon(self._follow_group, manager)
        services.start_soon(self._watch, manager, runs_user_code)
        services.start_soon(self._store, manager)
        services.start_soon(self._rebuild, manager)
        if isinstance(self._delivery, AtLeastOnce):
            services.start_soon(self._linger, manager)

    async def _fetch(self, manager: TaskManager) -> None:
        async with anyio.create_task_group() as resets:
            while True:
                for fetched in await self._reader.receive():
                    manager.fetched(fetched, resets)

    async def _commit(self, manager: TaskManager) -> None:
        interval_s = self._settings.commit_interval_ms / 1000
        while True:
            await self._clock.wait(self._delivery.wanted, interval_s)
            self._delivery.wanted.clear()
            await self._delivery.commit(manager.running())

    async def _store(self, manager: TaskManager) -> None:
        """Write committed table values to the local stores, beside the work, and let expired ones be deleted."""
        full: set[Task] = set()  # those whose store was full at the last look, which is told once each
        while True:
            await asyncio.sleep(_STORE_POLL_S)
            tasks = manager.running()
            full.intersection_update(tasks)
            for task in tasks:
                task.sweep()
                if task.tables is None or not task.tables.is_due:
                    continue
                try:
                    await task.tables.write_store()
                    full.discard(task)
                except StateFullError as error:
                    if task not in full:
                        logger.warning("%s; committed values stay in memory until there is room", error)
                    full.add(task)

    async def _rebuild(self, manager: TaskManager) -> None:
        """Open tasks anew whose local state cannot be used."""
        while True:
            await manager.rebuild(await self._damaged.get())

    async def _linger(self, manager: TaskManager) -> None:
        linger_s = self._settings.linger_ms / 1000
        while True:
            await self.output_waits.wait()
            self.output_waits.clear()
            await self._clock.sleep(linger_s)
            await self._delivery.linger(manager.running())

    async def _follow_group(self, manager: TaskManager) -> None:
        """Act on the group's events one after the other, but know at once of what is lost.

        Acting takes time (records in hand, hooks, commits), and a partition that was lost and came back meanwhile must
        not be committed for by the task it was lost from.
        """
        waiting: deque[GroupEvent | Overtaken] = deque()
        arrived = asyncio.Event()

        async def act() -> None:
            while True:
                while waiting:
                    await manager.handle(_next(waiting))
                arrived.clear()
                await arrived.wait()

        def happened(event: GroupEvent | Overtaken) -> None:
            manager.foresee(event)
            waiting.append(event)
            arrived.set()

        self._delivery.overtaken = lambda task: happened(Overtaken(task))
        async with anyio.create_task_group() as group:
            group.start_soon(act)
            while True:
                happened(await self._group.next_event())

    async def _watch(self, manager: TaskManager, runs_user_code: Callable[[], bool]) -> None:
        """Measure stalls of the event loop, and report progress unless a record is stuck.

        Before code of the app runs, a stall is the worker's own, or the machine's: nothing that the app could mend.
        """
        max_poll_s = self._settings.max_poll_interval_ms / 1000
        may_be_the_apps = False
        while True:
            before_s = perf_counter()
            await asyncio.sleep(_WATCH_S)
            stalled_s = perf_counter() - before_s - _WATCH_S
            if stalled_s > _STALL_S:
                self._sensors.loop_stalled(stalled_s)
            may_be_the_apps = may_be_the_apps or runs_user_code()
            if stalled_s > _WARNED_STALL_S and may_be_the_apps:
                logger.warning(
                    "the event loop was blocked for %.1f s: nothing else ran meanwhile. Await what waits, or give work "
                    "that blocks to a thread (a `def` agent with thread=True)",
                    stalled_s,
                )
            if all(task.oldest_in_flight_s() < max_poll_s for task in manager.running()):
                self._group.report_progress()


def _next(waiting: deque[GroupEvent | Overtaken]) -> GroupEvent | Overtaken:
    """The next event; what was asked for meanwhile goes in one, with one commit.

    Rounds may follow faster than commits do, and each asks for a task or two: one commit for each would have the last
    ones wait for longer than the group does.
    """
    event = waiting.popleft()
    if isinstance(event, Revoked):
        for later in list(waiting):
            if isinstance(later, Revoked):
                waiting.remove(later)
                event = Revoked(event.partitions | later.partitions)
            elif not isinstance(later, Told):
                break
    return event
