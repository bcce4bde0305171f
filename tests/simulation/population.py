"""The workers of a run: who starts, stops, leaves, is stopped, killed and started again, and when."""

import asyncio
from typing import TYPE_CHECKING

from streamflow.errors import ConfigurationError, InstanceTakenError
from streamflow.log.api import Log
from tests.simulation.apps import APP_ID
from tests.simulation.plan import END, POINTS
from tests.simulation.processes import Process
from tests.simulation.stores import Seat
from tests.simulation.workers import Running

if TYPE_CHECKING:
    from tests.simulation.world import World

SESSION_S = 1.5


class Broken(AssertionError):
    """A promise was not kept."""


class Population:
    """Those that run in one world, and those that have ended."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._draw = world.draw
        self._crowd = world.plan.crowd
        self.kills_left, self.stops_left = world.plan.kills, world.plan.stops
        self.changes_left = self._crowd.changes
        self.running: list[Running] = []
        self.all: list[Running] = []
        self.fenced: set[str] = set()
        self.is_over = False
        self.next_away: Process | None = None
        """Who goes away at the next point of a commit."""
        self.hear_late: set[Process] = set()
        """Those to which an event of the group is on its way."""
        self.coming = 0
        """How many are going to start."""
        self._seats = 0
        self._left: list[Seat] = []
        """Of workers that have left for good; what they kept is still there."""
        self._back_s = 0.0
        """When who went away goes on, in seconds of the loop; 0 before it has gone."""

    def live(self) -> list[Running]:
        """Those that are neither stopped nor about to end."""
        return [each for each in self.running if each.process.state == "running" and not each.task.done()]

    # --- starting and ending -----------------------------------------------------------------------------------

    def start(self, seat: Seat, instance_id: str | None = None) -> Running:
        """Start a worker, in a group of static members under the name of its seat unless it is given another's."""
        if self._crowd.is_static and instance_id is None:
            instance_id = seat.id
        running = Running(self._world, seat, len(self.all), instance_id)
        self._world.trace(f"{running.process.name} starts{'' if instance_id is None else f' as {instance_id}'}")
        self.running.append(running)
        self.all.append(running)
        return running

    def new_seat(self) -> Seat:
        """On a machine that nothing has run on."""
        self._seats += 1
        return Seat(self._seats)

    def _of(self, process: Process) -> Running:
        return next(each for each in self.running if each.process is process)

    def kill(self, process: Process, where: str) -> None:
        """SIGKILL: nothing of it runs again, and the kernel closes its files."""
        if not self.kills_left or not any(each.process is process for each in self.running):
            return
        self.kills_left -= 1
        self._world.trace(f"{process.name} is killed at {where}")
        process.state = "dead"
        running = self._of(process)
        self.running.remove(running)
        running.gone.set()
        if running.worker is not None:
            running.worker.close_files()
        seat = self.new_seat() if self._draw.random() < 0.2 else running.seat  # another machine
        self._world.loop.run_as_nobody(self._start_after(self._draw.uniform(0.1, 3.0), seat))

    async def _start_after(self, seconds: float, seat: Seat) -> None:
        self.coming += 1
        await asyncio.sleep(seconds)
        self.coming -= 1
        if not self.is_over:
            self._start_where_free(seat)

    def _start_where_free(self, seat: Seat) -> None:
        """Who was fenced and asked to stop is started again by either, once."""
        if all(each.seat is not seat or each.task.done() for each in self.running):
            self.start(seat)

    def leave(self, running: Running, where: str, *, for_good: bool = False) -> None:
        """Ask for a clean stop; it is started again, unless it is to stay away."""
        if running.worker is None or running.is_stopping:
            return
        self._world.trace(f"{running.process.name} is asked to stop at {where}{' for good' if for_good else ''}")
        running.process.context().run(running.worker.request_stop)
        if for_good:
            self._left.append(running.seat)
        else:
            self._world.loop.run_as_nobody(self._start_when_ended(running))

    async def _start_when_ended(self, running: Running) -> None:
        self.coming += 1
        await running.gone.wait()
        self.coming -= 1
        if running.process.state != "dead":  # who was killed is started again in any case
            await self._start_after(self._draw.uniform(0.0, 1.0), running.seat)

    async def tend(self) -> None:
        """Take in what has ended; start again what may end by itself."""
        while not self.is_over:
            await asyncio.sleep(0.05)
            if self._world.breaks is not None:
                return
            for running in [each for each in self.running if each.task.done()]:
                self.running.remove(running)
                if running.error is None:
                    continue
                if isinstance(running.error, ConfigurationError) and running.process.name in self.fenced:
                    self._start_where_free(running.seat)
                elif isinstance(running.error, InstanceTakenError) and self._has_twin(running):
                    self._world.trace(f"{running.process.name} makes place for another one of its name")
                else:
                    self._world.breaks = Broken(f"{running.process.name} ended with {running.error!r}")
                    self._world.breaks.__cause__ = running.error

    def start_twin(self, running: Running) -> None:
        """Start another worker under the name of one that runs, on a machine of its own: the older one has to end."""
        if running.instance_id is not None:
            self.start(self.new_seat(), running.instance_id)

    def _has_twin(self, running: Running) -> bool:
        """Whether another one has been started under the same name: of two the one that joined later stays."""
        names = [each.instance_id for each in self.all if each is not running]
        return running.instance_id is not None and running.instance_id in names

    # --- being stopped -----------------------------------------------------------------------------------------

    def stop(self, process: Process, where: str) -> None:
        """SIGSTOP, and SIGCONT before or after its session is over."""
        if not self.stops_left or process.state != "running":
            return
        self.stops_left -= 1
        self._stop_for(process, self._draw.choice([0.5, 1.2, 2.0, 4.0]) * SESSION_S, where)

    def _stop_for(self, process: Process, seconds: float, where: str) -> None:
        self._world.trace(f"{process.name} is stopped for {seconds:g} s at {where}")
        process.state = "stopped"
        self._world.loop.run_as_nobody(self._go_on_after(process, seconds))

    async def _go_on_after(self, process: Process, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if process.state == "stopped":
            self._world.trace(f"{process.name} goes on")
            self._world.loop.let_run(process)

    # --- changes of the group ----------------------------------------------------------------------------------

    def at(self, process: Process, point: str) -> None:
        """Maybe change the group while a process is at a point."""
        crowd = self._crowd
        if not self._world.faulty or not self.changes_left or not self._is_meant(process, point):
            return
        if self._draw.random() >= crowd.at_points:
            return
        self.changes_left -= 1
        for _ in range(self._draw.randint(1, crowd.burst)):
            self._change(process, point)

    def _is_meant(self, process: Process, point: str) -> bool:
        points = self._crowd.points
        if END in points and any(each.process is process and each.is_stopping for each in self.running):
            return True
        return any(point.startswith(POINTS[name]) for name in points if name != END)

    def _change(self, process: Process, point: str) -> None:
        live = [each for each in self.live() if not each.is_stopping]
        what = self._draw.choice(["join", "join", "leave", "another leaves", "away", "round", "twin"])
        mine = [each for each in live if each.process is process]
        others = [each for each in live if each.process is not process]
        if what == "join":
            if len(self.running) < self._crowd.most:
                self.start(self._seat_to_join())
        elif what == "leave" and mine:
            self.leave(mine[0], point, for_good=self._may_leave(live))
        elif what == "another leaves" and others:
            self.leave(self._draw.choice(others), point, for_good=self._may_leave(live))
        elif what == "twin" and live:
            self.start_twin(self._draw.choice(live))
        elif what == "round" and live:
            self.rejoin(self._draw.choice(live), point)
        elif what == "away" and live:
            self._stop_for(self._draw.choice(live).process, self._draw.uniform(1.2, 3.0) * SESSION_S, point)

    def rejoin(self, running: Running, where: str) -> None:
        """Have a member ask for a new round."""
        if running.worker is not None and running.worker.group is not None:
            self._world.trace(f"{running.process.name} asks for a round at {where}")
            running.process.context().run(running.worker.group.rejoin, "simulated")

    def _may_leave(self, live: list[Running]) -> bool:
        return len(live) > 2 and self._draw.random() < 0.5

    def _seat_to_join(self) -> Seat:
        """A new machine, or one that has what it kept when its worker left."""
        free = [seat for seat in self._left if all(each.seat is not seat for each in self.running)]
        if not free or self._draw.random() < 0.4:
            return self.new_seat()
        self._left.remove(free[0])
        return free[0]

    async def upset(self, log: Log) -> None:
        """Have workers join, leave and be fenced until the horizon."""
        world = self._world
        while world.faulty and world.plan.restarts:
            await asyncio.sleep(self._draw.expovariate(world.plan.restarts))
            live = self.live()
            what = self._draw.choice(["join", "leave", "leave", "fence", "round"])
            if not world.faulty or self.is_over or not live:
                continue
            chosen = self._draw.choice(live)
            if what == "join" and len(self.running) < self._crowd.most:
                self.start(self.new_seat())
            elif what == "leave":
                self.leave(chosen, "a moment")
            elif what == "round":
                self.rejoin(chosen, "a moment")
            elif what == "fence" and world.plan.guarantee == "exactly_once":
                world.trace(f"{chosen.process.name} is fenced")
                self.fenced.add(chosen.process.name)
                async with log.transactional_producer(f"{APP_ID}-{chosen.seat.id}"):
                    pass

    async def send_away(self) -> None:
        """Stop a worker until others have its work, and let these leave when it is back: all of it is its own again.

        If it has not heard by then that it was lost, it still has its tasks as they were.
        """
        await asyncio.sleep(self._draw.uniform(0.2, 1.2))
        live = self.live()
        if not self._world.plan.is_one_away or len(live) < 2:
            return
        chosen = self._draw.choice(live)
        if self._draw.random() < 0.5:
            self.next_away = chosen.process
            await asyncio.sleep(1.0)
        if self._back_s == 0.0:
            self.go_away(chosen.process, "a moment")
        await asyncio.sleep(max(0.0, self._back_s - self._world.loop.time()) + self._draw.uniform(0.0, 0.5))
        for each in list(self.running):
            if each is not chosen and not self.is_over:
                self.leave(each, "the return of another")

    def go_away(self, process: Process, where: str) -> None:
        """Stop a process for longer than its session."""
        self.next_away = None
        if process.state == "running":
            seconds = self._draw.uniform(1.5, 2.2) * SESSION_S
            self._back_s = self._world.loop.time() + seconds
            self._stop_for(process, seconds, where)
