"""Workers of one app in one process, each with an `App` and a web server of its own, on one log in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Self

import httpx

import streamflow as sf
from streamflow.hosting import served
from streamflow.metrics import PrometheusSensors
from streamflow.model.partitioner import partition_for
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.web.server import listen
from tests.runtime.machine import Machine, Running
from tests.runtime.waiting import until


class Cluster:
    """Use it as `async with`. Every app is made by the same function, as in processes of their own."""

    def __init__(self, make_app: Callable[[], sf.App], workers: int = 2, **settings: Any) -> None:
        self._make_app = make_app
        self._count = workers
        self.apps: list[sf.App] = []
        self.workers: list[Running] = []
        self.urls: list[str] = []
        self.sensors: list[PrometheusSensors] = []
        self.machine = Machine(make_app(), **settings)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._stack = stack
            await stack.enter_async_context(self.machine)
            self.http = await stack.enter_async_context(httpx.AsyncClient(timeout=20))
            for _ in range(self._count):
                await self.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._stack.aclose()

    async def start(self) -> Running:
        """One more worker; returns when the partitions are shared."""
        app, sensors = self._make_app(), PrometheusSensors()
        running = self.machine.launch(app=app, sensors=sensors)
        listener = listen("127.0.0.1", 0)
        await self._stack.enter_async_context(served(running.worker, app, self.machine.settings, sensors, listener))
        self.apps.append(app)
        self.workers.append(running)
        self.urls.append(running.worker.url)
        self.sensors.append(sensors)
        await running.worker.wait_started()
        await self.shared()
        return running

    async def shared(self) -> None:
        """Wait until every worker that runs has tasks, and all know who has which."""

        def settled() -> bool:
            live = [each for each in self.workers if not each.ended.is_set()]
            held = [task for each in live for task in each.tasks.values()]
            counts = [len(each.tasks) for each in live]
            return (
                len(held) == self._tasks_in_all
                and max(counts) - min(counts) <= 1
                and all(task.is_readable for task in held)
                and all(
                    each.worker.routes.owner(_id(task)) == running.worker.url
                    for each in live
                    for running in live
                    for task in running.tasks.values()
                )
            )

        await until(settled, within_s=20)

    @property
    def _tasks_in_all(self) -> int:
        layout = self.workers[-1].worker._layout
        assert layout is not None
        return sum(max(layout.counts[topic] for topic in sub.topics) for sub in layout.sub_topologies)

    async def get(self, path: str, *, worker: int = 0, **headers: str) -> httpx.Response:
        return await self.http.get(
            self.urls[worker] + path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    async def json(self, path: str, *, worker: int = 0) -> Any:
        answer = await self.get(path, worker=worker)
        assert answer.status_code == 200, answer.text
        return json.loads(answer.text)

    def table(self, name: str, worker: int = 0) -> Any:
        app = self.apps[worker]
        return app.set_tables.get(name) if name in app.set_tables else app.tables[name]

    def home_of(self, topic: str, key: Any) -> int:
        """The partition of a record's key."""
        manager = self.workers[0].worker.manager
        assert manager is not None
        data = self.apps[0].topics[topic].key_codec.encode(key)
        assert data is not None
        return partition_for(data, manager._layout.counts[topic])

    def owner(self, name: str, key: Any) -> int:
        """The worker that holds a key."""
        for number, app in enumerate(self.apps):
            try:
                app.tables[name].get(key)
            except sf.NotHeld:
                continue
            return number
        raise AssertionError(f"nobody holds {key!r}")


def _id(task: Any) -> Any:
    return TaskId(task.sub_topology.name, task.partition)
