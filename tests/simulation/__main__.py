"""`python -m tests.simulation`: many seeds, or one with everything that happens."""

import argparse
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from time import perf_counter

from tests.simulation.plan import Plan
from tests.simulation.planted import BUGS, likely_first, planted
from tests.simulation.run import Verdict, simulate


def main() -> int:
    """Returns the exit code: 1 when a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one, and show what happens")
    parser.add_argument("--first", type=int, default=0, help="the first of many")
    parser.add_argument("--count", type=int, default=200, help="how many")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--digests", action="store_true", help="print the digest of each run")
    parser.add_argument("--planted", choices=sorted(BUGS), help="with this bug, until it is found")
    given = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is chance as well
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    if given.seed is not None:
        return _show(given.seed)
    seeds = range(given.first, given.first + given.count)
    if given.planted is not None:
        with planted(given.planted):
            return _many(likely_first(given.planted, seeds), digests=False, stop=True)
    return _many(seeds, digests=given.digests) if given.jobs == 1 else _in_parts(seeds, given.jobs)


def _show(seed: int) -> int:
    plan = Plan.of(seed)
    print(plan)
    verdict = simulate(plan, print)
    if verdict.broken is not None:
        traceback.print_exception(verdict.broken)
    print(_told(verdict))
    return int(verdict.broken is not None)


def _many(seeds: Sequence[int], *, digests: bool, stop: bool = False) -> int:
    started_s, failed, kills, starts, number = perf_counter(), [], 0, 0, 0
    settled_s, anew = 0.0, Counter[str]()
    for number, verdict in enumerate((simulate(Plan.of(seed)) for seed in seeds), start=1):
        kills += verdict.kills
        starts += verdict.starts
        settled_s, anew = max(settled_s, verdict.settled_s), anew + verdict.opened_anew
        if digests:
            print(verdict.plan.seed, verdict.digest)
        if verdict.broken is not None:
            failed.append(verdict.plan.seed)
            print(f"{_told(verdict)}\n  {verdict.broken}\n  again: make simulate SEED={verdict.plan.seed}", flush=True)
            if stop:
                break
        if number % 500 == 0:
            print(f"{number} of {len(seeds)} in {perf_counter() - started_s:.0f} s", file=sys.stderr, flush=True)
    print(
        f"{number} simulations in {perf_counter() - started_s:.1f} s, {starts} workers started, {kills} killed; "
        f"at rest within {settled_s:.1f} virtual s; opened anew: {dict(sorted(anew.items()))}: "
        + (f"{len(failed)} failed: {failed}" if failed else "all as it must be")
    )
    return int(bool(failed))


def _in_parts(seeds: range, jobs: int) -> int:
    """Several processes, a part of the seeds each; each says itself how it went."""
    size = -(-len(seeds) // jobs)
    parts = [seeds[at : at + size] for at in range(0, len(seeds), size)]
    command = [sys.executable, "-m", "tests.simulation"]
    children = [subprocess.Popen([*command, "--first", str(part.start), "--count", str(len(part))]) for part in parts]
    try:
        return max([child.wait() for child in children])
    finally:
        for child in children:
            child.terminate()
            child.wait()


def _told(verdict: Verdict) -> str:
    plan, word = verdict.plan, "as it must be" if verdict.broken is None else "BROKEN"
    return (
        f"seed {plan.seed}: {word}; {plan.guarantee}, {', '.join(work.kind for work in plan.works)}, "
        f"{verdict.starts} workers started, {verdict.kills} killed, {verdict.seconds:.1f} virtual s, "
        f"{verdict.digest[:12]}"
    )


if __name__ == "__main__":
    sys.exit(main())
