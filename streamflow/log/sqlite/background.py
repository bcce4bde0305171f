"""A task that belongs to a block: it ends with it, and never wraps the block's exceptions in a group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager

import anyio


@asynccontextmanager
async def background(work: Coroutine[object, object, None], name: str) -> AsyncGenerator[asyncio.Task[None]]:
    """Run `work` beside the block and cancel it at its end.

    An anyio task group would do the same, but hands every exception that crosses it on as an exception group, also
    those of the block: callers of a log shall see `TaskMigratedError`, not a group of it.

    Args:
        work: Turns its own failures into answers for those who wait for it; an exception it lets out is a bug, and is
            raised at the end of the block.
        name: The task's name.
    """
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
