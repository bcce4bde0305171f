"""Who holds which task, as this worker was told last: where a read of another worker's table goes.

Routes may be wrong at any moment: a task moves when its owner has given it back, and the news of that travels
separately. Who is asked in vain says so, and the asker looks here again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import anyio

from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route


class Routes:
    """The workers of an app; on the event loop."""

    def __init__(self) -> None:
        self._owners: dict[TaskId, str] = {}
        self._before: dict[TaskId, str] = {}
        self._standbys: dict[TaskId, list[str]] = {}
        self._news = asyncio.Event()

    def told(self, routes: Collection[Route]) -> None:
        """Take over what is said now."""
        owners = {task: route.url for route in routes for task in route.active}
        moved = {task: url for task, url in self._owners.items() if owners.get(task) != url}
        self._before = {**{task: url for task, url in self._before.items() if task not in moved}, **moved}
        self._owners, self._standbys = owners, {}
        for route in routes:
            for task in route.standby:
                self._standbys.setdefault(task, []).append(route.url)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def owner(self, task: TaskId) -> str | None:
        """Where a task's owner is reached; empty where it serves no HTTP, None where nobody is known to own it."""
        return self._owners.get(task)

    def former(self, task: TaskId) -> str:
        """Where the task was before: it is there until it has been given back. Empty where that is not known."""
        return self._before.get(task, "")

    def standbys(self, task: TaskId) -> list[str]:
        """Where its standbys are reached."""
        return [url for url in self._standbys.get(task, ()) if url]

    async def changed(self, within_s: float) -> None:
        """Wait for news, or so long."""
        with anyio.move_on_after(within_s):
            await self._news.wait()
