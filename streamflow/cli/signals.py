"""The first SIGINT or SIGTERM stops cleanly, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping(stop: Callable[[], None]) -> Generator[None]:
    """Handle signals while the block runs.

    Plain handlers and not the event loop's: they run between two bytecodes of user code that blocks the loop, too, so
    that a second signal always ends the process.

    Args:
        stop: Called for the first signal; safe in a signal handler. A second one ends the process with 128 + its
            number.
    """
    asked = False

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        stop()

    before = {number: signal.signal(number, handle) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
