"""One log in memory, one virtual clock, and any number of workers of one app that come, go and crash."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any, Self

import anyio

import streamflow as sf
from streamflow.clock import VirtualClock
from streamflow.log.connect import connect
from streamflow.processing.stream import Event
from streamflow.runtime.client import Client
from streamflow.runtime.observer import Observer
from streamflow.runtime.worker import Worker
from streamflow.sensors import Sensors

_DAY_MS = 86_400_000


class Running:
    """A worker that runs on the machine."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()
        self.error: Exception | None = None

    async def run(self) -> None:
        try:
            with self.scope:
                await self.worker.run()
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()

    @property
    def tasks(self) -> dict[str, Any]:
        manager = self.worker.manager
        return {} if manager is None else {task.name: task for task in manager.running()}


class Machine:
    """Use it as `async with`; the log lives as long as the block."""

    def __init__(self, app: sf.App, **settings: Any) -> None:
        self.app = app
        self.clock = VirtualClock()
        self.settings = app.settings(
            {
                "commit_interval_ms": _DAY_MS,
                "heartbeat_interval_ms": _DAY_MS // 4,
                "session_timeout_ms": _DAY_MS,
                **settings,
                "broker": f"memory://machine-{uuid.uuid4().hex}",
            }
        )
        self._stack = AsyncExitStack()
        self.workers: list[Running] = []

    async def __aenter__(self) -> Self:
        stack = AsyncExitStack()
        self._observer = await stack.enter_async_context(Observer(self.app, self.settings, self.clock))
        self.log = await stack.enter_async_context(connect(self.settings.broker, clock=self.clock, client_id="machine"))
        self.client = await stack.enter_async_context(Client(self.app, self.settings, clock=self.clock))
        self._tasks = await stack.enter_async_context(anyio.create_task_group())
        self._stack = stack
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        for running in self.workers:
            running.scope.cancel()
        await self._stack.__aexit__(*exc_info)

    async def start(self, *, app: sf.App | None = None, sensors: Sensors | None = None, **options: Any) -> Running:
        """Start one more worker and wait until it runs."""
        running = self.launch(app=app, sensors=sensors, **options)
        await running.worker.wait_started()
        return running

    def launch(self, *, app: sf.App | None = None, sensors: Sensors | None = None, **options: Any) -> Running:
        """Start one more worker."""
        running = Running(Worker(app or self.app, self.settings, clock=self.clock, sensors=sensors, **options))
        self.workers.append(running)
        self._tasks.start_soon(running.run)
        return running

    async def stop(self, running: Running) -> None:
        """Stop a worker cleanly."""
        running.worker.request_stop()
        await self.ended(running)

    async def crash(self, running: Running) -> None:
        """Cancel a worker: it neither finishes its records nor commits."""
        running.scope.cancel()
        await self.ended(running)

    async def ended(self, running: Running) -> None:
        with anyio.fail_after(10):
            await running.ended.wait()
        self.workers.remove(running)
        if running.error is not None:
            raise running.error

    async def ran_out(self, running: Running) -> None:
        """Move the clock until a bounded run is over."""
        for _ in range(5000):
            if running.ended.is_set():
                break
            if (step_s := self.clock.next_wake_s()) is not None:
                self.clock.advance(min(step_s, 0.05))
            await asyncio.sleep(0.0005)
        await self.ended(running)

    async def commit(self, running: Running) -> None:
        """Commit now what is done."""
        worker = running.worker
        assert worker._delivery is not None
        assert worker.manager is not None
        await worker._delivery.commit(worker.manager.running())

    async def until(self, condition: Callable[[], Awaitable[bool]], *, within_s: float = 5.0) -> None:
        """Commit and let the others run until the condition holds."""
        give_up_s = perf_counter() + within_s
        while not await condition():
            for running in self.workers:
                if running.error is not None:
                    raise running.error
                await running.worker.unsettled()
            assert perf_counter() < give_up_s, "it did not happen in time"
            await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Wait until every source partition is processed to its end and committed."""
        await self.until(self._is_settled)
        await self._observer.look()

    async def _is_settled(self) -> bool:
        committed = await self.committed()
        sources = {topic for sub in self.app.topology().sub_topologies for topic in sub.topics}
        counts = await self.log.admin.describe(sorted(sources))
        partitions = [
            sf.TopicPartition(name, number) for name, each in counts.items() for number in range(each.partitions)
        ]
        ends = await self.log.admin.end_offsets(partitions)
        return all(committed.get(tp, 0) >= end for tp, end in ends.items())

    async def committed(self) -> dict[sf.TopicPartition, int]:
        return {tp: mark.offset for tp, mark in (await self.log.admin.group_offsets(self.app.id)).items()}

    async def send(self, topic: "sf.Topic[Any, Any]", value: Any, *, key: Any = None, **more: Any) -> None:
        await self.client.send(topic, key=key, value=value, **more)

    async def look(self) -> None:
        await self._observer.look()

    def records(self, topic: "sf.Topic[Any, Any] | str") -> list[Event[Any, Any]]:
        return self._observer.records(topic if isinstance(topic, str) else topic.name)

    def values(self, topic: "sf.Topic[Any, Any] | str") -> list[Any]:
        return [event.value for event in self.records(topic)]


def topic_names(app: sf.App) -> list[str]:
    return sorted(app.every_topic())
