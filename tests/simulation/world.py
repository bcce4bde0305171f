"""One run: a log, processes that come, go, are killed and stopped, and what is checked while they run."""

import asyncio
import hashlib
import logging
import random
import sys
import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import anyio.to_thread

from streamflow.clock import Clock
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.log.api import Assigned, Log, Membership, NewTopic, OffsetMark
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import COMPRESSIONS
from streamflow.log.connect import connect
from streamflow.log.sqlite.database import MemoryDatabase
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition
from streamflow.runtime import commit_mark, task_tables
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.worker import Worker
from streamflow.state.slots import Slot
from streamflow.state.store import Stores
from tests.simulation.apps import APP_ID, Built, Work, build, key_of
from tests.simulation.faults import Rates, Wire
from tests.simulation.log import FaultyLog
from tests.simulation.processes import Process, ProcessLoop, current
from tests.simulation.stores import FaultyStores, Seat

SESSION_S = 1.5
START_MS = 1_700_000_000_000


class Broken(AssertionError):
    """A promise was not kept."""


class LoopClock(Clock):
    """The loop's time."""

    def __init__(self, loop: ProcessLoop) -> None:
        self._loop = loop

    def now_ms(self) -> int:
        return START_MS + round(self._loop.time() * 1000)

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


@dataclass(frozen=True)
class Plan:
    """What a seed stands for."""

    seed: int
    guarantee: str
    works: tuple[Work, ...]
    partitions: int
    workers: int
    records: int
    poison: float
    horizon_s: float
    kills: int
    stops: int
    restarts: float
    """Joins, clean stops, fences and wiped disks: how many a second."""
    commit_interval_ms: int
    store_every_s: float
    rates: Rates
    keys: int
    """Few, that are written over and over, or so many that most are written once."""
    is_one_away: bool = False
    """Whether `World.send_away` does what it is for."""

    @classmethod
    def of(cls, seed: int) -> "Plan":
        draw = random.Random(f"plan {seed}")
        shares = draw.random() < 0.5
        works = [
            Work.drawn(draw, number, "numbers" if shares else f"numbers-{number}")
            for number in range(draw.choice([1, 1, 2]))
        ]
        plan = cls(
            seed,
            draw.choice(["exactly_once", "exactly_once", "at_least_once"]),
            tuple(works),
            partitions=draw.choice([1, 2, 3]),
            workers=draw.choice([1, 2, 2, 3]),
            records=draw.choice([10, 40, 80]),
            poison=draw.choice([0.0, 0.05]),
            horizon_s=draw.choice([3.0, 6.0]),
            kills=draw.choice([0, 1, 3]),
            stops=draw.choice([0, 1, 3]),
            restarts=draw.choice([0.0, 0.2, 0.6]),
            commit_interval_ms=draw.choice([20, 100, 400]),
            store_every_s=draw.choice([0.1, 0.5, 5.0]),
            rates=Rates.drawn(draw),
            keys=draw.choice([5, 60]),
        )
        return plan.away() if draw.random() < 0.2 else plan

    def away(self) -> "Plan":
        """The same, where a worker is stopped until others have its work, and hears late of what is its own again."""
        return replace(
            self,
            workers=max(2, self.workers),
            horizon_s=6.0,
            rates=replace(self.rates, late_loss=1.0),
            is_one_away=True,
        )


class SimulatedWorker(Worker):
    """The worker itself, with its network and its disk."""

    def __init__(self, built: Built, seat: Seat, wire: Wire, clock: Clock) -> None:
        self._seat = seat
        self._wire = wire
        super().__init__(built.app, built.app.settings({}), clock=clock)

    def _connect(self) -> Log:
        return FaultyLog(super()._connect(), self._wire)

    async def _claim_slot(self, stack: Any) -> Slot | None:
        return self._seat  # type: ignore[return-value]

    def _open_stores(self, slot: Slot | None) -> Stores:
        return FaultyStores(self._seat, self._wire)


class Running:
    """A worker in a process."""

    def __init__(self, world: "World", seat: Seat, number: int) -> None:
        self.seat = seat
        self.process = Process(f"w{number}@{seat.id}")
        self.built = build(world.plan.works, world.plan.partitions, world.plan.keys, world.settings)
        self.error: BaseException | None = None
        self.worker: SimulatedWorker | None = None
        self._world = world
        self.task = world.loop.create_task(self._run(), context=self.process.context())

    async def _run(self) -> None:
        world = self._world
        try:
            self.worker = SimulatedWorker(self.built, self.seat, Wire(world, self.process), world.clock)
            await self.worker.run()
        except Exception as error:
            self.error = error
            world.trace(f"{self.process.name} ends with {error!r}")


class World:
    """Everything of one run."""

    def __init__(self, plan: Plan, loop: ProcessLoop, out: Callable[[str], object] | None = None) -> None:
        self.plan = plan
        self.loop = loop
        self.clock = LoopClock(loop)
        self.draw = random.Random(f"run {plan.seed}")
        self.rates = plan.rates
        self.faulty = False
        self.kills_left, self.stops_left = plan.kills, plan.stops
        self.running: list[Running] = []
        self.all: list[Running] = []
        self.fenced: set[str] = set()
        self.late: dict[str, list[Callable[[], Awaitable[object]]]] = {}
        self.under_way: set[asyncio.Task[object]] = set()
        self._hash = hashlib.sha256()
        self._out = out
        self._offsets: dict[TopicPartition, int] = {}
        self._times: dict[tuple[TopicPartition, str], int] = {}
        self._owners: dict[tuple[TopicPartition, int], str] = {}
        self._address = f"memory://simulation-{plan.seed}"
        self.settings: dict[str, Any] = {
            "broker": self._address,
            "processing_guarantee": plan.guarantee,
            "partitions": plan.partitions,
            "commit_interval_ms": plan.commit_interval_ms,
            "session_timeout_ms": round(SESSION_S * 1000),
            "heartbeat_interval_ms": 300,
            "rebalance_timeout_ms": 4000,
            "web": False,
        }

    # --- what everybody tells ----------------------------------------------------------------------------------

    def trace(self, text: str) -> None:
        line = f"{self.loop.time():9.4f} {text}"
        self._hash.update(line.encode())
        if self._out is not None:
            self._out(line)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def committed(self, process: Process, offsets: Mapping[TopicPartition, OffsetMark], by: Membership) -> None:
        """Offsets were committed."""
        told = ", ".join(f"{tp}:{mark.offset}" for tp, mark in sorted(offsets.items()))
        self.trace(f"{process.name} has committed {told} as {by.member_id[-4:]}/{by.generation}")
        for tp, mark in offsets.items():
            if mark.offset < self._offsets.get(tp, -1):
                raise Broken(f"the committed offset of {tp} fell from {self._offsets[tp]} to {mark.offset}")
            self._offsets[tp] = mark.offset
            for table, time_ms in CommitMark.of(mark).times.items():
                if time_ms < self._times.get((tp, table), time_ms):
                    raise Broken(f"stream time of {table} with {tp} fell to {time_ms}")
                self._times[tp, table] = time_ms

    def assigned(self, process: Process, event: Assigned) -> None:
        """A partition has one owner in a generation."""
        for tp in event.partitions:
            if self._owners.setdefault((tp, event.generation), process.name) != process.name:
                raise Broken(f"{tp} was given to two members in generation {event.generation}")

    def may_be_purged(self, before: Mapping[TopicPartition, int]) -> None:
        for tp, offset in before.items():
            if offset > self._offsets.get(tp, 0):
                raise Broken(f"{tp} would be purged up to {offset}, and is committed up to {self._offsets.get(tp)}")

    def arrived(self, message: "asyncio.Task[object]") -> None:
        self.under_way.discard(message)
        if not message.cancelled() and isinstance(error := message.exception(), Broken):
            self.breaks = self.breaks or error

    breaks: BaseException | None = None

    async def settle_late(self, transactional_id: str) -> None:
        """What an earlier holder of the id had sent arrives now, or never."""
        for store in self.late.pop(transactional_id, []):
            if self.draw.random() < 0.5:
                try:
                    await store()
                    self.trace(f"a late commit of {transactional_id} was stored")
                except StreamFlowError as error:
                    self.trace(f"a late commit of {transactional_id} was refused: {type(error).__name__}")

    # --- what happens to processes -----------------------------------------------------------------------------

    def start(self, seat: Seat) -> Running:
        running = Running(self, seat, len(self.all))
        self.trace(f"{running.process.name} starts")
        self.running.append(running)
        self.all.append(running)
        return running

    def new_seat(self) -> Seat:
        """On a machine that nothing has run on."""
        self.seats += 1
        return Seat(self.seats)

    seats = 0

    def _of(self, process: Process) -> Running:
        return next(each for each in self.running if each.process is process)

    def kill(self, process: Process, where: str) -> None:
        """SIGKILL: nothing of it runs again, and the kernel closes its files."""
        if not self.kills_left or not any(each.process is process for each in self.running):
            return
        self.kills_left -= 1
        self.trace(f"{process.name} is killed at {where}")
        process.state = "dead"
        running = self._of(process)
        self.running.remove(running)
        if running.worker is not None:
            _close_files(running.worker)
        seat = self.new_seat() if self.draw.random() < 0.2 else running.seat  # another machine
        self.loop.run_as_nobody(self._start_after(self.draw.uniform(0.1, 3.0), seat))

    async def _start_after(self, seconds: float, seat: Seat) -> None:
        await asyncio.sleep(seconds)
        if not self.is_over:
            self._start_where_free(seat)

    def _start_where_free(self, seat: Seat) -> None:
        """Who was fenced and asked to stop is started again by either, once."""
        if all(each.seat is not seat or each.task.done() for each in self.running):
            self.start(seat)

    is_over = False

    def stop(self, process: Process, where: str) -> None:
        """SIGSTOP, and SIGCONT before or after its session is over."""
        if not self.stops_left or process.state != "running":
            return
        self.stops_left -= 1
        self._stop_for(process, self.draw.choice([0.5, 1.2, 2.0, 4.0]) * SESSION_S, where)

    def _stop_for(self, process: Process, seconds: float, where: str) -> None:
        self.trace(f"{process.name} is stopped for {seconds:g} s at {where}")
        process.state = "stopped"
        self.loop.run_as_nobody(self._go_on_after(process, seconds))

    async def _go_on_after(self, process: Process, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if process.state == "stopped":
            self.trace(f"{process.name} goes on")
            self.loop.let_run(process)

    async def upset(self, log: Log) -> None:
        """Have workers join, leave and be fenced until the horizon."""
        while self.faulty and self.plan.restarts:
            await asyncio.sleep(self.draw.expovariate(self.plan.restarts))
            live = [each for each in self.running if each.process.state == "running"]
            what = self.draw.choice(["join", "leave", "leave", "fence"])
            if not self.faulty or self.is_over or not live:
                continue
            chosen = self.draw.choice(live)
            if what == "join" and len(self.running) < 4:
                self.start(self.new_seat())
            elif what == "leave" and chosen.worker is not None:
                self.trace(f"{chosen.process.name} is asked to stop")
                chosen.worker.request_stop()
                self.loop.run_as_nobody(self._start_when_ended(chosen))
            elif what == "fence" and self.plan.guarantee == "exactly_once":
                self.trace(f"{chosen.process.name} is fenced")
                self.fenced.add(chosen.process.name)
                async with log.transactional_producer(f"{APP_ID}-{chosen.seat.id}"):
                    pass

    async def send_away(self) -> None:
        """Stop a worker until others have its work, and let these leave when it is back: all of it is its own again.

        If it has not heard by then that it was lost, it still has its tasks as they were.
        """
        await asyncio.sleep(self.draw.uniform(0.2, 1.2))
        live = [each for each in self.running if each.process.state == "running"]
        if not self.plan.is_one_away or len(live) < 2:
            return
        chosen = self.draw.choice(live)
        if self.draw.random() < 0.5:
            self.next_away = chosen.process
            await asyncio.sleep(1.0)
        if self.back_s == 0.0:
            self.go_away(chosen.process, "a moment")
        await asyncio.sleep(max(0.0, self.back_s - self.loop.time()) + self.draw.uniform(0.0, 0.5))
        for each in self.running:
            if each is not chosen and each.worker is not None and not self.is_over:
                self.trace(f"{each.process.name} is asked to stop")
                each.worker.request_stop()
                self.loop.run_as_nobody(self._start_when_ended(each))

    next_away: Process | None = None
    """Who goes away at the next point of a commit."""
    back_s = 0.0
    """When it goes on, in seconds of the loop; 0 before it has gone."""

    def go_away(self, process: Process, where: str) -> None:
        """Stop a process for longer than its session."""
        self.next_away = None
        if process.state == "running":
            seconds = self.draw.uniform(1.5, 2.2) * SESSION_S
            self.back_s = self.loop.time() + seconds
            self._stop_for(process, seconds, where)

    async def _start_when_ended(self, running: Running) -> None:
        await asyncio.wait([running.task])
        await self._start_after(self.draw.uniform(0.0, 1.0), running.seat)

    async def tend(self) -> None:
        """Take in what has ended; start again what may end by itself."""
        while not self.is_over:
            await asyncio.sleep(0.05)
            if self.breaks is not None:
                return
            for running in [each for each in self.running if each.task.done()]:
                self.running.remove(running)
                if running.error is None:
                    continue
                if isinstance(running.error, ConfigurationError) and running.process.name in self.fenced:
                    self._start_where_free(running.seat)
                else:
                    self.breaks = Broken(f"{running.process.name} ended with {running.error!r}")
                    self.breaks.__cause__ = running.error

    # --- the log -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def log(self) -> Any:
        """A connection without faults."""
        async with connect(self._address, clock=self.clock, client_id="world") as log:
            yield log

    async def make_sources(self, log: Log) -> None:
        await log.admin.create([NewTopic(name, self.plan.partitions) for name in self.sources()])

    def sources(self) -> list[str]:
        return sorted({work.source for work in self.plan.works})

    async def feed(self, log: Log) -> None:
        """Write the input, a few records at a time, over three quarters of the horizon."""
        async with log.producer() as producer:
            for source in self.sources():
                number = 0
                while number < self.plan.records:
                    count = min(self.draw.randrange(1, 6), self.plan.records - number)
                    await self._write(producer, source, range(number, number + count))
                    number += count
                    await asyncio.sleep(self.draw.uniform(0, 1.5 * self.plan.horizon_s * count / self.plan.records))

    async def _write(self, producer: Any, source: str, numbers: range) -> None:
        by_partition: dict[int, BatchBuilder] = {}
        for number in numbers:
            key = key_of(number, self.plan.keys).to_bytes(8, "big")
            value = b"?" if self.draw.random() < self.plan.poison else number.to_bytes(8, "big")
            builder = by_partition.setdefault(
                partition_for(key, self.plan.partitions), BatchBuilder(COMPRESSIONS["none"], 1 << 20)
            )
            builder.append(self.clock.now_ms(), key, value, [])
        for partition, builder in sorted(by_partition.items()):
            await (await producer.enqueue(TopicPartition(source, partition), builder.seal()))


def _close_files(worker: Worker) -> None:
    log = worker._log
    assert isinstance(log, FaultyLog)
    assert isinstance(log.inner, SqliteLog)
    database = log.inner._database
    assert isinstance(database, MemoryDatabase)
    memory = getattr(database, "memory", None)
    if memory is not None and database in memory.users:
        memory.users.remove(database)
        if memory.maintainer is database:
            memory.maintainer = None


# --- one world at a time -----------------------------------------------------------------------------------------


@contextmanager
def only_chance(loop: ProcessLoop, plan: Plan) -> Generator[None]:
    """Nothing but the seed decides while the block runs: no machine's clock, no other random numbers, no threads."""
    draw = random.Random(f"ids {plan.seed}")
    ticks = iter(range(1 << 62))
    before = random.getstate()
    random.seed(plan.seed)

    def perf_counter() -> float:
        return loop.time() + next(ticks) * 1e-5  # so that slices of work come to their end as well

    def new_id() -> uuid.UUID:
        return uuid.UUID(int=draw.getrandbits(128), version=4)

    async def run_sync(func: Callable[..., Any], *args: Any, **_: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        return func(*args)

    with ExitStack() as stack:
        stack.callback(random.setstate, before)
        stack.enter_context(mock.patch.object(anyio.to_thread, "run_sync", run_sync))
        stack.enter_context(mock.patch.object(task_tables, "_STORE_EVERY_S", plan.store_every_s))
        stack.enter_context(mock.patch.object(commit_mark, "uuid4", new_id))
        for name, module in list(sys.modules.items()):
            if name.startswith("streamflow.") and hasattr(module, "perf_counter"):
                stack.enter_context(mock.patch.object(module, "perf_counter", perf_counter))
        yield


class TracedLogging(logging.Handler):
    """What StreamFlow logs, as part of what is shown."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = current.get()
        name = "nobody" if process is None else process.name
        if self._world._out is not None:
            self._world._out(f"{self._world.loop.time():9.4f}     {name}: {record.levelname} {record.getMessage()}")
