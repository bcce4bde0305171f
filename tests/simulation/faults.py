"""What goes wrong, and when: drawn from the seed, at every call of the log, of a store and of a thread."""

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import anyio

from streamflow.errors import ClosedError
from streamflow.log.tasks import cancel_again
from tests.simulation.processes import Process, ProcessLoop

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")


@dataclass
class Rates:
    """How probable each fault is at each opportunity. A seed has some of them, and not others."""

    slow: float = 0.0
    """A call takes milliseconds."""
    very_slow: float = 0.0
    """A call takes up to two seconds."""
    crash: float = 0.0
    """The process is killed at a call."""
    commit_crash: float = 0.0
    """The process is killed at a point of a commit."""
    stop: float = 0.0
    """The process is stopped at a call, and goes on later."""
    commit_stop: float = 0.0
    """The process is stopped at a point of a commit."""
    refused: float = 0.0
    """A call says that it may be repeated; nothing was stored."""
    migrated: float = 0.0
    """A commit says that a rebalance is under way; nothing was stored."""
    lost_request: float = 0.0
    """A commit does not come to the log, and nobody knows."""
    lost_reply: float = 0.0
    """A commit is stored, and nobody knows."""
    late_request: float = 0.0
    """A commit is stored after its sender has given it up."""
    short_fetch: float = 0.0
    """A fetch brings the first of the batches there are."""
    full: float = 0.0
    """A store has no room."""
    late_loss: float = 0.0
    """What is lost is heard of seconds later, and may be back by then."""
    late_revocation: float = 0.0
    """What is to be given back is heard of when the time for it may be over."""
    late_assignment: float = 0.0
    """What was assigned is heard of seconds later, and may be gone by then."""
    late_told: float = 0.0
    """What is told beside is heard of seconds later, and may be otherwise by then."""

    @classmethod
    def drawn(cls, draw: random.Random) -> "Rates":
        """Some faults of all, at rates of orders of magnitude."""
        levels = {
            "slow": (0.1, 0.5),
            "very_slow": (0.002, 0.01),
            "crash": (0.0005, 0.002),
            "commit_crash": (0.02, 0.1),
            "stop": (0.0005, 0.001),
            "commit_stop": (0.02, 0.05),
            "refused": (0.02, 0.1),
            "migrated": (0.01, 0.05),
            "lost_request": (0.02, 0.1),
            "lost_reply": (0.02, 0.1),
            "late_request": (0.02, 0.1),
            "short_fetch": (0.2, 0.5),
            "full": (0.1, 0.5),
            "late_loss": (0.2, 0.5),
            "late_revocation": (0.1, 0.5),
            "late_assignment": (0.1, 0.3),
            "late_told": (0.1, 0.3),
        }
        rates = cls()
        for each in fields(cls):
            if draw.random() < 0.4:
                setattr(rates, each.name, draw.choice(levels[each.name]))
        return rates


class Wire:
    """Between one process and everything that is not its memory."""

    def __init__(self, world: "World", process: Process) -> None:
        self.world = world
        self.process = process

    @property
    def _loop(self) -> ProcessLoop:
        return self.world.loop

    def chance(self, rate: str) -> bool:
        """Whether a fault happens now."""
        world = self.world
        return world.faulty and world.draw.random() < getattr(world.rates, rate)

    def strike(self, point: str, *, commit: bool = False) -> None:
        """Maybe kill or stop the process here; it gets as far as its next await."""
        world = self.world
        world.trace(f"{self.process.name} {point}")
        if self.process.state != "running":
            return
        population = world.population
        population.at(self.process, point)
        if commit and population.next_away is self.process:
            population.go_away(self.process, point)
        elif self.chance("commit_crash" if commit else "crash"):
            population.kill(self.process, point)
        elif self.chance("commit_stop" if commit else "stop"):
            population.stop(self.process, point)

    async def hop(self, point: str, *, commit: bool = False) -> None:
        """On the way to or from the log: slow, or never there."""
        self.strike(point, commit=commit)
        await asyncio.sleep(self.delay_s())

    def delay_s(self) -> float:
        """How long a message takes."""
        if self.chance("very_slow"):
            return self.world.draw.uniform(0.1, 2.0)
        return self.world.draw.uniform(0.0, 0.03) if self.chance("slow") else 0.0

    async def decided_there(self, point: str, request: Callable[[], Awaitable[T]]) -> T:
        """Have the log do something that it does whatever becomes of who asked.

        Cancellation: given up before it has begun; then its outcome is waited for.
        """
        begun = False

        async def carried() -> T:
            nonlocal begun
            await asyncio.sleep(self.delay_s())
            if self.process.state == "dead" and self.world.draw.random() < 0.5:
                raise ClosedError("it was still in the buffers of the dead")
            begun = True
            result = await request()
            await asyncio.sleep(self.delay_s())
            return result

        self.strike(f"{point} >", commit=True)
        under_way = self._loop.run_as_nobody(carried())
        self.world.under_way.add(under_way)
        under_way.add_done_callback(self.world.arrived, context=contextvars.Context())
        try:
            await asyncio.wait([under_way])
        except asyncio.CancelledError:
            if not begun:
                under_way.cancel()
                raise
            with anyio.CancelScope(shield=True):
                await asyncio.wait([under_way])
            cancel_again()
        self.strike(f"{point} <", commit=True)
        return under_way.result()  # type: ignore[return-value]
