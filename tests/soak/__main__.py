"""`make soak`: the oracle's workers for half an hour and ten million records, under faults all the time.

Prints a line of JSON every few seconds, and at the end the figures as markdown. One worker is never killed, so that
there is one in which something could pile up; it is stopped (SIGSTOP) like the others, gets and gives away tasks with
every fault, and loses its broker. Memory and files that grow make the run fail, as does anything that is not the fold
of its input. What failed is kept: logs of the workers, stores, the log itself. `--chaos`: see `matrix.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.kafka.broker import Broker
from tests.oracle.chaos import Chaos, repeats
from tests.oracle.load import Load
from tests.soak.matrix import add_options, run_matrix
from tests.soak.report import Outcome, objections, report
from tests.soak.watch import Watch
from tests.system.harness import System

SAMPLE_S = 5.0
WORKERS, SPARED, SUB_TOPOLOGIES = 3, 1, 2
FEEDING_SHARE = 0.95
"""Of the time: what a fault holds up may be written late."""
AHEAD_S = 10
"""No more than is written in that time waits for workers: on a machine that is busy a run takes longer."""
PATIENCE = 1.5
"""After so many times its time a run that is not done has failed."""
PATIENCE_S = 120
"""How long after a fault what is there by then may take: whatever else runs on the machine slows it down, too."""
BROKER = {"log.segment.bytes": str(64 << 20)}
"""A broker that was killed reads its open segments again before it answers."""
REPORT = Path(".cache/soak.md")


class Soak:
    """One run.

    Args:
        chaos: The workers and what happens to them.
        arguments: The command's.
        broker: Whether there is a broker to kill.
    """

    def __init__(self, chaos: Chaos, arguments: argparse.Namespace, *, broker: bool) -> None:
        self._chaos = chaos
        self._arguments = arguments
        self._faults = ["kill"] * 6 + ["pause"] + (["broker"] if broker else [])
        self.watch = Watch(chaos, lambda line: print(line, flush=True))

    async def run(self) -> Outcome:
        """All of it."""
        chaos, arguments = self._chaos, self._arguments
        await chaos.begin(WORKERS)
        self.watch = Watch(chaos, lambda line: print(line, flush=True))
        sampling = asyncio.create_task(self._sample())
        wrong: str | None = None
        repeated = 0
        try:
            per_s = max(1, round(arguments.records / (arguments.seconds * FEEDING_SHARE)))
            ahead = per_s * AHEAD_S
            async with chaos.load(
                per_s=per_s,
                total=arguments.records,
                is_far_ahead=lambda: chaos.sent - self.watch.committed > ahead,
            ) as load:
                await self._go_wrong(load, sampling)
        finally:
            sampling.cancel()
        seconds = self.watch.elapsed_s
        began_s = time.monotonic()
        try:
            verdict = await chaos.finish()
            repeated = repeats(verdict.rewinds) + verdict.regrouped_repeats
        except AssertionError as error:
            wrong = str(error)
            print(f"the oracle objects: {wrong}", flush=True)
        return Outcome(
            log=arguments.log,
            guarantee=arguments.guarantee,
            seed=arguments.seed,
            seconds=seconds,
            records=chaos.sent,
            did=chaos.did,
            repeated=repeated,
            check_s=time.monotonic() - began_s,
            stores=WORKERS * SUB_TOPOLOGIES * arguments.partitions,
            wrong=wrong,
        )

    async def _go_wrong(self, load: Load, sampling: asyncio.Task[None]) -> None:
        chaos, arguments = self._chaos, self._arguments
        while not (load.is_done and self.watch.elapsed_s >= arguments.seconds):
            await asyncio.sleep(chaos.dice.uniform(0.5, 1.5) * arguments.every)
            await chaos.happen(chaos.dice.choice(self._faults))
            if sampling.done():
                await sampling
            late = f"{load.sent} of {arguments.records} records after {self.watch.elapsed_s:.0f} s"
            assert self.watch.elapsed_s < arguments.seconds * PATIENCE, late
        await self.watch.look()

    async def _sample(self) -> None:
        while True:
            await self.watch.look()
            await asyncio.sleep(SAMPLE_S)


async def soak(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """One run and its report; what is wrong."""
    with ExitStack() as stack:
        broker = None
        address = f"sqlite:///{folder / 'log.db'}"
        if arguments.log == "kafka":
            broker = stack.enter_context(Broker(folder / "broker", config=BROKER))
            address = f"kafka://{broker.bootstrap}"
        async with System(folder, address) as system:
            chaos = Chaos(
                system,
                arguments.seed,
                arguments.guarantee,
                partitions=arguments.partitions,
                broker=broker,
                spared=SPARED,
                patience_s=PATIENCE_S,
            )
            run = Soak(chaos, arguments, broker=broker is not None)
            outcome = await run.run()
    found = objections(outcome, run.watch, arguments.rebalances)
    text = report(outcome, run.watch, found)
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(text)
    print(text, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak ARGS=...", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--rebalances", type=int, default=100, help="fewer than that are too few")
    parser.add_argument("--log", choices=["kafka", "sqlite"], default="kafka")
    parser.add_argument("--guarantee", choices=["exactly_once", "at_least_once"], default="exactly_once")
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults, about")
    parser.add_argument("--folder", type=Path, help="where everything is (default: a new one); kept if the run fails")
    parser.add_argument("--report", type=Path, default=REPORT, help=f"where the figures go (default: {REPORT})")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    add_options(parser)
    arguments = parser.parse_args()
    folder: Path = arguments.folder or Path(tempfile.mkdtemp(prefix="streamflow-soak-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"everything is in {folder}", flush=True)
    work = run_matrix if arguments.chaos else soak
    if found := asyncio.run(work(arguments, folder)):
        raise SystemExit("; ".join(found) + f"\nall of it is kept in {folder}")
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
