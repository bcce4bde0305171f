"""An event loop in which time passes only where nothing else is left to do, and chance comes from a seed.

What is ready runs at once. When nothing is, time jumps to the next timer, so that hours of sleeping take no time and
nothing depends on how fast the machine is. Callbacks run in the order in which they were registered, as asyncio
promises; which of several tasks that are ready takes its step first, asyncio leaves open, and the seed decides.

Threads would bring their own time: work handed to one (`asyncio.to_thread`, `anyio.to_thread`) runs on the spot.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack
from unittest import mock

import anyio.lowlevel
import anyio.to_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_MAX_ROUNDS = 1_000_000


class NothingLeftError(RuntimeError):
    """Everything waits for something that nobody is left to do."""


class _NumberedTask(asyncio.Task[Any]):
    """A task that knows as how many-th it was made: an order that memory addresses have no part in."""

    __slots__ = ("number",)
    number: int


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop.

    Args:
        seed: Decides which ready task runs first.
    """

    # asyncio's own, which its type stubs do not tell: what is ready, the heap of timers, and whether to stop.
    _ready: deque[asyncio.Handle]
    _scheduled: list[Any]
    _stopping: bool

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._now_s = 0.0
        self._rounds_now = 0
        self._order = random.Random(seed)
        self._numbers = itertools.count()
        self.set_task_factory(self._numbered)

    def _numbered(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any], **more: Any
    ) -> asyncio.Task[Any]:
        task = _NumberedTask(coro, loop=self, **more)
        task.number = next(self._numbers)
        return task

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def next_timer_s(self) -> float | None:
        """Seconds until the next timer; None where there is none."""
        live = [timer._when for timer in self._scheduled if not timer._cancelled]
        return max(0.0, min(live) - self._now_s) if live else None

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """The same as `call_soon`: there are no other threads."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run it on the spot."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    # --- one round ---------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        """Run what is ready once; asyncio calls it until the loop is stopped."""
        timers, ready = self._scheduled, self._ready
        before_s = self._now_s
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not ready and not self._stopping:
            if not timers:
                raise NothingLeftError(f"at {self._now_s:g} s everything waits, and no timer is set")
            self._now_s = max(self._now_s, timers[0]._when)
        while timers and timers[0]._when <= self._now_s + 1e-9:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer._cancelled:
                ready.append(timer)
        self._rounds_now = self._rounds_now + 1 if self._now_s == before_s else 0
        if self._rounds_now > _MAX_ROUNDS:
            raise NothingLeftError(f"at {self._now_s:g} s tasks wake each other for ever, and no time passes")
        self._ready = deque(self._in_order(ready))
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle._cancelled and self._may_run(handle):
                handle._run()

    def _may_run(self, handle: asyncio.Handle) -> bool:
        """Whether a callback runs now; who returns False keeps it for later."""
        return True

    def _in_order(self, ready: Sequence[asyncio.Handle]) -> list[asyncio.Handle]:
        """Callbacks as they came, then the tasks' steps as the seed has it."""
        callbacks: list[asyncio.Handle] = []
        steps: list[tuple[int, asyncio.Handle]] = []
        for handle in ready:
            owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
            if isinstance(owner, _NumberedTask):
                steps.append((owner.number, handle))
            else:
                callbacks.append(handle)
        if len(steps) > 1:
            steps.sort(key=lambda step: step[0])
            self._order.shuffle(steps)
        callbacks.extend(handle for _, handle in steps)
        return callbacks


async def _on_the_spot(func: Callable[..., T], *args: Any, **_: Any) -> T:
    """`anyio.to_thread.run_sync` without a thread."""
    await anyio.lowlevel.checkpoint()
    return func(*args)


@contextlib.contextmanager
def without_threads() -> Generator[None]:
    """Have work for threads run on the spot while the block runs, in the whole process."""
    with mock.patch.object(anyio.to_thread, "run_sync", _on_the_spot):
        yield
