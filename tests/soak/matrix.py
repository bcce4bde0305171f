"""`make soak CHAOS=...`: the chaos suite's scenarios, one after another, in every surrounding that is asked for.

Prints what each does as it does it, and at the end the figures as markdown. A run is its seed's: `CHAOS=kill
ARGS="--seed 7 --logs kafka --standbys 1 --instance-ids no"` does the same faults in the same order again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from tests.chaos.scenarios import SCENARIOS, LogName, Ran, Variant, run, surroundings

PATIENCE_S = 120
"""How long after a fault what is there by then may take: whatever else runs on the machine slows it down, too."""
ALL = "all"
COLUMNS = (
    *("scenario", "log", "guarantee", "standbys", "instance ids"),
    *("faults", "records", "repeated", "seconds", "RSS MiB, most", "settled after"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the matrix: each is a list, and all that go together are run."""
    parser.add_argument("--chaos", metavar="NAMES", help=f"scenarios to run: {ALL}, or some of {','.join(SCENARIOS)}")
    parser.add_argument("--logs", default="kafka,sqlite", help="of the matrix (default: %(default)s)")
    parser.add_argument("--guarantees", default="exactly_once", help="of the matrix (default: %(default)s)")
    parser.add_argument("--standbys", default="0,1", help="standby_replicas of the matrix (default: %(default)s)")
    parser.add_argument("--instance-ids", default="no,yes", help="of the matrix (default: %(default)s)")
    parser.add_argument("--per-s", type=int, default=600, help="records a second in the matrix")
    text = (
        "seconds after which a run of the matrix begins no fault any more and is checked (default: all of its faults)"
    )
    parser.add_argument("--at-most", type=float, default=math.inf, metavar="SECONDS", help=text)


def variants(arguments: argparse.Namespace) -> Iterator[Variant]:
    """What is asked for."""
    names = list(SCENARIOS) if arguments.chaos == ALL else _list(arguments.chaos)
    if unknown := set(names) - set(SCENARIOS):
        raise SystemExit(f"CHAOS={arguments.chaos}: {sorted(unknown)} are none of {ALL}, {', '.join(SCENARIOS)}")
    cells = itertools.product(
        names,
        _list(arguments.logs),
        _list(arguments.guarantees),
        _list(arguments.standbys),
        _list(arguments.instance_ids),
    )
    for name, log, guarantee, standbys, ids in cells:
        variant = Variant(name, cast(LogName, log), guarantee, int(standbys), ids == "yes")
        if variant.plan(arguments.seed):
            yield variant


async def run_matrix(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """All of it, and its report; what is wrong. What has failed does not keep the rest from being run."""
    wanted = list(variants(arguments))
    ran: list[Ran] = []
    found: list[str] = []
    began_s = time.monotonic()
    async with surroundings(folder, on_kafka=any(each.log == "kafka" for each in wanted)) as where:
        for number, variant in enumerate(wanted, 1):
            print(f"--- {number} of {len(wanted)}, after {time.monotonic() - began_s:.0f} s", flush=True)
            try:
                seed, per_s, at_most_s = arguments.seed, arguments.per_s, arguments.at_most
                ran.append(await run(where, variant, seed, per_s=per_s, patience_s=PATIENCE_S, at_most_s=at_most_s))
            except Exception as error:  # also of a broker, and of what reads the log
                traceback.print_exc()
                reason = (str(error) or repr(error)).splitlines()[0]
                found.append(f"{variant}, seed {arguments.seed}: {reason[:200]}")
                print(f"FAILED: {found[-1]}", flush=True)
    text = report(ran, found, arguments.seed)
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(text)
    print(text, flush=True)
    return found


def report(ran: Sequence[Ran], found: Sequence[str], seed: int) -> str:
    """The figures as markdown."""
    lines = [
        f"Seed {seed}, Python {platform.python_version()}: {len(ran)} runs without objection, {len(found)} with.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in ran:
        variant = each.variant
        took_s = [seconds for of_kind in each.took_s.values() for seconds in of_kind]
        ids = "yes" if variant.instance_ids else "no"
        lines.append(
            f"| {variant.scenario} | {variant.log} | {variant.guarantee} | {variant.standbys} | {ids} "
            f"| {len(took_s)} | {each.records:,} | {each.repeated:,} | {each.seconds:.0f} "
            f"| {each.most_rss_mib:.0f} | {_spread(took_s)} |"
        )
    return "\n".join([*lines, "", *_by_kind(ran), "", *(f"- **{each}**" for each in found), ""])


def _by_kind(ran: Sequence[Ran]) -> Iterator[str]:
    yield "| fault | log | times | settled after |"
    yield "|---|---|---:|---:|"
    by_kind: dict[tuple[str, str], list[float]] = {}
    for each in ran:
        for kind, took_s in each.took_s.items():
            by_kind.setdefault((kind, each.variant.log), []).extend(took_s)
    for (kind, log), took_s in sorted(by_kind.items()):
        yield f"| {kind} | {log} | {len(took_s)} | {_spread(took_s)} |"


def _spread(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.1f} s, most {max(seconds):.1f} s"


def _list(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]
