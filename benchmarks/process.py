"""A measured program: its whole process tree's CPU time and peak memory, read from /proc (so Linux only)."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from benchmarks.settings import APPS

STOP_TIMEOUT_S = 15
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Program:
    """A program in a process group of its own; leaving the `with` block ends it with all its children."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._command = command
        self._environment = {**os.environ, **environment}
        self._log = log

    def __enter__(self) -> "Program":
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=APPS,
                start_new_session=True,
            )
        return self

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self._signal(signal.SIGTERM)
        self._process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """`kill -9`."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)  # what the program left behind, too
            self._process.wait()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def log_tail(self, lines: int = 8) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def cpu_s(self) -> float:
        """User and system time of the tree so far."""
        return sum(_ticks(pid) for pid in self._tree()) / TICKS_PER_S

    def peak_memory_mb(self) -> float:
        """The sum of the peak resident sizes of all processes of the tree."""
        return sum(self.peak_memory_each_mb())

    def peak_memory_each_mb(self) -> list[float]:
        """The peak resident size of each process of the tree, its first one first."""
        return [_peak_kib(pid) / 1024 for pid in self._tree()]

    def _tree(self) -> list[int]:
        found = [self._process.pid]
        for pid in found:  # grows while it is walked
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    found += [int(child) for child in children.read_text().split()]
                except OSError:
                    pass
        return found

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _peak_kib(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
