"""How fast tables come back: a clean restart, and one whose local state was wiped.

Fills a topic with as many keys as asked for, lets a worker build a table of them, and measures from the start of a new
process to the first output of a record that is sent then; and what the restore itself took, as the worker says.

    python benchmarks/restore.py [--broker kafka://HOST:PORT] [--keys 1000000]

Without a broker it runs on SQLite.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from streamflow.clock import SystemClock
from streamflow.log.api import Log, NewTopic
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import LZ4
from streamflow.log.connect import connect
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition

PARTITIONS = 4
APP = """
import os
from collections.abc import AsyncIterator
import streamflow as sf

app = sf.App(os.environ["APP_ID"], log_level="INFO", web=False)
numbers = app.topic(app.id + "-in", key_type=str, value_type=int)
out = app.topic(app.id + "-out", key_type=str, value_type=float)
totals = app.table("totals", key_type=str, value_type=float, default=float)

@app.agent(numbers, sink=out)
async def total(stream: sf.Stream[int]) -> AsyncIterator[float]:
    async for key, number in stream.items():
        totals[key] += number
        yield totals[key]
"""


class Restart:
    """One app, its worker and its log."""

    def __init__(self, folder: Path, broker: str, keys: int) -> None:
        self.folder = folder
        self.app_id = f"restore-{uuid.uuid4().hex[:8]}"
        self.keys = keys
        self.environment = {
            **os.environ,
            "APP_ID": self.app_id,
            "STREAMFLOW_BROKER": broker,
            "STREAMFLOW_DATA_DIR": str(folder / "data"),
        }
        (folder / "app.py").write_text(APP)
        self.output = folder / "worker.log"

    def start(self) -> subprocess.Popen[bytes]:
        command = Path(sys.executable).parent / "streamflow"
        with self.output.open("wb") as output:
            return subprocess.Popen(
                [command, "worker", "app.py"], cwd=self.folder, env=self.environment, stdout=output, stderr=output
            )

    def stop(self, worker: subprocess.Popen[bytes]) -> None:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)

    async def fill(self, log: Log) -> None:
        """A record of each key."""
        topic = f"{self.app_id}-in"
        await log.admin.create([NewTopic(name, PARTITIONS) for name in (topic, f"{self.app_id}-out")])
        builders = [BatchBuilder(LZ4, 512 * 1024) for _ in range(PARTITIONS)]
        async with log.producer() as producer:
            for number in range(self.keys):
                key = b"user-%d" % number
                partition = partition_for(key, PARTITIONS)
                row = (SystemClock().now_ms(), key, (1).to_bytes(8, "big"), [])
                if not builders[partition].append(*row):
                    await producer.enqueue(TopicPartition(topic, partition), builders[partition].seal())
                    builders[partition] = BatchBuilder(LZ4, 512 * 1024)
                    builders[partition].append(*row)
            for partition, builder in enumerate(builders):
                await producer.enqueue(TopicPartition(topic, partition), builder.seal())
            await producer.flush()

    async def outputs(self, log: Log) -> int:
        partitions = [TopicPartition(f"{self.app_id}-out", number) for number in range(PARTITIONS)]
        return sum((await log.admin.end_offsets(partitions)).values())

    async def until_outputs(self, log: Log, more_than: int) -> None:
        async with asyncio.timeout(1200):
            while await self.outputs(log) <= more_than:  # noqa: ASYNC110 - the log has no event for it
                await asyncio.sleep(0.01)

    async def build(self, log: Log) -> dict[str, float]:
        """Let a worker build the table."""
        await self.fill(log)
        started_s = time.perf_counter()
        worker = self.start()
        await self.until_outputs(log, self.keys - 1)
        took_s = time.perf_counter() - started_s
        await asyncio.sleep(6)  # what waits for the store is written by then
        peak_mb = _peak_mb(worker)
        self.stop(worker)
        return {"build_s": round(took_s, 1), "peak_rss_mb": peak_mb}

    async def restart(self, log: Log) -> dict[str, float]:
        """Start a worker, send it a record, and wait for its output."""
        before = await self.outputs(log)
        started_s = time.perf_counter()
        worker = self.start()
        async with log.producer() as producer:
            builder = BatchBuilder(LZ4, 1024)
            key = b"user-0"
            builder.append(SystemClock().now_ms(), key, (1).to_bytes(8, "big"), [])
            partition = TopicPartition(f"{self.app_id}-in", partition_for(key, PARTITIONS))
            await producer.enqueue(partition, builder.seal())
        await self.until_outputs(log, before)
        first_s = time.perf_counter() - started_s
        async with asyncio.timeout(120):
            while sum(tasks for _, tasks, _ in self.restores()) < PARTITIONS:  # noqa: ASYNC110 - another process's log
                await asyncio.sleep(0.02)
        all_s = time.perf_counter() - started_s
        peak_mb, found = _peak_mb(worker), self.restores()
        self.stop(worker)
        records, seconds = sum(count for count, _, _ in found), max(took for _, _, took in found)
        return {
            "first_output_s": round(first_s, 2),
            "all_restored_s": round(all_s, 2),
            "records": records,
            "restore_s": seconds,
            "records_per_s": round(records / max(seconds, 0.1)),
            "peak_rss_mb": peak_mb,
        }

    def restores(self) -> list[tuple[int, int, float]]:
        """What was restored at once: records, tasks, seconds."""
        text = self.output.read_text(errors="replace")
        found = re.findall(r"restored (\d+) records in ([\d.]+) s \(\d+/s\): (.*)\n", text)
        return [(int(records), tasks.count(",") + 1, float(took)) for records, took, tasks in found]


def _peak_mb(worker: subprocess.Popen[bytes]) -> int:
    status = Path(f"/proc/{worker.pid}/status").read_text()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(peak) // 1024


async def measure(broker: str, keys: int) -> dict[str, object]:
    """Build, restart cleanly, restart wiped."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = broker or f"sqlite:///{folder / 'log.db'}"
        restart = Restart(folder, broker, keys)
        async with connect(broker, clock=SystemClock(), client_id="benchmark") as log:
            build = await restart.build(log)
            clean = await restart.restart(log)
            shutil.rmtree(folder / "data" / restart.app_id)
            wiped = await restart.restart(log)
        return {
            "broker": broker.split(":")[0],
            "keys": keys,
            "build": build,
            "clean": clean,
            "wiped": wiped,
        }


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="")
    parser.add_argument("--keys", type=int, default=1_000_000)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.broker, options.keys))))


if __name__ == "__main__":
    main()
