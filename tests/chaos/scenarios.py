"""What goes wrong, in which order, and in which surroundings: one run of the chaos suite, drawn from its seed."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from streamflow.log.kafka.log import KafkaLog
from tests.chaos.brokers import NODES, REPLICATED, Brokers
from tests.chaos.faults import ANYWHERE, BROKERS, CUT, ON_KAFKA, PARTLY_CUT, PLACES, REBALANCES, SCALING, GroupChaos
from tests.chaos.network import Network, networks
from tests.kafka.broker import Cluster
from tests.ports import free_port
from tests.system.harness import System

LogName: TypeAlias = Literal["kafka", "sqlite"]

SCENARIOS: Mapping[str, Sequence[str]] = {
    "scale": SCALING * 10,
    "kill": ("kill",) * 8,
    "pause": ("pause",) * 4,
    "cut": (*CUT, PARTLY_CUT) * 2,
    "brokers": BROKERS * 2,
    "restore": (REBALANCES[0],) * 6,
    "commit": (REBALANCES[1],) * 6,
    "stop": (REBALANCES[2],) * 6,
    "mixed": (*ANYWHERE, *ON_KAFKA) * 2,
}
"""By name: the kinds of faults. They are shuffled, but for scaling, which is up and down."""


@dataclass(frozen=True)
class Variant:
    """One cell of the matrix.

    Attributes:
        scenario: One of `SCENARIOS`.
        log: Where it runs.
        guarantee: `processing_guarantee`.
        standbys: `standby_replicas`.
        instance_ids: Whether the workers are static members.
    """

    scenario: str
    log: LogName
    guarantee: str = "exactly_once"
    standbys: int = 0
    instance_ids: bool = False

    def __str__(self) -> str:
        ids = "instance ids" if self.instance_ids else "no instance ids"
        return f"{self.scenario}, {self.log}, {self.guarantee}, {self.standbys} standbys, {ids}"

    def plan(self, seed: int) -> list[str]:
        """The faults in their order; empty where the log has none of them."""
        kinds = [kind for kind in SCENARIOS[self.scenario] if self.log == "kafka" or kind not in ON_KAFKA]
        if kinds and kinds[0] not in SCALING:
            random.Random(seed).shuffle(kinds)
            kinds = ["grow", *kinds, "shrink"]
        return kinds


@dataclass(frozen=True)
class Ran:
    """One run.

    Attributes:
        variant: What was run.
        seed: Its seed.
        records: How many were checked, one by one.
        seconds: How long the faults took.
        did: How often each happened.
        took_s: After each: seconds until all that was there was committed and the group had settled.
        repeated: Outputs that came more than once (at least once).
        most_rss_mib: Of any worker, after any fault.
    """

    variant: Variant
    seed: int
    records: int
    seconds: float
    did: Mapping[str, int]
    took_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
    repeated: int = 0
    most_rss_mib: float = 0


class Surroundings:
    """Where runs take place: three brokers and the ways to them, shared by all runs on Kafka.

    Args:
        folder: Everything is in here.
        cluster: None where all runs are on SQLite.
        networks: The workers' ways to it.
    """

    def __init__(self, folder: Path, cluster: Cluster | None, networks: Sequence[Network]) -> None:
        self._folder = folder
        self._cluster = cluster
        self._networks = networks

    @contextlib.asynccontextmanager
    async def run(self, variant: Variant, seed: int, *, patience_s: float) -> AsyncIterator[GroupChaos]:
        """A group of this variant; no worker is started yet."""
        folder = self._folder / f"{time.time_ns()}"
        folder.mkdir(parents=True)
        on_kafka = variant.log == "kafka"
        if on_kafka:
            assert self._cluster is not None
            address = f"kafka://{self._cluster.bootstrap}"
        else:
            address = f"sqlite:///{folder / 'log.db'}"
        async with System(folder, address) as system:
            brokers = None
            log = await system.log()
            if isinstance(log, KafkaLog) and self._cluster is not None:
                brokers = Brokers(self._cluster, log)
                await brokers.are_whole()
            yield GroupChaos(
                system,
                seed,
                variant.guarantee,
                networks=self._networks if on_kafka else (),
                brokers=brokers,
                standbys=variant.standbys,
                instance_ids=variant.instance_ids,
                patience_s=patience_s,
            )


@contextlib.asynccontextmanager
async def surroundings(folder: Path, *, on_kafka: bool) -> AsyncIterator[Surroundings]:
    """Start what runs need, and end it."""
    if not on_kafka:
        yield Surroundings(folder, None, ())
        return
    ports = {node: [free_port() for _ in range(PLACES)] for node in range(1, NODES + 1)}
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(folder / "brokers", nodes=NODES, config=REPLICATED, proxied_ports=ports))
        async with networks(cluster, ports) as ways:
            yield Surroundings(folder, cluster, ways)


async def run(
    where: Surroundings,
    variant: Variant,
    seed: int,
    *,
    per_s: int,
    plan: Sequence[str] | None = None,
    patience_s: float = 40,
    at_most_s: float = math.inf,
) -> Ran:
    """One run: a worker, a load, the faults one after another, and the check of every record.

    Args:
        where: The surroundings.
        variant: What to run.
        seed: Says which faults come when, to whom.
        per_s: Records a second.
        plan: The faults, instead of the scenario's.
        patience_s: How long everything may take after a fault.
        at_most_s: Faults that have not begun by then are left out, but for the last one.
    """
    kinds = list(plan if plan is not None else variant.plan(seed))
    print(f"{variant}; seed {seed}: {', '.join(kinds)}", flush=True)
    began_s = time.monotonic()
    async with where.run(variant, seed, patience_s=patience_s) as chaos:
        await chaos.begin(1)
        async with chaos.load(per_s=per_s):
            for number, kind in enumerate(kinds, 1):
                if number < len(kinds) and time.monotonic() - began_s > at_most_s:
                    print(f"{kind}: left out", flush=True)
                    continue
                await chaos.pass_time()
                await chaos.happen(kind)
        seconds = time.monotonic() - began_s
        verdict = await chaos.finish()
        repeated = sum(each.records for each in verdict.rewinds) + verdict.regrouped_repeats
        return Ran(variant, seed, verdict.total, seconds, chaos.did, chaos.took_s, repeated, chaos.most_rss_mib)
