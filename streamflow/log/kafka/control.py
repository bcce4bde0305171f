"""A thread with an event loop of its own: what must go on whatever the data loop does.

Nothing is shared across the border but plain values: calls go in by `call`, news come out by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable

import anyio

logger = logging.getLogger("streamflow.kafka")

_STOP_TIMEOUT_S = 5.0


class ControlThread:
    """Runs a coroutine function on a loop of its own from `async with` to its end.

    Args:
        name: Of the thread.
        main: What to run; it ends when it is cancelled, within 5 s.
        on_end: Called on the data loop when it ended by itself, with its exception.
    """

    def __init__(
        self, name: str, main: Callable[[], Awaitable[None]], on_end: Callable[[BaseException | None], None]
    ) -> None:
        self._main = main
        self._on_end = on_end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def __aenter__(self) -> ControlThread:
        self._data_loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stopping = True
        self.call(self._cancel)
        with anyio.move_on_after(_STOP_TIMEOUT_S, shield=True):
            await self._ended.wait()
        if self._ended.is_set():
            self._thread.join()
        else:
            logger.warning("%s did not stop within %s s", self._thread.name, _STOP_TIMEOUT_S)

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call something on the control loop, soon; from any thread. Nothing happens when it has ended."""
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(function, *arguments)
            except RuntimeError:
                pass  # that loop is closed

    def tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call something on the data loop, soon; from the control thread."""
        try:
            self._data_loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            pass  # the program ended without leaving the block

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            asyncio.run(self._watched())
        except asyncio.CancelledError:
            pass
        except BaseException as exc:
            error = exc
        if not self._stopping:
            self.tell(self._on_end, error)
        self.tell(self._ended.set)

    async def _watched(self) -> None:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        if not self._stopping:  # else nobody was there yet to be cancelled
            await self._main()
