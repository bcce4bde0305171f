"""What the soak's workers use of the machine, looked at every few seconds from outside."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from streamflow.errors import RetriableError
from tests.oracle.chaos import Chaos
from tests.system.harness import Worker

_MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One look.

    Attributes:
        at_s: Seconds since the load began.
        sent: Records written so far.
        committed: Records committed so far.
        rebalances: How many the worker that is never killed has seen.
        rss_mib: Resident memory of each worker; the first is the one that is never killed.
        descriptors: Open files of each worker.
        store_files: How many files the local stores have.
        store_mib: Their size.
        machine_load: The machine's load, averaged over a minute: what else runs on it counts.
    """

    at_s: float
    sent: int
    committed: int
    rebalances: int
    rss_mib: tuple[float, ...]
    descriptors: tuple[int, ...]
    store_files: int
    store_mib: float
    machine_load: float


class Watch:
    """Takes samples of one run.

    Args:
        chaos: The run.
        print_line: Told of each sample, as JSON.
    """

    def __init__(self, chaos: Chaos, print_line: Callable[[str], None]) -> None:
        self._chaos = chaos
        self._print_line = print_line
        self._began_s = time.monotonic()
        self.committed = self._rebalances = 0
        self.samples: list[Sample] = []

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    async def look(self) -> None:
        """Take a sample; between two of them nothing is kept but their numbers."""
        system = self._chaos.system
        with contextlib.suppress(RetriableError):  # the broker may be away
            self.committed = sum((await system.committed("numbers")).values())
        workers = list(self._chaos.workers)
        await self._count_rebalances(workers[0])
        files, size_bytes = _stored(system.folder / "data" / system.app_id)
        sample = Sample(
            at_s=round(self.elapsed_s, 1),
            sent=self._chaos.sent,
            committed=self.committed,
            rebalances=self._rebalances,
            rss_mib=tuple(each.rss_mib for each in workers),
            descriptors=tuple(_descriptors(each) for each in workers),
            store_files=files,
            store_mib=round(size_bytes / _MIB, 1),
            machine_load=round(os.getloadavg()[0], 1),
        )
        self.samples.append(sample)
        self._print_line(json.dumps(asdict(sample)))

    async def _count_rebalances(self, spared: Worker) -> None:
        """As the worker that is never killed says; while it is stopped it says nothing."""
        code, answer = await spared.get("/status.json")
        if code == 200:
            self._rebalances = json.loads(answer)[0]["status"]["rebalances"]

    def quarters(self, value: Callable[[Sample], float]) -> tuple[float, float]:
        """The most there was of something in the second quarter of the run, and in the last."""
        values = [value(sample) for sample in self.samples]
        quarter = max(1, len(values) // 4)
        return max(values[quarter : 2 * quarter], default=0), max(values[-quarter:], default=0)

    def spread(self, count: int) -> Sequence[Sample]:
        """So many samples, evenly, the first and the last among them."""
        if len(self.samples) <= count:
            return self.samples
        last = len(self.samples) - 1
        return [self.samples[round(last * number / (count - 1))] for number in range(count)]


def _descriptors(worker: Worker) -> int:
    try:
        return len(os.listdir(f"/proc/{worker.pid}/fd"))
    except OSError:
        return 0


def _stored(folder: Path) -> tuple[int, int]:
    count = size_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size_bytes += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue  # deleted meanwhile
            count += 1
    return count, size_bytes
