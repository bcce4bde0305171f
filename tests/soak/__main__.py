"""`make soak`: the oracle's workers for half an hour and ten million records, under faults all the time.

Prints its figures as JSON lines: every few seconds one of the workers' memory and open files, at the end a summary.
Memory and files that grow make it fail, as does anything that is not the fold of its input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.kafka.broker import Broker
from tests.oracle.chaos import Chaos, repeats
from tests.system.harness import System, Worker

ROOM = 1.25
"""How much more memory or open files a worker may have in the last quarter than in the second: tasks move."""
FILE_ROOM = 40
FILES_PER_STORE = 32
"""What a store may have on disk: files wait to be merged until a table has four; each open after a crash adds some."""
SAMPLE_S = 5.0
WORKERS, SUB_TOPOLOGIES = 3, 2
_MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One look at the workers.

    Attributes:
        at_s: Seconds since the start.
        sent: Records written so far.
        committed: Records committed so far.
        rss_mib: Largest resident memory of a worker.
        files: Most open files of a worker.
        disk_files: How many files the local stores have.
    """

    at_s: float
    sent: int
    committed: int
    rss_mib: float
    files: int
    disk_files: int


class Soak:
    """One run.

    Args:
        chaos: The workers and what happens to them.
        duration_s: How long.
        total: How many records, spread evenly.
        faults: Which kinds, in turn.
        every_s: Seconds between faults, about.
    """

    def __init__(self, chaos: Chaos, duration_s: float, total: int, faults: list[str], every_s: float) -> None:
        self._chaos = chaos
        self._duration_s = duration_s
        self._total = total
        self._faults = faults
        self._every_s = every_s
        self._began_s = time.monotonic()
        self.samples: list[Sample] = []

    async def run(self) -> dict[str, object]:
        """All of it; the summary."""
        chaos = self._chaos
        await chaos.begin(WORKERS)
        self._began_s = time.monotonic()
        sampling = asyncio.create_task(self._sample())
        try:
            async with chaos.load(per_s=round(self._total / self._duration_s)):
                while self._elapsed_s < self._duration_s:
                    await asyncio.sleep(chaos.dice.uniform(0.5, 1.5) * self._every_s)
                    await chaos.happen(chaos.dice.choice(self._faults))
        finally:
            sampling.cancel()
        verdict = await chaos.finish()
        return {
            "records": verdict.total,
            "seconds": round(self._elapsed_s),
            "faults": dict(chaos.did),
            "rebalances": chaos.did["kill"] * 2 + chaos.did["pause"] * 2,
            "repeated": repeats(verdict.rewinds),
            "rss_mib": self._growth("rss_mib"),
            "files": self._growth("files"),
            "disk_files": self._growth("disk_files"),
        }

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            running = [each for each in self._chaos.workers if each.runs]
            committed = await self._chaos.system.committed("numbers")
            sample = Sample(
                round(self._elapsed_s, 1),
                self._chaos.sent,
                sum(committed.values()),
                round(max((_rss_bytes(each) for each in running), default=0) / _MIB, 1),
                max((_open_files(each) for each in running), default=0),
                sum(1 for _ in _files_under(self._chaos.system.folder / "data" / self._chaos.system.app_id)),
            )
            self.samples.append(sample)
            print(json.dumps(asdict(sample)), flush=True)

    def _growth(self, field: str) -> dict[str, float]:
        """The most there was of something in the second quarter, and in the last."""
        values = [getattr(sample, field) for sample in self.samples]
        quarter = max(1, len(values) // 4)
        return {"second_quarter": max(values[quarter : 2 * quarter], default=0), "last_quarter": max(values[-quarter:])}


def _rss_bytes(worker: Worker) -> int:
    try:
        pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _open_files(worker: Worker) -> int:
    try:
        return len(os.listdir(f"/proc/{worker.pid}/fd"))
    except OSError:
        return 0


def _files_under(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder):
        yield from names


def grown(summary: dict[str, object], stores: int) -> list[str]:
    """What has grown that should not."""
    found = []
    for field, room in (("rss_mib", 0), ("files", FILE_ROOM)):
        before, after = _quarters(summary, field)
        if after > before * ROOM + room:
            found.append(f"{field}: {before} in the second quarter, {after} in the last")
    _, files = _quarters(summary, "disk_files")
    if files > stores * FILES_PER_STORE:
        found.append(f"disk_files: {files} for at most {stores} stores")
    return found


def _quarters(summary: dict[str, object], field: str) -> tuple[float, float]:
    figures = summary[field]
    assert isinstance(figures, dict)
    return figures["second_quarter"], figures["last_quarter"]


async def soak(arguments: argparse.Namespace) -> dict[str, object]:
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamflow-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        broker = None
        address = f"sqlite:///{folder / 'log.db'}"
        if arguments.log == "kafka":
            broker = stack.enter_context(Broker(folder / "broker"))
            address = f"kafka://{broker.bootstrap}"
        async with System(folder, address) as system:
            chaos = Chaos(system, arguments.seed, arguments.guarantee, partitions=arguments.partitions, broker=broker)
            faults = ["kill"] * 6 + (["broker"] if broker else [])
            faults += ["pause"] if arguments.guarantee == "exactly_once" else []
            return await Soak(chaos, arguments.seconds, arguments.records, faults, arguments.every).run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak ARGS=...", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--log", choices=["kafka", "sqlite"], default="kafka")
    parser.add_argument("--guarantee", choices=["exactly_once", "at_least_once"], default="exactly_once")
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults, about")
    parser.add_argument("--folder", type=Path, help="keep everything here (default: thrown away)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    summary = asyncio.run(soak(arguments))
    print(json.dumps(summary))
    if found := grown(summary, stores=WORKERS * SUB_TOPOLOGIES * arguments.partitions):
        raise SystemExit("it grew: " + "; ".join(found))


if __name__ == "__main__":
    main()
