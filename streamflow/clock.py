"""Time comes in as an argument: the system's, or a virtual one that a test moves.

Only StreamFlow's own waits go through a `Clock` (commit interval, back-off, timers, session expiry): user code that
sleeps keeps sleeping in real time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from abc import ABC, abstractmethod

import anyio
import anyio.lowlevel


class Clock(ABC):
    """Wall-clock and monotonic time, and waiting."""

    @abstractmethod
    def now_ms(self) -> int:
        """Wall-clock time in milliseconds since the epoch, UTC."""

    @abstractmethod
    def monotonic(self) -> float:
        """Monotonic time in seconds; only differences mean anything."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait.

        Args:
            seconds: How long, >= 0; 0 lets other tasks run.

        Cancellation: atomic; nothing is left behind.
        """

    async def wait(self, event: asyncio.Event, timeout_s: float) -> bool:
        """Wait for an event, but not for ever.

        Args:
            event: What to wait for.
            timeout_s: Seconds on this clock, >= 0.

        Returns:
            Whether the event is set.

        Cancellation: atomic.
        """
        if event.is_set() or timeout_s <= 0:
            return event.is_set()
        async with anyio.create_task_group() as group:

            async def expire() -> None:
                await self.sleep(timeout_s)
                group.cancel_scope.cancel()

            group.start_soon(expire)
            await event.wait()
            group.cancel_scope.cancel()
        return event.is_set()


class SystemClock(Clock):
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class VirtualClock(Clock):
    """A clock that stands still until `advance` moves it; sleepers wake in the order of their times.

    Args:
        start_ms: Wall-clock start in milliseconds since the epoch.
    """

    def __init__(self, start_ms: int = 1_700_000_000_000) -> None:
        self._start_ms = start_ms
        self._elapsed_s = 0.0
        self._sleepers: list[tuple[float, int, anyio.Event]] = []
        self._sequence = itertools.count()

    def now_ms(self) -> int:
        return self._start_ms + round(self._elapsed_s * 1000)

    def monotonic(self) -> float:
        return self._elapsed_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        event = anyio.Event()
        sleeper = (self._elapsed_s + seconds, next(self._sequence), event)
        heapq.heappush(self._sleepers, sleeper)
        try:
            await event.wait()
        finally:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
                heapq.heapify(self._sleepers)

    def next_wake_s(self) -> float | None:
        """Seconds until the next sleeper wakes, or None when nobody sleeps."""
        return None if not self._sleepers else max(0.0, self._sleepers[0][0] - self._elapsed_s)

    def advance(self, seconds: float) -> None:
        """Move time and wake every sleeper that is due.

        Args:
            seconds: How far, >= 0.
        """
        self._elapsed_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._elapsed_s + 1e-9:
            heapq.heappop(self._sleepers)[2].set()
