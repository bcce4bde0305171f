"""What happens to a group of workers that comes and goes: to its processes, its ways to the brokers, the brokers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from streamflow.model.record import TopicPartition
from streamflow.state.slots import claim
from tests.chaos.brokers import Brokers
from tests.chaos.network import Network
from tests.chaos.ownership import check_held_once, holdings, unsettled
from tests.kafka.proxy import BOTH, Direction
from tests.oracle.chaos import PAUSE_S, SESSION_S, Chaos
from tests.oracle.checks import Verdict
from tests.oracle.links import END_TXN, TXN_OFFSET_COMMIT
from tests.system.harness import STOPPED, System, Worker, until

MOST = 4
NEWCOMER = MOST
"""The place of who comes only so that there is a rebalance."""
PLACES = MOST + 1
TOPICS = 2
"""That are read: the source, and the one behind `group_by`."""
OFFSET_COMMIT = 8
STOPS_WITHIN_S = 25.0

CUT: Mapping[str, tuple[Direction, ...]] = {
    "no requests arrive": ("requests",),
    "no answers arrive": ("answers",),
    "nothing arrives": BOTH,
}
"""Between one worker and all brokers, for longer than its session."""
PARTLY_CUT = "one broker is not reached"
BROKERS = ("leader killed", "group coordinator killed", "transaction coordinator killed")
ON_KAFKA = (*CUT, PARTLY_CUT, *BROKERS)
REBALANCES = ("rebalance while restoring", "rebalance while committing", "rebalance while stopping")
SCALING = ("grow", "shrink")
ANYWHERE = ("kill", "pause", *REBALANCES)


class GroupChaos(Chaos):
    """One run with up to four workers.

    Args:
        system: The app's surroundings.
        seed: Of the load, and of what goes wrong when.
        guarantee: `processing_guarantee`.
        networks: Of each worker's place; none without brokers.
        brokers: The cluster; None on SQLite.
        standbys: `standby_replicas`.
        instance_ids: Whether each place has an `instance_id`.
        patience_s: How long everything may take to be committed after a fault, and the group to settle.
    """

    def __init__(
        self,
        system: System,
        seed: int,
        guarantee: str,
        *,
        networks: Sequence[Network] = (),
        brokers: Brokers | None = None,
        standbys: int = 0,
        instance_ids: bool = False,
        partitions: int = 6,
        patience_s: float = 40,
    ) -> None:
        super().__init__(
            system,
            seed,
            guarantee,
            partitions=partitions,
            kafka={"request_timeout_ms": 3000},
            patience_s=patience_s,
        )
        self._networks = networks
        self._brokers = brokers
        self._standbys = standbys
        self._has_instance_ids = instance_ids
        self._began_s = _time_of_day()
        self._killed_s: dict[Worker, float] = {}
        self.took_s: dict[str, list[float]] = {}
        """By kind of fault: from its end until all that was there was committed and the group had settled."""
        self.most_rss_mib = 0.0
        """Of any worker, looked at when the group had settled."""

    def _environment(self, place: int) -> dict[str, str]:
        given = {"STREAMFLOW_STANDBY_REPLICAS": str(self._standbys)}
        if self._networks:
            given["SERVERS"] = self._networks[place].servers
        if self._has_instance_ids:
            given["STREAMFLOW_INSTANCE_ID"] = f"place-{place}"
        return given

    # --- the run -----------------------------------------------------------------------------------------------

    async def _goes_on(self, kind: str) -> None:
        began_s = time.monotonic()
        await super()._goes_on(kind)
        await self._settles(kind)
        took_s = time.monotonic() - began_s
        self.took_s.setdefault(kind, []).append(took_s)
        self.most_rss_mib = max(self.most_rss_mib, *(worker.rss_mib for worker in self.workers))
        print(f"{kind}: all is committed and the group has settled after {took_s:.1f} s", flush=True)

    async def _settles(self, why: str) -> None:
        left = ""

        async def has_settled() -> bool:
            nonlocal left
            self._check_run()
            left = await unsettled(self.workers, TOPICS, self.partitions)
            return not left

        await until(
            has_settled, lambda: f"the group settled after {why}: {left}; {self.system.told()}", self._patience_s
        )

    async def finish(self) -> Verdict:
        """Let everything be processed, and check it, and that nobody was given what another one had."""
        verdict = await super().finish()
        found = [
            each
            for number, worker in enumerate(self.system.workers)
            for each in holdings(
                f"worker {number}",
                worker.said_as_errors,
                since_s=self._began_s,
                killed_s=self._killed_s.get(worker),
            )
        ]
        held = check_held_once(found)
        assert held >= TOPICS * self.partitions, f"only {held} assignments were found in what the workers say"
        print(f"{held} times a partition was held by a worker, by one at a time", flush=True)
        return verdict

    def _repeats(self, kind: str) -> int:
        """A cut or stopped one may send late, its successor begins again; workers that come and stop repeat nothing."""
        return 0 if kind in SCALING else 3

    # --- what goes wrong ---------------------------------------------------------------------------------------

    async def _inflict(self, kind: str, committed: dict[int, int]) -> None:
        if kind in CUT:
            await self._cut(CUT[kind], None)
        elif kind in BROKERS:
            await self._lose(kind)
        else:
            await {
                "grow": self._grow,
                "shrink": self._shrink,
                "kill": self._kill_one,
                "pause": self._pause_one,
                PARTLY_CUT: self._cut_partly,
                "rebalance while restoring": self._rebalance_while_restoring,
                "rebalance while committing": self._rebalance_while_committing,
                "rebalance while stopping": self._rebalance_while_stopping,
            }[kind]()

    def _tell(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def _draw(self) -> Worker:
        self._check_run()
        worker = self.dice.choice(self.workers)
        self._tell(f"worker {self.system.workers.index(worker)} (place {self.place[worker]})")
        return worker

    def _kill_now(self, worker: Worker) -> None:
        self._killed_s[worker] = _time_of_day()
        worker.kill()

    def _replace(self, worker: Worker) -> Worker:
        """Start another one in its place."""
        self.workers[self.workers.index(worker)] = started = self.start(self.place[worker])
        return started

    async def _grow(self) -> None:
        """To four workers, which come at once or one after another; each gets something to do."""
        taken = {self.place[worker] for worker in self.workers}
        for place in sorted(set(range(MOST)) - taken):
            self.workers.append(self.start(place))
            await asyncio.sleep(self.dice.choice([0.0, self.dice.uniform(0, 1)]))
        # Work of either kind: each sub-topology is spread over all.
        sources = [self.system.topic("numbers"), self.system.topic("by-digit-repartition")]

        async def all_work() -> bool:
            self._check_run()
            await self._settles("growing")
            return all([await worker.owned(source) for worker in self.workers for source in sources])

        await until(all_work, lambda: f"work for each of four; {self.system.told()}", self._patience_s)

    async def _shrink(self) -> None:
        """To one worker; the others are stopped in order, at once or one after another."""
        while len(self.workers) > 1:
            leaving = self._draw()
            self.workers.remove(leaving)
            leaving.signal(signal.SIGTERM)
            if self.dice.random() < 0.5:
                await self._has_stopped(leaving)
        for worker in self.system.workers:
            if worker.runs and worker not in self.workers:
                await self._has_stopped(worker)

    async def _has_stopped(self, worker: Worker) -> None:
        assert await worker.ends(STOPS_WITHIN_S) == STOPPED, worker.said

    async def _kill_one(self) -> None:
        worker = self._draw()
        self._kill_now(worker)
        await asyncio.sleep(self.dice.choice([0.0, SESSION_S * 1.5]))
        self._replace(worker)

    async def _pause_one(self) -> None:
        worker = self._draw()
        worker.signal(signal.SIGSTOP)
        self._paused[worker] += 1
        try:
            await asyncio.sleep(PAUSE_S)
        finally:
            worker.signal(signal.SIGCONT)

    # --- connections -------------------------------------------------------------------------------------------

    async def _cut(self, directions: tuple[Direction, ...], nodes: Sequence[int] | None) -> None:
        worker = self._draw()
        network = self._networks[self.place[worker]]
        self._paused[worker] += 1
        network.hold(directions, nodes)
        try:
            await asyncio.sleep(PAUSE_S)
        finally:
            network.release()

    async def _cut_partly(self) -> None:
        """A broker that all others reach: the group's coordinator, or the leader of what is read."""
        assert self._brokers is not None
        if self.dice.random() < 0.5:
            node = await self._brokers.coordinator_of("group", self.system.app_id)
        else:
            node = await self._brokers.leader_of(self._source())
        directions = self.dice.choice([*CUT.values()])
        self._tell(f"node {node}, {' and '.join(directions)}")
        await self._cut(directions, [node])

    # --- brokers -----------------------------------------------------------------------------------------------

    def _source(self) -> TopicPartition:
        return TopicPartition(self.system.topic("numbers"), self.dice.randrange(self.partitions))

    async def _lose(self, kind: str) -> None:
        brokers = self._brokers
        assert brokers is not None
        if kind == "leader killed":
            node = await brokers.leader_of(self._source())
        elif kind == "group coordinator killed":
            node = await brokers.coordinator_of("group", self.system.app_id)
        else:
            slot = self.dice.choice(sorted(self._slots().glob("*/.id")))
            node = await brokers.coordinator_of("transaction", f"{self.system.app_id}-{slot.read_text().strip()}")
        stays_away = self.dice.random() < 0.7
        self._tell(f"node {node}, {'until work goes on without it' if stays_away else 'and comes back at once'}")
        await brokers.kill(node)
        if stays_away:
            began_s = time.monotonic()
            await super()._goes_on(f"{kind}, and two brokers")
            self._tell(f"all is committed with two brokers after {time.monotonic() - began_s:.1f} s")
        await brokers.are_whole()

    # --- rebalances at a bad moment ----------------------------------------------------------------------------

    def _slots(self) -> Path:
        return self.system.folder / "data" / self.system.app_id

    async def _rebalance_while_restoring(self) -> None:
        """A worker without local state has its first tasks and stands still while another one joins; or dies there."""
        worker = self._draw()
        self._kill_now(worker)
        forget_free_slots(self.system.folder / "data", self.system.app_id)
        worker = self._replace(worker)
        await worker.says(r"assigned: ", within_s=self._patience_s)
        worker.signal(signal.SIGSTOP)
        stopped_s = _time_of_day()
        restores = "restored " not in worker.said
        self.did["stopped in a restore"] += restores
        self._tell("it restores" if restores else "it has restored already")
        dies = self.dice.random() < 0.3
        async with self._newcomer():
            if dies:
                self._tell("it dies")
                self._killed_s[worker] = stopped_s  # it did nothing any more since then
                worker.kill()
            else:
                worker.signal(signal.SIGCONT)
            await self.pass_time()
        if dies:
            self._replace(worker)

    async def _rebalance_while_committing(self) -> None:
        """A commit stands still while another worker joins and gets tasks of him who commits."""
        if self._networks:
            worker = self._draw()
            keys = {self.dice.choice([TXN_OFFSET_COMMIT, END_TXN])}
            if self.guarantee == "at_least_once":
                keys = {OFFSET_COMMIT}
            async with self._newcomer():
                with self._networks[self.place[worker]].holding_next(keys) as came:
                    await until(came.is_set, f"a request {keys}", self._patience_s)
                    await asyncio.sleep(self.dice.uniform(0.2, 1.5))
        else:
            async with self._newcomer():
                await asyncio.to_thread(lock_file, self.system.folder / "log.db", self.dice.uniform(0.2, 1.0))

    async def _rebalance_while_stopping(self) -> None:
        """One worker is told to stop while another one joins; perhaps a third one dies at the same time."""
        leaving = self._draw()
        others = [worker for worker in self.workers if worker is not leaving]
        dying = self.dice.choice(others) if len(others) > 1 and self.dice.random() < 0.5 else None
        async with self._newcomer():
            leaving.signal(signal.SIGTERM)
            if dying is not None:
                self._tell(f"worker {self.system.workers.index(dying)} dies")
                self._kill_now(dying)
            self.workers.remove(leaving)
            await self._has_stopped(leaving)
        if dying is not None:
            self._replace(dying)
        self.workers.append(self.start(self.place[leaving]))

    @contextlib.asynccontextmanager
    async def _newcomer(self) -> AsyncIterator[Worker]:
        """A worker that is about to join when the block begins, and is told to stop when it ends."""
        worker = self.start(NEWCOMER)
        await worker.says(r"web +http", within_s=self._patience_s)
        yield worker
        await worker.stops(STOPS_WITHIN_S)
        assert worker.process.returncode == STOPPED, worker.said


def forget_free_slots(data_dir: Path, app_id: str) -> None:
    """Delete the stores in all slots that nobody works in."""
    free = []
    known = set((data_dir / app_id).iterdir())
    try:
        while True:
            free.append(claim(str(data_dir), app_id))
            if Path(free[-1].path) not in known:
                break
            for path in Path(free[-1].path).iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
    finally:
        for slot in free:
            slot.release()


def lock_file(path: Path, seconds: float) -> None:
    """Keep everybody from writing to a SQLite file."""
    with contextlib.closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as sql:
        sql.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        sql.execute("ROLLBACK")


def _time_of_day() -> float:
    """As in log lines: local."""
    now = time.time()
    local = time.localtime(now)
    return local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec + now % 1
