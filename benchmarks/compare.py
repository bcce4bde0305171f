"""Measure peers side by side on one broker, write the figures as JSON and print them as a table (see `run.sh`)."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import environments, latency, report, throughput, topics
from benchmarks.peers import PEERS, REFERENCE, Peer
from benchmarks.settings import HOST, ROOT, Settings, bench_home

BROKER_STOP_S = 20


def main() -> None:
    settings = Settings()
    names = _chosen(settings)
    for name in names:
        environments.prepare(name)
    with broker() as bootstrap:
        topic = f"orders-{settings.records}-{settings.keys}"
        topics.fill(bootstrap, topic, settings.records, settings.keys)
        runs = [
            _run(name, PEERS[name], bootstrap, topic, settings, number)
            for number in range(1, settings.rounds + 1)
            for name in names
        ]
    results = {"settings": asdict(settings), "machine": machine(), "runs": runs}
    print(report.table(results))
    write_results(f"{settings.mode}-{settings.records}", results)


def write_results(name: str, results: dict[str, Any]) -> None:
    """Keep the figures of a measurement."""
    path = bench_home() / "results" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nThe figures are in {path}", file=sys.stderr)


def _chosen(settings: Settings) -> list[str]:
    able = [name for name, peer in PEERS.items() if settings.mode in peer.modes]
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.sh",
        description="StreamFlow beside its peers on one real broker. The settings are in the environment; the first "
        "lines of the script explain them.",
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)} (default: all that can)")
    named = parser.parse_args().peers or able
    for name in named:
        if name not in PEERS:
            parser.error(f"{name} is none of {', '.join(PEERS)}")
        if name not in able:
            parser.error(f"{name} cannot do MODE={settings.mode}; those that can: {', '.join(able)}")
    return sorted(named, key=lambda name: name != REFERENCE)


@contextmanager
def broker() -> Iterator[str]:
    """The broker named by BOOTSTRAP, or one of our own while the block runs."""
    if named := os.environ.get("BOOTSTRAP"):
        yield named
        return
    print(f"Starting a broker on {HOST} ...", file=sys.stderr, flush=True)
    command = [str(ROOT / ".venv" / "bin" / "python"), "-m", "benchmarks.broker"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        bootstrap = process.stdout.readline().strip() if process.stdout else ""
        if not bootstrap:
            raise SystemExit("the broker did not start; its own words are above")
        yield bootstrap
    finally:
        process.terminate()
        try:
            process.wait(BROKER_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _run(name: str, peer: Peer, bootstrap: str, topic: str, settings: Settings, number: int) -> dict[str, Any]:
    print(f"Round {number} of {settings.rounds}: {peer.title} ...", file=sys.stderr, flush=True)
    measured = throughput.measure(peer, bootstrap, topic, settings)
    if measured.problem:
        print(f"{peer.title} ended by itself; its last words:\n{measured.problem}", file=sys.stderr, flush=True)
    delays = latency.measure(peer, bootstrap, settings) if settings.rate else None
    return {
        "peer": name,
        "round": number,
        "throughput": asdict(measured),
        "latency": asdict(delays) if delays else None,
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "streamflow_commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
