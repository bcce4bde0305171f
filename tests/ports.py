"""Ports that nobody listens on."""

import contextlib
import os
import random
import socket

HOST = "127.0.0.1"
FIRST, END = 20_000, 32_000  # below those that outgoing connections get: one that is free now stays free

_handed_out: set[int] = set()


def free_port() -> int:
    """A port of this process's own part of the range (pytest-xdist runs several), which gets each only once.

    A cluster with many listeners asks for dozens before the first is opened.
    """
    place = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    each = (END - FIRST) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = FIRST + place * each + random.randrange(each)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((HOST, port))
            if port not in _handed_out:
                _handed_out.add(port)
                return port
