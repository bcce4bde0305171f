"""Who waits for something new in the log, and how they hear of it.

Writers of this process tell at once; other processes' writes show in `PRAGMA data_version`, which costs a few
microseconds and is polled only while somebody waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import anyio

from streamflow.errors import StreamFlowError

ACTIVE_POLL_S = 0.002
IDLE_POLL_S = 0.015
ACTIVE_FOR_S = 2.0
"""Polling slows down this long after records were last written or found."""


class Changes:
    """A count of changes, and those who wait for the next one. Belongs to one event loop."""

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()
        self._wanted = asyncio.Event()
        self._active_until = 0.0

    def notify(self) -> None:
        """Something was written; may be called from any thread."""
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._notify()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._notify)

    def active(self) -> None:
        """Records come in: poll often for a while."""
        self._active_until = time.monotonic() + ACTIVE_FOR_S

    @contextmanager
    def waking(self, future: asyncio.Future[None]) -> Generator[None]:
        """Have a future completed by the next change."""
        self._waiting.add(future)
        self._wanted.set()
        try:
            yield
        finally:
            self._waiting.discard(future)

    async def wait(self, seen: int) -> None:
        """Wait until `count` differs from what was seen (taken before looking into the log)."""
        if self.count == seen:
            future: asyncio.Future[None] = self._loop.create_future()
            with self.waking(future):
                await future

    async def poll(self, data_version: Callable[[], int]) -> None:
        """Watch for other processes' writes, for ever.

        Args:
            data_version: Reads `PRAGMA data_version` on a connection that never writes.
        """
        last: int | None = None
        while True:
            if not self._waiting:
                self._wanted.clear()
                await self._wanted.wait()
            try:
                version = data_version()
            except StreamFlowError:
                version = None  # whoever waits looks for himself and meets the error
            if version is None or version != last:
                last = version
                self._notify()
            await anyio.sleep(ACTIVE_POLL_S if time.monotonic() < self._active_until else IDLE_POLL_S)

    def _notify(self) -> None:
        self.count += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()
