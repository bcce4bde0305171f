"""The `map` work on the embedded SQLite log: records per second and CPU time per record through one worker process.

    .venv/bin/python -m benchmarks.sqlite_map             N=1000000 KEYS=100000 ROUNDS=1 MODE=map, from the environment

Two logs are filled with the same orders, a small and a large one, and a worker with `--until-end` runs through each.
What it needs to start and to stop is the same for both, so the difference of the two runs is the work on the records
between them. Nothing is left out beyond that: reading, decoding, the agent, encoding, writing and committing all count.
"""

import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

import streamflow as sf
from benchmarks.settings import APPS, FIRST_TIMESTAMP_MS, PARTITIONS, ROOT, Settings

STREAMFLOW = ROOT / ".venv" / "bin" / "streamflow"
APP = APPS / "streamflow_app.py"
OUT = "results"
SMALL = 100_000
AT_ONCE = 5_000
TIMEOUT_S = 600


@dataclass(frozen=True)
class Cost:
    """What one worker took, from its start to its end."""

    elapsed_s: float
    cpu_s: float
    memory_mb: float


class Order(msgspec.Struct):
    order_id: int
    user: str
    amount: float
    country: str
    ts: int


async def fill(broker: str, data_dir: str, records: int, keys: int) -> None:
    """The same orders as on Kafka."""
    app = sf.App("fill", broker=broker, data_dir=data_dir)
    orders = app.topic("orders", key_type=str, value_type=Order, partitions=PARTITIONS, retention_s=10 * 365 * 86_400)
    chance = random.Random(7)
    async with app.client() as client:
        for start in range(0, records, AT_ONCE):
            sends = []
            for number in range(start, min(start + AT_ONCE, records)):
                user, at = f"user-{chance.randrange(keys)}", FIRST_TIMESTAMP_MS + number
                amount, country = round(chance.random() * 100, 2), chance.choice(("DE", "KR", "US"))
                sends.append(client.send(orders, key=user, value=Order(number, user, amount, country, at)))
            await asyncio.gather(*sends)


def work(environment: dict[str, str]) -> Cost:
    """Run a worker on all that is there."""
    command = [str(STREAMFLOW), "worker", str(APP), "--until-end"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S, stderr=subprocess.DEVNULL)
    elapsed_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(elapsed_s, cpu_s, after.ru_maxrss / 1024)


def written(environment: dict[str, str]) -> int:
    """How many records the output topic has."""
    command = [str(STREAMFLOW), "topics", str(APP), "--json"]
    told = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    out = next(topic for line in told.stdout.splitlines() if (topic := json.loads(line))["topic"] == OUT)
    return sum(partition["end_offset"] - partition["start_offset"] for partition in out["partitions"])


def measure(records: int, settings: Settings) -> Cost:
    """Fill a fresh log, work through it, and see that every record has its result."""
    with tempfile.TemporaryDirectory(prefix="streamflow-bench-") as scratch:
        broker = f"sqlite:///{Path(scratch) / 'log.db'}"
        asyncio.run(fill(broker, scratch, records, settings.keys))
        named = {"BROKER": broker, "IN": "orders", "OUT": OUT, "APPID": "bench", "DATADIR": scratch}
        environment = {"STREAMFLOW_PROCESSING_GUARANTEE": "exactly_once", **os.environ, **named, "MODE": settings.mode}
        cost = work(environment)
        if (results := written(environment)) != records:
            sys.exit(f"{records:,} records gave {results:,} results")
        return cost


def main() -> None:
    settings = Settings()
    records = settings.records if os.environ.get("N") else 1_000_000
    if records <= SMALL:
        sys.exit(f"N={records}: more than {SMALL} records are needed")
    rates, costs = [], []
    for number in range(1, settings.rounds + 1):
        small, large = measure(SMALL, settings), measure(records, settings)
        between = records - SMALL
        rates.append(between / (large.elapsed_s - small.elapsed_s))
        costs.append((large.cpu_s - small.cpu_s) / between * 1e6)
        print(
            f"round {number}: {SMALL:,} records in {small.elapsed_s:.2f} s, {records:,} in {large.elapsed_s:.2f} s: "
            f"{rates[-1]:,.0f} records/s, {costs[-1]:.2f} us CPU per record, peak {large.memory_mb:.0f} MB",
            flush=True,
        )
    print(f"median of {settings.rounds}: {median(rates):,.0f} records/s, {median(costs):.2f} us CPU per record")


if __name__ == "__main__":
    main()
