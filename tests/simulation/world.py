"""One run: a log, processes that come, go, are killed and stopped, and what is checked while they run."""

import asyncio
import hashlib
import logging
import random
import sys
import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import anyio.to_thread

from streamflow.clock import Clock
from streamflow.errors import StreamFlowError
from streamflow.log.api import Membership, OffsetMark
from streamflow.log.connect import connect
from streamflow.model.record import TopicPartition
from streamflow.runtime import commit_mark, task_tables, worker
from streamflow.runtime.assignment import assignor
from streamflow.runtime.commit import Commits
from streamflow.runtime.commit_mark import CommitMark
from tests.simulation.owners import Owners, watched
from tests.simulation.plan import Plan
from tests.simulation.population import SESSION_S, Broken, Population
from tests.simulation.processes import Process, ProcessLoop, current
from tests.simulation.sources import Sources

START_MS = 1_700_000_000_000


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


class World:
    """Everything of one run."""

    def __init__(self, plan: Plan, loop: ProcessLoop, out: Callable[[str], object] | None = None) -> None:
        self.plan = plan
        self.loop = loop
        self.clock = LoopClock(loop)
        self.draw = random.Random(f"run {plan.seed}")
        self.rates = plan.rates
        self.faulty = False
        self.late: dict[str, list[Callable[[], Awaitable[object]]]] = {}
        self.under_way: set[asyncio.Task[object]] = set()
        self._hash = hashlib.sha256()
        self._out = out
        self.marks: dict[TopicPartition, OffsetMark] = {}
        self._offsets: dict[TopicPartition, int] = {}
        self._times: dict[tuple[TopicPartition, str], int] = {}
        self.population = Population(self)
        self.sources = Sources(self)
        self.owners = Owners(self)
        self._address = f"memory://simulation-{plan.seed}"
        self.settings: dict[str, Any] = {
            "broker": self._address,
            "processing_guarantee": plan.guarantee,
            "partitions": plan.partitions,
            "commit_interval_ms": plan.commit_interval_ms,
            "session_timeout_ms": round(SESSION_S * 1000),
            "heartbeat_interval_ms": 300,
            "rebalance_timeout_ms": plan.crowd.rebalance_timeout_ms,
            "max_poll_interval_ms": plan.crowd.max_poll_interval_ms,
            "standby_replicas": plan.crowd.standby_replicas,
            "acceptable_lag_records": plan.crowd.acceptable_lag_records,
            "max_warmup_replicas": plan.crowd.max_warmup_replicas,
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

    def committed(
        self, process: Process, offsets: Mapping[TopicPartition, OffsetMark], by: Membership, sent_s: float
    ) -> None:
        """Offsets were committed."""
        told = ", ".join(f"{tp}:{mark.offset}" for tp, mark in sorted(offsets.items()))
        self.trace(f"{process.name} has committed {told} as {by.member_id[-4:]}/{by.generation}")
        self.owners.committed(process, offsets, by, sent_s)
        for tp, mark in offsets.items():
            if mark.offset < self._offsets.get(tp, -1):
                raise Broken(f"the committed offset of {tp} fell from {self._offsets[tp]} to {mark.offset}")
            self._offsets[tp] = mark.offset
            self.marks[tp] = mark
            for table, time_ms in CommitMark.of(mark).times.items():
                if time_ms < self._times.get((tp, table), time_ms):
                    raise Broken(f"stream time of {table} with {tp} fell to {time_ms}")
                self._times[tp, table] = time_ms

    def may_be_purged(self, before: Mapping[TopicPartition, int]) -> None:
        for tp, offset in before.items():
            if offset > self._offsets.get(tp, 0):
                raise Broken(f"{tp} would be purged up to {offset}, and is committed up to {self._offsets.get(tp)}")

    def arrived(self, message: "asyncio.Task[object]") -> None:
        self.under_way.discard(message)
        if not message.cancelled() and isinstance(error := message.exception(), Broken):
            self.breaks = self.breaks or error

    def broken(self, what: str) -> Broken:
        """A promise was not kept, whatever becomes of the error where it is raised."""
        error = Broken(what)
        self.breaks = self.breaks or error
        return error

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

    # --- the log -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def log(self) -> Any:
        """A connection without faults."""
        async with connect(self._address, clock=self.clock, client_id="world") as log:
            yield log


# --- one world at a time -----------------------------------------------------------------------------------------


@contextmanager
def only_chance(world: World) -> Generator[None]:
    """Nothing but the seed decides while the block runs: no machine's clock, no other random numbers, no threads."""
    loop, plan, eyes = world.loop, world.plan, watched(world.owners)
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
        stack.enter_context(mock.patch.object(worker, "TaskManager", eyes["manager"]))
        stack.enter_context(mock.patch.object(assignor, "plan", eyes["plan"]))
        stack.enter_context(mock.patch.object(Commits, "_is_committed_elsewhere", eyes["is_committed_elsewhere"]))
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
