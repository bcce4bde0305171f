"""A worker process that a supervisor started: what it inherits, and how it notices that the supervisor is gone."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamflow.config import PROCESS

_MORE_S = 5.0

logger = logging.getLogger("streamflow.worker")


@dataclass(frozen=True)
class Child:
    """What a worker process inherits.

    Attributes:
        index: Its number, from 0.
        watch_fd: Read end of a pipe whose other end only the supervisor holds.
        listener: Where it serves its metrics to the supervisor; None without the web.
    """

    index: int
    watch_fd: int
    listener: socket.socket | None

    def watch_parent(self, stop: Callable[[], None], timeout_s: float) -> None:
        """Stop when the supervisor is gone, however it went (kill -9 included).

        Args:
            stop: Stops cleanly; called from a thread.
            timeout_s: How long that may take, before the process ends itself.
        """

        def watch() -> None:
            while os.read(self.watch_fd, 1):
                pass
            logger.error("the supervisor is gone; stopping")
            stop()
            time.sleep(timeout_s + _MORE_S)
            os._exit(1)

        threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()


def from_environment() -> Child | None:
    """What this process inherited, or None when no supervisor started it; asked once, and forgotten then.

    Programs that user code starts inherit the environment but not the file descriptors.
    """
    text = os.environ.pop(PROCESS, "")
    if not text:
        return None
    index, watch_fd, web_fd = map(int, text.split(":"))
    return Child(index, watch_fd, None if web_fd < 0 else socket.socket(fileno=web_fd))


def environment_of(index: int, watch_fd: int, listener: socket.socket | None) -> tuple[dict[str, str], Sequence[int]]:
    """The environment of a worker process, and the file descriptors it inherits.

    Args:
        index: Its number, from 0.
        watch_fd: Read end of the supervisor's pipe.
        listener: Where it is to serve its metrics.
    """
    web_fd = -1 if listener is None else listener.fileno()
    inherited = [watch_fd] if listener is None else [watch_fd, web_fd]
    return {**os.environ, PROCESS: f"{index}:{watch_fd}:{web_fd}"}, inherited
