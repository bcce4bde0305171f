"""What a soak has found: the verdict, and the figures as they stand in benchmarks/RESULTS.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.soak.watch import Sample, Watch

RSS_ROOM = 1.15
"""How much more memory the old worker may have in the last quarter than in the second: tasks come and go."""
WARM_S = 600
"""A shorter run says nothing about memory: the first quarter is too short to have met every kind of work."""
DESCRIPTOR_ROOM = 40
"""How many more open files: each task's store has some, and so has each connection."""
FILES_PER_STORE = 32
"""What a store may have on disk: files wait to be merged until a table has four; each open after a crash adds some."""
_ROWS = 9
_RIGHT = {
    "exactly_once": "every output, table and store is the fold of its input",
    "at_least_once": "nothing is missing, a fault repeats one commit interval at most, tables and stores are the fold",
}


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        log: Which log: kafka or sqlite.
        guarantee: `processing_guarantee`.
        seed: Of the run.
        seconds: How long the load and the faults lasted.
        records: Checked, record by record.
        did: How often each fault happened.
        repeated: Outputs that were there more than once.
        check_s: How long the check took.
        stores: How many stores there may be.
        wrong: What the oracle objected to; None: nothing.
    """

    log: str
    guarantee: str
    seed: int
    seconds: float
    records: int
    did: Mapping[str, int]
    repeated: int
    check_s: float
    stores: int
    wrong: str | None = None


def objections(outcome: Outcome, watch: Watch, least_rebalances: int) -> list[str]:
    """What must not be: an oracle that objects, memory or files that grow, a run that met too little."""
    found = [] if outcome.wrong is None else [f"oracle: {outcome.wrong}"]
    before, after = watch.quarters(lambda sample: sample.rss_mib[0])
    if outcome.seconds >= WARM_S and after > before * RSS_ROOM:
        found.append(f"memory of the old worker: {before} MiB in the second quarter, {after} in the last")
    before, after = watch.quarters(lambda sample: sample.descriptors[0])
    if after > before + DESCRIPTOR_ROOM:
        found.append(f"open files of the old worker: {before} in the second quarter, {after} in the last")
    _, files = watch.quarters(lambda sample: sample.store_files)
    if files > outcome.stores * FILES_PER_STORE:
        found.append(f"files of the stores: {files} for at most {outcome.stores} stores")
    if watch.samples and watch.samples[-1].rebalances < least_rebalances:
        found.append(f"{watch.samples[-1].rebalances} rebalances, and at least {least_rebalances} were wanted")
    return found


def report(outcome: Outcome, watch: Watch, found: Sequence[str]) -> str:
    """The figures as markdown."""
    samples = watch.samples
    facts: dict[str, Any] = {
        "log, guarantee": f"{outcome.log}, {outcome.guarantee}",
        "seconds under load and faults": f"{outcome.seconds:.0f}",
        "records": f"{outcome.records:,}",
        "rebalances (seen by worker 1)": samples[-1].rebalances if samples else 0,
        "workers killed (`kill -9`)": outcome.did.get("kill", 0),
        "workers stopped beyond session and transaction time-out (SIGSTOP)": outcome.did.get("pause", 0),
        "brokers killed and restarted": outcome.did.get("broker", 0),
        "workers taken for dead though nobody stopped them (a busy machine)": outcome.did.get("loss", 0),
        "outputs that came more than once": f"{outcome.repeated:,}",
        "memory of worker 1, most of 2nd and of last quarter": _both(watch, lambda sample: sample.rss_mib[0], " MiB"),
        "open files of worker 1, likewise": _both(watch, lambda sample: sample.descriptors[0]),
        "files of all stores, likewise": _both(watch, lambda sample: sample.store_files),
        "size of all stores, likewise": _both(watch, lambda sample: sample.store_mib, " MiB"),
        "load of the machine (2 cores: 2 is full), mean": f"{_mean([each.machine_load for each in samples]):.1f}",
        "check of every record afterwards": f"{outcome.check_s:.0f} s",
        "seed, Python": f"{outcome.seed}, {platform.python_version()}",
        "**verdict**": "**" + ("; ".join(found) or _RIGHT[outcome.guarantee]) + "**",
    }
    lines = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    return "\n".join([*lines, *_over_time(watch.spread(_ROWS)), ""])


def _over_time(samples: Sequence[Sample]) -> list[str]:
    """Worker 1 is never killed; the others are, so that their figures are those of young processes."""
    lines = [
        "| after s | records | rebalances | RSS MiB of workers 1, 2, 3 | open files | store files | stores MiB |",
        "|---:|---:|---:|---|---|---:|---:|",
    ]
    for each in samples:
        memory = ", ".join(f"{value:.0f}" for value in each.rss_mib)
        opened = ", ".join(str(value) for value in each.descriptors)
        lines.append(
            f"| {each.at_s:.0f} | {each.committed:,} | {each.rebalances} | {memory} | {opened} | {each.store_files} | "
            f"{each.store_mib:.0f} |"
        )
    return lines


def _both(watch: Watch, value: Any, unit: str = "") -> str:
    before, after = watch.quarters(value)
    return f"{before:g}, {after:g}{unit}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
