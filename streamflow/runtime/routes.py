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

_MOST_FORMERS = 3


class Routes:
    """The workers of an app; on the event loop."""

    def __init__(self) -> None:
        self._owners: dict[TaskId, str] = {}
        self._formers: dict[TaskId, list[str]] = {}
        self._standbys: dict[TaskId, list[str]] = {}
        self._urls: frozenset[str] = frozenset()
        self._news = asyncio.Event()

    def told(self, routes: Collection[Route]) -> None:
        """Take over what is said now. Who is not among them is forgotten: its address may be another's by now."""
        before, formers = self._owners, self._formers
        self._urls = frozenset(route.url for route in routes if route.url)
        self._owners = {task: route.url for route in routes for task in route.active}
        self._formers = {}
        for task in before.keys() | formers.keys():
            had = dict.fromkeys([before.get(task, ""), *formers.get(task, ())])
            if kept := [url for url in had if url in self._urls and url != self._owners.get(task)]:
                self._formers[task] = kept[:_MOST_FORMERS]
        self._standbys = {}
        for route in routes:
            for task in route.standby:
                self._standbys.setdefault(task, []).append(route.url)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def knows(self, url: str) -> bool:
        """Whether a worker of this app is reached there."""
        return url in self._urls

    def owner(self, task: TaskId) -> str | None:
        """Where a task's owner is reached; empty where it serves no HTTP, None where nobody is known to own it."""
        return self._owners.get(task)

    def formers(self, task: TaskId) -> list[str]:
        """Where the task was before, the newest first: one of them has it until it has given it back."""
        return self._formers.get(task, [])

    def standbys(self, task: TaskId) -> list[str]:
        """Where its standbys are reached."""
        return [url for url in self._standbys.get(task, ()) if url]

    async def changed(self, within_s: float) -> None:
        """Wait for news, or so long."""
        with anyio.move_on_after(within_s):
            await self._news.wait()
