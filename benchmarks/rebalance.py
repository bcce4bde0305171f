"""What a rebalance costs: 3 -> 4 -> 3 workers of a keyed sum under a steady load, a clean stop and a `kill -9`.

    MEASURE=rebalance make bench ARGS="streamflow kstreams faust"

For each change: the latency of outputs of partitions that stayed where they were, beside that of the steady state; the
longest silence of those that moved; the changelog records that were restored for it. At the end every worker is stopped
and started once, one after the other, and all outputs are counted. `run.sh` explains the settings (`STANDBYS=1` gives
each table partition a warm copy).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient

from benchmarks import environments
from benchmarks.compare import broker, machine, write_results
from benchmarks.peers import PEERS, Peer
from benchmarks.process import Program
from benchmarks.runs import Run
from benchmarks.settings import Settings
from benchmarks.steady_load import Answer, SteadyLoad

PARTITIONS = 12  # of which 3 and 4 workers have the same number each
WORKERS = 3
ABLE = ("streamflow", "kstreams", "faust")
TIMING = {"SESSION_MS": "10000", "HEARTBEAT_MS": "300"}
CALM_S = 3.0  # without a change, after which the group has settled, if each has its share
UNEVEN_CALM_S = 75.0  # the same with uneven shares: Kafka Streams looks every 60 s whether more can move
AFTER_S = 0.5  # of what comes then, which counts to the rebalance
LAST_OUTPUTS_S = 60
POLL_S = 0.1
RESTORED = re.compile(r"restored (\d+) records")

Owners = dict[int, str]


class Unsettled(Exception):
    """The workers did not come to share the work, each with its outputs."""


@dataclass(frozen=True)
class Delays:
    """Latencies of some partitions over some time, in milliseconds."""

    outputs: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Change:
    """What one change of the workers cost.

    Attributes:
        name: Which one.
        settled_s: Until the group had its new members, each with a share, and nothing changed any more.
        kept: Of the partitions that stayed; None where all moved.
        moved: How many moved.
        silence_s: The longest that a moved partition gave no output; None where none moved.
        restored: Changelog records that were read to restore state.
        load: Of the machine, at the end.
        shares: How many partitions each worker had then.
    """

    name: str
    settled_s: float
    kept: Delays | None
    moved: int
    silence_s: float | None
    restored: int
    load: float
    shares: list[int]


class Scenario:
    """One peer's workers under the load.

    Args:
        run: Its topics and names.
        load: The load, which runs.
        bootstrap: The broker.
        limit_s: How long a group may take to settle.
        stack: Ends the workers.
    """

    def __init__(self, run: Run, load: SteadyLoad, bootstrap: str, limit_s: float, stack: ExitStack) -> None:
        self._run = run
        self._load = load
        self._admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 4})
        self._limit_s = limit_s
        self._stack = stack
        self.workers: dict[int, Program] = {}

    def start(self, worker: int) -> None:
        self.workers[worker] = self._stack.enter_context(self._run.program(worker))

    def stop(self, worker: int) -> None:
        self.workers.pop(worker).stop()

    def kill_last(self) -> None:
        self.workers.pop(WORKERS).kill()

    def change(self, name: str, act: Callable[[], None]) -> Change:
        """Make a change and wait until all is calm again."""
        before, restored = self._owners(), self._restored()
        began_s = time.perf_counter()
        act()
        after, settled_s = self.settle(began_s)
        ended_s = time.perf_counter()
        time.sleep(1)
        kept = {partition for partition, owner in after.items() if before.get(partition) == owner}
        moved = after.keys() - kept
        return Change(
            name,
            settled_s - began_s,
            self.delays(kept, began_s, settled_s + AFTER_S) if kept else None,
            len(moved),
            max((self._silence_s(partition, began_s, ended_s) for partition in moved), default=None),
            self._restored() - restored,
            os.getloadavg()[0],
            sorted(Counter(after.values()).values()),
        )

    def settle(self, began_s: float) -> tuple[Owners, float]:
        """Wait until each worker has a share and nothing changes; the owners, and since when it was so."""
        deadline = time.perf_counter() + self._limit_s
        known: Owners = {}
        since_s = began_s
        while True:
            owners, now_s = self._owners(), time.perf_counter()
            if owners and owners != known:  # none while a round runs, after which nothing need have moved
                known, since_s = owners, now_s
            calm_s = CALM_S if self._is_even(owners) else UNEVEN_CALM_S
            if now_s - since_s > calm_s and self._is_shared(owners) and not self._load.silent_partitions(since_s):
                return owners, since_s
            if now_s > deadline:
                silent = self._load.silent_partitions(since_s)
                raise Unsettled(
                    f"the group did not settle in {self._limit_s:g} s: {len(self.workers)} workers run, the partitions "
                    f"of each member are {sorted(Counter(owners.values()).values())}, and {silent} give no output\n"
                    f"{self._last_words()}"
                )
            time.sleep(POLL_S)

    def _is_shared(self, owners: Owners) -> bool:
        return len(owners) == PARTITIONS and len(set(owners.values())) == len(self.workers)

    def _is_even(self, owners: Owners) -> bool:
        counts = Counter(owners.values()).values()
        return bool(counts) and max(counts) - min(counts) <= 1

    def _owners(self) -> Owners:
        """The member that has each partition; empty while the group does not say."""
        group_id = self._run.app_id
        try:
            group = self._admin.describe_consumer_groups([group_id])[group_id].result(10)
        except (KafkaException, TimeoutError):
            return {}
        if group.state != ConsumerGroupState.STABLE:
            return {}
        return {
            at.partition: member.member_id
            for member in group.members
            for at in member.assignment.topic_partitions
            if at.topic == self._run.source
        }

    def _last_words(self) -> str:
        return "\n".join(f"worker {number}: {each.log_tail()}" for number, each in self.workers.items())

    def _restored(self) -> int:
        logs = [log for number in range(WORKERS + 1) if (log := self._run.log(number)).exists()]
        return sum(int(count) for log in logs for count in RESTORED.findall(log.read_text(errors="replace")))

    def delays(self, partitions: set[int], began_s: float, ended_s: float) -> Delays:
        """Of the orders that were sent meanwhile."""
        latencies = sorted(
            each.latency_s for number in partitions for each in self._answers(number, began_s, ended_s)
        ) or [float("nan")]

        def quantile_ms(part: float) -> float:
            return latencies[min(len(latencies) - 1, int(len(latencies) * part))] * 1000

        return Delays(len(latencies), quantile_ms(0.5), quantile_ms(0.99), latencies[-1] * 1000)

    def _answers(self, partition: int, began_s: float, ended_s: float) -> list[Answer]:
        return [each for each in self._load.answers[partition] if began_s <= each.sent_s < ended_s]

    def _silence_s(self, partition: int, began_s: float, ended_s: float) -> float:
        answers = self._load.answers[partition]
        times = sorted(at for each in answers if began_s <= (at := each.sent_s + each.latency_s) < ended_s)
        return max(later - earlier for earlier, later in itertools.pairwise([began_s, *times]))


def _standbys() -> dict[str, str]:
    copies = os.environ.get("STANDBYS") or "0"
    return {"STANDBYS": copies, "STREAMFLOW_STANDBY_REPLICAS": copies}


def _changes(scenario: Scenario) -> list[tuple[str, Callable[[], None]]]:
    come = partial(scenario.start, WORKERS)
    changes = [
        ("a 4th worker joins", come),
        ("it is stopped cleanly", partial(scenario.stop, WORKERS)),
        ("it joins again", come),
        ("it is killed (kill -9)", scenario.kill_last),
    ]
    for worker in range(WORKERS):
        changes.append((f"worker {worker + 1} of 3 is stopped", partial(scenario.stop, worker)))
        changes.append(("and started again", partial(scenario.start, worker)))
    return changes


def measure(peer: Peer, bootstrap: str, settings: Settings) -> dict[str, Any]:
    """All changes, one after the other."""
    everyone = set(range(PARTITIONS))
    with (
        Run(peer, bootstrap, settings.mode, partitions=PARTITIONS, settings=TIMING | _standbys()) as run,
        ExitStack() as stack,
        SteadyLoad(bootstrap, run.source, run.out, min(settings.rate, peer.most_rate), PARTITIONS) as load,
    ):
        scenario = Scenario(run, load, bootstrap, settings.limit_s, stack)
        for worker in range(WORKERS):
            scenario.start(worker)
        scenario.settle(time.perf_counter())
        time.sleep(settings.latency_s)  # the JVM compiles
        began_s = time.perf_counter()
        time.sleep(settings.latency_s)
        steady = scenario.delays(everyone, began_s, time.perf_counter() - 1)
        changes: list[Change] = []
        doubled_by_kill, unsettled = 0, ""
        try:
            for name, act in _changes(scenario):
                changes.append(scenario.change(name, act))
                if act == scenario.kill_last:
                    doubled_by_kill = load.doubled
            load.end(LAST_OUTPUTS_S)
        except Unsettled as error:
            unsettled = str(error)
        return {
            "steady": asdict(steady),
            "changes": [asdict(change) for change in changes],
            "rate": load.rate,
            "sent": load.sent,
            "missing": load.missing,
            "doubled": load.doubled,
            "doubled_by_kill": doubled_by_kill,
            "unsettled": unsettled,
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="MEASURE=rebalance benchmarks/run.sh", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(ABLE)} (default: all)")
    named = parser.parse_args().peers or list(ABLE)
    for name in named:
        if name not in ABLE:
            parser.error(f"{name} is none of {', '.join(ABLE)}")
        environments.prepare(name)
    settings = Settings(mode=os.environ.get("MODE") or "table-eos", rate=int(os.environ.get("RATE") or 4000))
    results: dict[str, Any] = {}
    with broker() as bootstrap:
        for name in named:
            print(f"{PEERS[name].title} ...", file=sys.stderr, flush=True)
            try:
                results[name] = measure(PEERS[name], bootstrap, settings)
            except Unsettled as error:
                print(f"{PEERS[name].title}: {error}", file=sys.stderr, flush=True)
            else:
                print(_table(name, results[name]), end="\n\n", flush=True)
                print(results[name]["unsettled"], file=sys.stderr, flush=True)
    write_results("rebalance", {"settings": asdict(settings), "machine": machine(), "runs": results})


def _table(name: str, found: dict[str, Any]) -> str:
    steady = found["steady"]
    heading = (
        f"{PEERS[name].title}: {found['sent']:,} orders at {found['rate']:,}/s, {found['missing']:,} without an output "
        f"and {found['doubled']:,} outputs too many ({found['doubled_by_kill']:,} of them by the kill). "
        f"Steady: p50 {steady['p50_ms']:.0f}, p99 {steady['p99_ms']:.0f}, most {steady['max_ms']:.0f} ms."
    )
    lines = [
        heading,
        "",
        "| change | settled after s | kept: p50 ms | p99 | most | moved | silent for s | restored | shares | load |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for each in found["changes"]:
        kept = each["kept"]
        delays = ["-"] * 3 if kept is None else [f"{kept[key]:.0f}" for key in ("p50_ms", "p99_ms", "max_ms")]
        silent = "-" if each["silence_s"] is None else f"{each['silence_s']:.2f}"
        cells = [each["name"], f"{each['settled_s']:.1f}", *delays, str(each["moved"]), silent]
        cells += [f"{each['restored']:,}", " ".join(map(str, each["shares"])), f"{each['load']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if found["unsettled"]:
        lines += ["", f"Then it came to no rest: {found['unsettled'].splitlines()[0]}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
