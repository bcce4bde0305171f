"""A worker in a process: the worker itself, with the simulation's network, disk, and eyes on its tasks."""

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

from streamflow.clock import Clock
from streamflow.log.api import Log
from streamflow.log.sqlite.database import MemoryDatabase
from streamflow.log.sqlite.log import SqliteLog
from streamflow.runtime.worker import Worker
from streamflow.state.slots import Slot
from streamflow.state.store import Stores
from tests.simulation.apps import Built, build
from tests.simulation.faults import Wire
from tests.simulation.log import FaultyLog
from tests.simulation.processes import Process
from tests.simulation.stores import FaultyStores, Seat

if TYPE_CHECKING:
    from tests.simulation.world import World


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

    def close_files(self) -> None:
        """What a kernel does for who is dead."""
        log = self._log
        assert isinstance(log, FaultyLog)
        assert isinstance(log.inner, SqliteLog)
        database = log.inner._database
        assert isinstance(database, MemoryDatabase)
        memory = getattr(database, "memory", None)
        if memory is not None and database in memory.users:
            memory.users.remove(database)
            if memory.maintainer is database:
                memory.maintainer = None


class Running:
    """A worker in a process."""

    def __init__(self, world: "World", seat: Seat, number: int, instance_id: str | None) -> None:
        self.seat = seat
        self.instance_id = instance_id
        self.process = Process(f"w{number}@{seat.id}")
        self.process.instance_id = instance_id
        plan = world.plan
        settings = {**world.settings, "instance_id": instance_id}
        self.built = build(plan.works, plan.partitions, plan.keys, plan.crowd.hangs, settings)
        self.error: BaseException | None = None
        self.worker: SimulatedWorker | None = None
        self.gone = asyncio.Event()
        """It has ended, or was killed."""
        self._world = world
        self.task = world.loop.create_task(self._run(), context=self.process.context())
        self.task.add_done_callback(lambda _: self.gone.set(), context=contextvars.Context())

    async def _run(self) -> None:
        world = self._world
        try:
            self.worker = SimulatedWorker(self.built, self.seat, Wire(world, self.process), world.clock)
            await self.worker.run()
        except Exception as error:
            self.error = error
            world.trace(f"{self.process.name} ends with {error!r}")

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self.worker is not None and self.worker._stop.is_set()
