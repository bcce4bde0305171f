"""In which unit of an agent's work a task of user code was started.

Such a task may send only while that unit is in hand: one that outlives it would send on behalf of another record. A
context variable set for each record would tell, but costs as much as decoding the record (measured: 0.3 us). Tasks are
started far more seldom than records are taken, so the loop's task factory notes the unit when a task is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable
from weakref import WeakKeyDictionary

from streamflow.processing.context import current_turn

Unit: TypeAlias = tuple[object, object]
"""A call of an agent's function, and what it has in hand; both compared by identity."""


@runtime_checkable
class Worked(Protocol):
    """A turn that works through units."""

    def unit_in_work(self) -> Unit:
        """The unit in hand now."""
        ...


_units: WeakKeyDictionary[asyncio.Task[Any], Unit] = WeakKeyDictionary()
_installed: dict[int, int] = {}
"""How many workers of a loop (by its id) note births."""


def unit_of(task: asyncio.Task[Any] | None) -> Unit | None:
    """The unit a task was started in; None for one that was not started in an agent."""
    return None if task is None else _units.get(task)


@contextmanager
def noting_births() -> Generator[None]:
    """Note the units of the tasks that are started on this loop while the block runs.

    A task factory that is already there goes on making the tasks.
    """
    loop = asyncio.get_running_loop()
    key = id(loop)
    before = loop.get_task_factory()
    if not _installed.get(key):
        loop.set_task_factory(_factory(before))
    _installed[key] = _installed.get(key, 0) + 1
    try:
        yield
    finally:
        _installed[key] -= 1
        if not _installed[key]:
            del _installed[key]
            loop.set_task_factory(before)


def _factory(before: Callable[..., Any] | None) -> Any:
    def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        task = asyncio.Task(coro, loop=loop, **options) if before is None else before(loop, coro, **options)
        turn: object = current_turn.get()
        if isinstance(turn, Worked):
            # A task started by a task of an earlier unit belongs to that one.
            _units[task] = unit_of(current()) or turn.unit_in_work()
        return task

    return make


def current() -> asyncio.Task[Any] | None:
    """The task that runs now; None in a thread or a callback."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
