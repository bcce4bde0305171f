"""Lines of a file, a pipe or a terminal, as soon as they are there."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from pathlib import Path

import anyio

from streamflow.errors import ConfigurationError

CHUNK_BYTES = 128 * 1024


class Lines:
    """An open source of lines.

    Args:
        fd: File descriptor to read from.
        name: How to name it to people.
        total: How many lines it has, where that can be told.
    """

    def __init__(self, fd: int, name: str, total: int | None) -> None:
        self._fd = fd
        self.name = name
        self.total = total
        self.interactive = os.isatty(fd)

    async def chunks(self) -> AsyncIterator[list[bytes]]:
        """Yield lines without their ends: as many at a time as there are to read just now."""
        mode = os.fstat(self._fd).st_mode
        # Waiting in the loop and not in a thread: Ctrl-C then ends it at once. Files are always ready, and cannot be
        # waited for.
        waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or self.interactive
        rest = b""
        while True:
            if waits:
                await anyio.wait_readable(self._fd)
            data = os.read(self._fd, CHUNK_BYTES)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                yield lines
        if rest:
            yield [rest]


@contextmanager
def opened(file: Path | None, *, called: str = "--file") -> Generator[Lines]:
    """Open a file, or standard input.

    Args:
        file: None for standard input.
        called: What the command line calls it.

    Raises:
        ConfigurationError: It cannot be read.
    """
    if file is None:
        yield Lines(sys.stdin.fileno(), "standard input", None)
        return
    try:
        stream = file.open("rb", buffering=0)
    except OSError as exc:
        raise ConfigurationError(f"{called} {file}: {exc.strerror}") from exc
    with stream:
        total = None
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            total = sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
            stream.seek(0)
        yield Lines(stream.fileno(), str(file), total)
