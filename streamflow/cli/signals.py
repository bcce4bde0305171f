"""The first SIGINT or SIGTERM stops cleanly, the second at once; what does not stop in time is ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

from streamflow.cli.errors import FAILED

HANDLED = (signal.SIGINT, signal.SIGTERM)

_ECHO_S = 0.05

logger = logging.getLogger("streamflow.worker")


class Requests:
    """Tells a second request from one that arrives twice.

    `timeout` and some process managers signal a process and then its group: the same signal comes again at once.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def is_first(self, number: int) -> bool | None:
        """Whether a signal is the first request; None when it is only that one's echo.

        Args:
            number: The signal's.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            return True
        first, at = self._first
        return None if number == first and now - at < _ECHO_S else False


@contextmanager
def stopping(stop: Callable[[], None], *, within_s: float | None = None) -> Generator[None]:
    """Handle signals while the block runs.

    Plain handlers and not the event loop's: they run between two bytecodes of user code that blocks the loop, too, so
    that a second signal always ends the process.

    Args:
        stop: Called for the first signal; safe in a signal handler. A second one ends the process with 128 + its
            number.
        within_s: Seconds after the first signal at which the process is ended with code 1 if the block still runs: user
            code may block the event loop, and then nothing in the block can look at a clock. None waits for ever.
    """
    requests = Requests()
    told: SimpleQueue[None] = SimpleQueue()  # the only thing of its kind that a signal handler may use
    over = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        first = requests.is_first(number)
        if first:
            told.put(None)
            stop()
        elif first is False:
            os._exit(128 + number)

    def watch(seconds: float) -> None:
        told.get()
        if not over.wait(seconds):
            _give_up(seconds)

    if within_s is not None:
        threading.Thread(target=watch, args=(within_s,), name="stop-watch", daemon=True).start()
    before = {number: signal.signal(number, handle) for number in HANDLED}
    try:
        yield
    finally:
        over.set()
        told.put(None)  # lets the thread go
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up(seconds: float) -> None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    place = "".join(traceback.format_stack(frame)[-2:]) if frame is not None else ""
    logger.critical(
        "not stopped within %g s: something blocks the event loop; ending the process. What was not committed is "
        "processed again by the next start. It is here:\n%s",
        seconds,
        place.rstrip(),
    )
    os._exit(FAILED)
