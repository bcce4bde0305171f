"""Three workers and a load, and what goes wrong with them: `kill -9`, SIGSTOP, a broker that dies and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from streamflow.error_groups import one_error
from streamflow.model.record import TopicPartition
from tests.kafka.broker import Broker
from tests.oracle.app import BODY, OUTPUTS
from tests.oracle.checks import Oracle, Rewind, Verdict
from tests.oracle.links import Links
from tests.oracle.load import Load
from tests.system.harness import STOPPED, System, Worker, until

SESSION_S = 2.0
TRANSACTION_TIMEOUT_S = 3.0
PAUSE_S = max(SESSION_S, TRANSACTION_TIMEOUT_S) + 1.5


@dataclass
class Fault:
    """What was known when something went wrong; of each partition, in records of the input.

    Attributes:
        kind: What it was.
        committed: Committed shortly before.
        made: In the outputs shortly after it, or after the zombie's end.
    """

    kind: str
    committed: dict[int, int]
    made: dict[tuple[str, int], int] = field(default_factory=dict)


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
    ) -> None:
        print(f"seed {seed}")
        self.system = system
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
        self.faults: list[Fault] = []
        self.did: Counter[str] = Counter()

    # --- the run -----------------------------------------------------------------------------------------------

    async def begin(self, workers: int = 3) -> None:
        """Write the app, make its source, start the workers."""
        system = self.system
        system.write_app(
            BODY,
            session_timeout_ms=round(SESSION_S * 1000),
            processing_guarantee=self.guarantee,
            partitions=self.partitions,
        )
        if system.is_kafka:
            self._set_options()
        await system.create("numbers", partitions=self.partitions)
        self.workers = [self._start(number) for number in range(workers)]
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

    def _start(self, number: int) -> Worker:
        if number or self._links is None:
            return self.system.start()
        return self.system.start(SERVERS=self._links.servers)

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
        print(f"{dict(self.did)}: {self.sent} records, {repeats(verdict.rewinds)} repeated")
        return verdict

    # --- what goes wrong ---------------------------------------------------------------------------------------

    async def pass_time(self) -> None:
        """Let work go on, so that the next fault comes at any point of it."""
        await asyncio.sleep(self.dice.uniform(0.3, 1.5))

    async def happen(self, kind: str) -> None:
        """One fault, and the work that goes on after it."""
        self.did[kind] += 1
        self.faults.append(Fault(kind, await self.system.committed("numbers")))
        own = {"kill": self._kill, "pause": self._pause, "broker": self._lose_broker}
        if kind in own:
            await own[kind]()
        else:
            assert self._links is not None
            await self._links.happen(kind)
        await self._goes_on()
        self.faults[-1].made = await self._made()

    async def _kill(self) -> None:
        number = self.dice.randrange(self._spared, len(self.workers))
        self._check_run()
        self.workers[number].kill()
        self.workers[number] = self._start(number)

    async def _pause(self) -> None:
        worker = self.dice.choice(self.workers)
        self._check_run()
        worker.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(PAUSE_S)
        finally:
            worker.signal(signal.SIGCONT)

    async def _lose_broker(self) -> None:
        assert self._broker is not None
        await asyncio.to_thread(self._broker.kill)
        await asyncio.sleep(self.dice.uniform(0, 1))
        await asyncio.to_thread(self._broker.start)

    async def _goes_on(self) -> None:
        """Every partition is committed for again: nothing hangs."""
        ends = await self._ends()
        left = ends

        async def caught_up() -> bool:
            nonlocal left
            self._check_run()
            committed = await self.system.committed("numbers")
            left = {partition: end for partition, end in ends.items() if committed.get(partition, 0) < end}
            return not left

        told = self.system.told
        await until(caught_up, lambda: f"commits up to {left} after {self.faults[-1].kind}: {told()}", self._patience_s)

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
    return sum(each.reached - each.back_to for each in rewinds)
