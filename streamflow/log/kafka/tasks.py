"""Tasks that belong to a block: they end with it, and what the block raises leaves it unwrapped.

An anyio task group hands exceptions on as exception groups, also those of the block itself; callers of a log shall see
`TaskMigratedError`, not a group of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

_END_TIMEOUT_S = 5.0


class TaskOwner:
    """Owns tasks from `async with` to its end.

    Args:
        name: Of the tasks.
        on_bug: Told when a task ends by an exception, which it should not.
    """

    def __init__(self, name: str, on_bug: Callable[[BaseException], None]) -> None:
        self._name = name
        self._on_bug = on_bug
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TaskOwner:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            with anyio.CancelScope(shield=True):
                await asyncio.wait(self._tasks, timeout=_END_TIMEOUT_S)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends or the block does."""
        task = asyncio.create_task(work, name=self._name)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_bug(error)
