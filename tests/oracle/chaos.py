"""Three workers and a load, and what goes wrong with them: `kill -9`, SIGSTOP, a broker that dies and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping

import anyio

from streamflow.error_groups import one_error
from streamflow.errors import RetriableError
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit_mark import CommitMark
from tests.kafka.broker import Broker
from tests.oracle.app import BODY, OUTPUTS
from tests.oracle.checks import Oracle, Verdict
from tests.oracle.links import Links
from tests.oracle.load import Load
from tests.oracle.repeats import Rewind, Tail, Window, check_repeats, check_tail
from tests.oracle.stacks import TELL_STACKS, telling_stacks
from tests.system.harness import STOPPED, System, Worker, until

SESSION_S = 2.0
TRANSACTION_TIMEOUT_S = 3.0
PAUSE_S = max(SESSION_S, TRANSACTION_TIMEOUT_S) + 1.5


class Chaos:
    """One run.

    Args:
        system: The app's surroundings.
        seed: Of the load, and of what goes wrong when.
        guarantee: `processing_guarantee`.
        partitions: Of the source.
        broker: A broker of the run's own, to be killed.
        spared: How many workers are never killed, so that there is one that grows old.
        kafka: Options of `sf.Kafka` for the workers.
        links: The connections of the first worker, to be cut.
        patience_s: How long everything may take to be committed after a fault.
        standby_replicas: See the setting.
    """

    def __init__(
        self,
        system: System,
        seed: int,
        guarantee: str,
        *,
        partitions: int = 4,
        broker: Broker | None = None,
        spared: int = 0,
        kafka: Mapping[str, object] | None = None,
        links: Links | None = None,
        patience_s: float = 40,
        standby_replicas: int = 0,
    ) -> None:
        print(f"seed {seed}")
        self.system = system
        self._standby_replicas = standby_replicas
        self.guarantee = guarantee
        self.partitions = partitions
        self.dice = random.Random(seed)
        self._load_dice = random.Random(seed + 1)
        self._broker = broker
        self._spared = spared
        self._kafka = {"transaction_timeout_ms": round(TRANSACTION_TIMEOUT_S * 1000), **(kafka or {})}
        self._links = links
        self._patience_s = patience_s
        self._load: Load | None = None
        self.workers: list[Worker] = []
        self.place: dict[Worker, int] = {}
        # What may be repeated, and the changelogs as they were left.
        self.windows: list[Window] = []
        self.tails: list[Tail] = []
        self.did: Counter[str] = Counter()
        # How often workers were taken for dead that were not stopped, and where the input was committed to before.
        self._lost: Counter[Worker] = Counter()
        self._before: dict[int, int] = {}
        self._paused: Counter[Worker] = Counter()

    # --- the run -----------------------------------------------------------------------------------------------

    async def begin(self, workers: int = 3) -> None:
        """Write the app, make its source, start the workers."""
        system = self.system
        system.write_app(
            TELL_STACKS + BODY,
            session_timeout_ms=round(SESSION_S * 1000),
            processing_guarantee=self.guarantee,
            partitions=self.partitions,
            standby_replicas=self._standby_replicas,
        )
        if system.is_kafka:
            self._set_options()
        await system.create("numbers", partitions=self.partitions)
        self.workers = [self.start(place) for place in range(workers)]
        for worker in self.workers:
            await worker.ready()

    def _set_options(self) -> None:
        path = self.system.folder / "app.py"
        server = self.system.broker.removeprefix("kafka://")
        options = "".join(f", {name}={value!r}" for name, value in self._kafka.items())
        before = path.read_text()
        after = before.replace(
            f"broker={self.system.broker!r}", f"broker=sf.Kafka(servers=os.environ.get('SERVERS', {server!r}){options})"
        )
        assert after != before
        path.write_text(after)

    def start(self, place: int) -> Worker:
        """Start a worker: who is started in a place has the connections of who was there before."""
        worker = self.system.start(**self._environment(place))
        self.place[worker] = place
        return worker

    def _environment(self, place: int) -> dict[str, str]:
        return {} if place or self._links is None else {"SERVERS": self._links.servers}

    @property
    def sent(self) -> int:
        """How many records the input has."""
        return 0 if self._load is None else self._load.sent

    @contextlib.asynccontextmanager
    async def load(
        self, *, per_s: int, total: int | None = None, is_far_ahead: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[Load]:
        """Write records while the block runs, or until there are as many as there are to be."""
        load = self._load = Load(
            await self.system.log(),
            self.system.topic("numbers"),
            self.partitions,
            self._load_dice,
            per_s=per_s,
            total=total,
            is_far_ahead=is_far_ahead,
        )
        stop = asyncio.Event()
        with one_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(load.run(stop))
                try:
                    yield load
                finally:
                    stop.set()

    async def finish(self) -> Verdict:
        """Let everything be processed, and check it."""
        with telling_stacks(self.system.workers):
            return await self._finish()

    async def _finish(self) -> Verdict:
        system = self.system
        await system.has_committed("numbers", self.sent, within_s=60)
        for worker in self.workers:
            assert await (await worker.ready()).stops() == STOPPED, worker.said
        last = system.start("--until-end")
        assert await last.ends(60) == STOPPED, last.said
        for worker in system.workers:
            assert "Traceback" not in worker.said, worker.said
        exactly = self.guarantee == "exactly_once"
        log = await system.log()
        oracle = Oracle(log, system.app_id, system.topic, self.partitions, exactly=exactly)
        verdict = await oracle.check(system.folder / "data")
        assert verdict.total == self.sent
        if not exactly:
            await self._note_losses(await self.system.committed("numbers"))
            check_repeats(verdict.rewinds, self.windows)
            for tail in self.tails:
                await check_tail(log, tail)
            for window in self.windows:
                print(f"{window.why}: {window.repeated} repeated")
        print(f"{dict(self.did)}: {self.sent} records, {repeats(verdict.rewinds)} repeated")
        return verdict

    # --- what goes wrong ---------------------------------------------------------------------------------------

    async def pass_time(self) -> None:
        """Let work go on, so that the next fault comes at any point of it."""
        await asyncio.sleep(self.dice.uniform(0.3, 1.5))

    async def happen(self, kind: str) -> None:
        """One fault, and the work that goes on after it."""
        self.did[kind] += 1
        with telling_stacks(self.system.workers):
            committed = await self.system.committed("numbers")
            await self._inflict(kind, committed)
            await self._goes_on(kind)
            if times := self._repeats(kind):
                self.windows.append(Window(kind, committed, await self._made(), times))
            await self._note_losses(committed)

    async def _inflict(self, kind: str, committed: dict[int, int]) -> None:
        own = {"kill": self._kill, "pause": self._pause, "broker": self._lose_broker}
        if kind in own:
            await own[kind](committed)
        else:
            assert self._links is not None
            await self._links.happen(kind)

    def _repeats(self, kind: str) -> int:
        """How often records are repeated, at most, that were under way when it happened; 0 where it is looked at."""
        return 1 if kind == "broker" else 0

    async def _note_losses(self, committed: dict[int, int]) -> None:
        """A machine that is busy elsewhere may not let a worker run for a session: that is a fault, too."""
        before, self._before = self._before, committed
        losses = self._losses()
        if losses != self._lost:
            self._lost = losses
            self.did["loss"] += 1
            self.windows.append(Window("loss", before, await self._made()))

    def _losses(self) -> Counter[Worker]:
        return Counter({each: max(0, each.said.count("lost: ") - self._paused[each]) for each in self.system.workers})

    async def _kill(self, committed: dict[int, int]) -> None:
        number = self.dice.randrange(self._spared, len(self.workers))
        self._check_run()
        self.workers[number].kill()
        if self.guarantee == "at_least_once":
            committed = await self._left_by(time.monotonic()) or committed
            await asyncio.sleep(SESSION_S / 4)  # what was on its way arrives
            self.windows.append(Window("kill", committed, await self._made()))
        self.workers[number] = self.start(self.place[self.workers[number]])

    async def _pause(self, committed: dict[int, int]) -> None:
        worker = self.dice.choice(self.workers)
        self._check_run()
        worker.signal(signal.SIGSTOP)
        self._paused[worker] += 1
        try:
            committed = await self._left_by(time.monotonic()) or committed
            had = await self._ends()  # it may have taken that, and not sent
            await asyncio.sleep(PAUSE_S)
            later = await self.system.committed("numbers")
        finally:
            worker.signal(signal.SIGCONT)
        made = {(self.system.topic(name), partition): end for name in OUTPUTS for partition, end in had.items()}
        self.windows.append(Window("takeover from who is stopped, and what that one sends later", committed, made, 2))
        with anyio.move_on_after(SESSION_S):  # it says nothing where it had no partitions
            await until(lambda: self._has_heard(worker), "it hears that it was taken for dead", self._patience_s)
        # What it has sent when it woke up is noticed by a commit, and the first one may have been begun before.
        for _ in range(2):
            await self._goes_on("pause")
        self.windows.append(Window("who took over begins again", later, await self._made()))

    def _has_heard(self, worker: Worker) -> bool:
        return worker.said.count("lost: ") >= self._paused[worker]

    async def _left_by(self, since_s: float) -> dict[int, int] | None:
        """What is committed now that a worker has come to its end, or stands still; None where others may have it."""
        log = await self.system.log()
        names = [(name, number) for name in ("sums", "extremes") for number in range(self.partitions)]
        changelogs = {each: TopicPartition(f"{self.system.app_id}-{each[0]}-changelog", each[1]) for each in names}
        ends = await log.admin.high_watermarks(list(changelogs.values()))
        marks = await log.admin.group_offsets(self.system.app_id)
        if time.monotonic() - since_s > SESSION_S / 2:
            return None
        for (name, number), changelog in changelogs.items():
            mark = CommitMark.of(marks.get(TopicPartition(self.system.topic("numbers"), number)))
            if mark.changelogs is not None:
                seals = 2 if self.did["pause"] else 1
                self.tails.append(Tail(changelog, mark.changelogs.get(name, 0), ends[changelog], seals))
        return {tp.partition: mark.offset for tp, mark in marks.items() if tp.topic == self.system.topic("numbers")}

    async def _lose_broker(self, committed: dict[int, int]) -> None:
        assert self._broker is not None
        await asyncio.to_thread(self._broker.kill)
        await asyncio.sleep(self.dice.uniform(0, 1))
        await asyncio.to_thread(self._broker.start)

    async def _goes_on(self, kind: str) -> None:
        """Every partition is committed for again: nothing hangs."""
        left = ends = await self._ends()

        async def caught_up() -> bool:
            nonlocal left
            self._check_run()
            with contextlib.suppress(RetriableError):  # brokers may be away
                committed = await self.system.committed("numbers")
                left = {partition: end for partition, end in ends.items() if committed.get(partition, 0) < end}
            return not left

        told = self.system.told
        await until(caught_up, lambda: f"commits up to {left} after {kind}: {told()}", self._patience_s)

    async def _ends(self) -> dict[int, int]:
        log = await self.system.log()
        ends = await log.admin.end_offsets(await self.system.partitions("numbers"))
        return {tp.partition: end for tp, end in ends.items()}

    def _check_run(self) -> None:
        for worker in self.workers:
            assert worker.runs, f"it ended by itself:\n{worker.said}"

    async def _made(self) -> dict[tuple[str, int], int]:
        log = await self.system.log()
        tps = [TopicPartition(self.system.topic(name), number) for name in OUTPUTS for number in range(self.partitions)]
        ends = await log.admin.end_offsets(tps)
        return {(tp.topic, tp.partition): end for tp, end in ends.items()}


def repeats(rewinds: list[Rewind]) -> int:
    return sum(each.records for each in rewinds)
