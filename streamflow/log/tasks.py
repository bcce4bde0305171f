"""Tasks that belong to a block: they end with it, and what the block raises leaves it unwrapped.

An anyio task group hands exceptions on as exception groups, also those of the block itself; callers of a log shall see
`TaskMigratedError`, not a group of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

_END_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class TaskOwner:
    """Owns tasks from `async with` to its end, which cancels them and waits for them, 5 s at most.

    Their work turns its own failures into answers for those who wait for it: an exception that it lets out is a bug.

    Args:
        name: Of the tasks.
        work: Started with the block.
        on_bug: Told of a bug when it shows; None: it is raised at the end of the block, unless the block raises itself.
    """

    def __init__(
        self, name: str, *work: Coroutine[Any, Any, None], on_bug: Callable[[BaseException], None] | None = None
    ) -> None:
        self._name = name
        self._work = work
        self._on_bug = on_bug or self._keep
        self._bug: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TaskOwner:
        for work in self._work:
            self.start(work)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait(tasks, timeout=_END_TIMEOUT_S)
            if not all(task.done() for task in tasks):
                logger.error("%s: does not end; it is left behind", self._name)
        if self._bug is not None and (not exc_info or exc_info[0] is None):
            raise self._bug

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends or the block does."""
        task = asyncio.create_task(work, name=self._name)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_bug(error)

    def _keep(self, error: BaseException) -> None:
        self._bug = self._bug or error


def cancel_again() -> None:
    """Have the cancellation that was caught raised by the next await; a scope's comes again by itself."""
    task = asyncio.current_task()
    if task is not None and anyio.current_effective_deadline() != -math.inf:
        task.uncancel()
        task.cancel()
