"""User code that lets a cancellation escape which nobody asked for.

An agent that awaits something that was cancelled (a connection that closed, a task of its own) gets `CancelledError`.
asyncio and anyio end a task that lets it pass without a word, so it is made an error like any other here; a
cancellation that concerns the task itself is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from inspect import isawaitable
from math import inf
from typing import Any

import anyio


class StrayCancellation(Exception):
    """What user code awaited was cancelled, not the task that user code runs in."""


def stray(error: asyncio.CancelledError) -> StrayCancellation | None:
    """The error to go on with when nobody has cancelled the current task; else None, and the cancellation goes on."""
    task = asyncio.current_task()
    if task is None or task.cancelling() or anyio.current_effective_deadline() == -inf:
        return None
    return StrayCancellation(
        f"CancelledError escaped{f' ({error})' if str(error) else ''}: something it awaited was cancelled; catch it "
        "where it is awaited"
    )


async def call_user(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a hook, timer or task, sync or async.

    Raises:
        StrayCancellation: It raised `CancelledError` and was not cancelled.
        Exception: Whatever else it raised.
    """
    try:
        result = function(*arguments)
        if isawaitable(result):
            await result
    except asyncio.CancelledError as cancelled:
        if (error := stray(cancelled)) is None:
            raise
        raise error from cancelled
