"""One machine, one and two processes of a worker (`--processes N`): records per second, CPU, memory of each process.

    MEASURE=processes make bench

Three kinds of work: `map` (little of it, so that the broker is half of the machine's load), `table-eos`, and `busy`:
100 us of Python per record, which is what more processes are for. `run.sh` explains the settings.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import Any

from benchmarks import throughput, topics
from benchmarks.compare import broker, machine, write_results
from benchmarks.peers import PEERS, Peer, streamflow
from benchmarks.settings import Settings

WORKS = {"map": 1_000_000, "table-eos": 1_000_000, "busy": 100_000}
PROCESSES = (1, 2)


def _peer(processes: int) -> Peer:
    return replace(PEERS["streamflow"], command=lambda: [*streamflow(), "--processes", str(processes)])


def main() -> None:
    argparse.ArgumentParser(prog="MEASURE=processes benchmarks/run.sh", description=__doc__).parse_args()
    runs: list[dict[str, Any]] = []
    print("| work | processes | records/s | CPU us/record | peak MB, all | MB of each, the supervisor first |")
    print("|---|---:|---:|---:|---:|---|", flush=True)
    with broker() as bootstrap:
        for work, records in WORKS.items():
            settings = Settings(mode=work, records=records, skip=0.3)
            topic = f"orders-{settings.records}-{settings.keys}"
            topics.fill(bootstrap, topic, settings.records, settings.keys)
            for processes in PROCESSES:
                print(f"{work} in {processes} process(es) ...", file=sys.stderr, flush=True)
                found = throughput.measure(_peer(processes), bootstrap, topic, settings)
                if found.problem:
                    raise SystemExit(f"it ended by itself; its last words:\n{found.problem}")
                runs.append({"work": work, "processes": processes, **asdict(found)})
                print(_row(runs[-1]), flush=True)
    write_results("processes", {"machine": machine(), "runs": runs})


def _row(run: dict[str, Any]) -> str:
    rate, cpu = (format(run[key] or float("nan"), form) for key, form in (("rate", ",.0f"), ("cpu_us", ".2f")))
    each = ", ".join(f"{mb:.0f}" for mb in run["memory_each_mb"])
    return f"| {run['work']} | {run['processes']} | {rate} | {cpu} | {run['memory_mb']:.0f} | {each} |"


if __name__ == "__main__":
    main()
