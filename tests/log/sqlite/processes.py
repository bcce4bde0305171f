"""Child processes that a test kills and stops, and what they have said so far."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]


class Child:
    """A process of `tests.log.sqlite.writer`; it is killed at the end of the block, if not before."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.log.sqlite.writer", *arguments], cwd=ROOT, stdout=subprocess.PIPE
        )
        os.set_blocking(self._process.stdout.fileno(), False)
        self._said = b""

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def lines(self) -> list[str]:
        """Whole lines said so far."""
        while chunk := self._process.stdout.read(1 << 20):
            self._said += chunk
        return self._said.decode().splitlines() if self._said else []

    def wait_for(self, enough, within_s: float = 20.0) -> list[str]:
        """Waits, blocking, until what was said is enough."""
        until = time.monotonic() + within_s
        while not enough(lines := self.lines()):
            if self._process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the child said only {lines} (exit code {self._process.poll()})")
            time.sleep(0.005)
        return lines
