"""A few requests in flight per broker, each on a task that stays: starting a task per request would cost more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from streamflow.log.tasks import TaskOwner

Job = TypeVar("Job")


class Slots(Generic[Job]):
    """At most `size` jobs at a time per node.

    Args:
        tasks: Who owns the tasks.
        size: Slots per node.
        run: Works off one job: node, slot, job. It raises nothing but cancellation.
        freed: Called after each job, when the slot is free again.
    """

    def __init__(
        self,
        tasks: TaskOwner,
        size: int,
        run: Callable[[int, int, Job], Awaitable[None]],
        freed: Callable[[int], None],
    ) -> None:
        self._tasks = tasks
        self._size = size
        self._run = run
        self._freed = freed
        self._free: dict[int, list[int]] = {}
        self._idle: dict[tuple[int, int], asyncio.Future[Job]] = {}

    def free(self, node: int) -> list[int]:
        """The free slots of a node, lowest last."""
        return self._free.setdefault(node, list(range(self._size - 1, -1, -1)))

    def start(self, node: int, slot: int, job: Job) -> None:
        """Hand a job to a free slot."""
        self.free(node).remove(slot)
        waiting = self._idle.pop((node, slot), None)
        if waiting is None:
            self._tasks.start(self._stay(node, slot, job))
        else:
            waiting.set_result(job)

    async def _stay(self, node: int, slot: int, job: Job) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._run(node, slot, job)
            waiting: asyncio.Future[Job] = loop.create_future()
            self._idle[node, slot] = waiting
            free = self.free(node)
            free.append(slot)
            free.sort(reverse=True)
            self._freed(node)
            job = await waiting
