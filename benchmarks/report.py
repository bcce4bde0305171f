"""Figures as a Markdown table: `python -m benchmarks.report RESULTS.json...`; nothing is measured here.

Every cell is the median of the rounds, with the range where there were several.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import PEERS, REFERENCE

Runs = list[dict[str, Any]]
COLUMNS = (
    "peer",
    "records",
    "records/s",
    "CPU us/record",
    "x CPU",
    "CPU with start",
    "p50 ms",
    "p99 ms",
    "peak MB",
    "first output s",
)


def table(results: dict[str, Any]) -> str:
    """The table of one results file, with a line above it that says how it was measured."""
    by_peer: dict[str, Runs] = {}
    for run in results["runs"]:
        by_peer.setdefault(run["peer"], []).append(run)
    reference = _median(by_peer.get(REFERENCE, []), _cpu)
    lines = [_heading(results), "", _line(COLUMNS), _line(("---", *["---:"] * (len(COLUMNS) - 1)))]
    lines += [_line(_cells(name, runs, reference)) for name, runs in by_peer.items()]
    return "\n".join([*lines, "", *_remarks(by_peer)])


def _heading(results: dict[str, Any]) -> str:
    settings, machine = results["settings"], results["machine"]
    latency = f"latency at {settings['rate']:,}/s for {settings['latency_s']:g} s" if settings["rate"] else "no latency"
    return (
        f"`{settings['mode']}`: up to {settings['records']:,} records, {settings['keys']:,} keys, the first "
        f"{settings['skip']:.0%} left out as warm-up, {settings['rounds']} round(s), {latency}; "
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        f"StreamFlow at {machine['streamflow_commit']}, {machine['date']}."
    )


def _cells(name: str, runs: Runs, reference: float) -> tuple[str, ...]:
    cpu = _median(runs, _cpu)
    return (
        PEERS[name].title,
        _spread(runs, lambda run: run["throughput"]["measured"], ",.0f"),
        _spread(runs, lambda run: run["throughput"]["rate"], ",.0f"),
        _spread(runs, _cpu, ".2f"),
        f"{cpu / reference:.2f}" if reference and not math.isnan(cpu / reference) else "-",
        _spread(runs, lambda run: run["throughput"]["whole_cpu_us"], ".2f"),
        _spread(runs, lambda run: (run["latency"] or {}).get("p50_ms"), ".1f"),
        _spread(runs, lambda run: (run["latency"] or {}).get("p99_ms"), ".1f"),
        _spread(runs, lambda run: run["throughput"]["memory_mb"], ",.0f"),
        _spread(runs, lambda run: run["throughput"]["first_s"], ".1f"),
    )


def _remarks(by_peer: dict[str, Runs]) -> list[str]:
    """What stands below: who did not come to the end, lost results, or needs a word."""
    lines = [
        "`records` are those after the warm-up, as are their rate and CPU time.",
        "`x CPU` is the CPU time per record divided by StreamFlow's.",
        "`CPU with start` is per record over the whole run, start and warm-up included.",
        "",
    ]
    for name, runs in by_peer.items():
        if any(not run["throughput"]["complete"] for run in runs):
            lines.append(f"- {PEERS[name].title} did not come to the end within the limit; its rate is of what it did.")
        if lost := [run for run in runs if run["latency"] and run["latency"]["received"] < run["latency"]["sent"]]:
            received = min(run["latency"]["received"] for run in lost)
            lines.append(f"- {PEERS[name].title}: only {received:,} of {lost[0]['latency']['sent']:,} results came.")
        if any(_cpu(run) is None for run in runs):
            lines.append(f"- {PEERS[name].title}: too short a run to tell its CPU time per record.")
        if PEERS[name].note:
            lines.append(f"- {PEERS[name].title}: {PEERS[name].note}.")
    return lines


def _cpu(run: dict[str, Any]) -> Any:
    return run["throughput"]["cpu_us"]


def _median(runs: Runs, value: Callable[[dict[str, Any]], Any]) -> float:
    values = [float(found) for run in runs if (found := value(run)) is not None]
    return median(values) if values else float("nan")


def _spread(runs: Runs, value: Callable[[dict[str, Any]], Any], form: str) -> str:
    values = [float(found) for run in runs if (found := value(run)) is not None]
    if not values:
        return "-"
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for named in sys.argv[1:] or sys.exit(__doc__):
        print(table(json.loads(Path(named).read_text())), end="\n\n")
