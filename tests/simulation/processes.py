"""Processes of a simulation: everything that a worker started runs in its name, and stops with it as a kernel stops it.

Whose a callback is, its context says, which every task and callback inherits. A process that is stopped (SIGSTOP) or
dead (SIGKILL) has its callbacks put by; those of a dead one run only when the run is over, so that they can be cleaned
up.
"""

import asyncio
import contextvars
import math
from typing import Literal

from streamflow.virtual_loop import VirtualLoop

current: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


class Process:
    """What a kernel knows of a process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Literal["running", "stopped", "dead"] = "running"
        self.held: list[asyncio.Handle] = []
        self.went_on_s = -math.inf
        """When it went on last after it was stopped, in seconds of the loop."""
        self.instance_id: str | None = None
        """Under which its worker is a member."""

    def context(self) -> contextvars.Context:
        """A context in which everything is done by this process."""
        context = contextvars.Context()
        context.run(current.set, self)
        return context


class ProcessLoop(VirtualLoop):
    """A virtual loop that runs the callbacks of running processes only; what is nobody's always runs."""

    def _may_run(self, handle: asyncio.Handle) -> bool:
        process = handle._context.get(current)  # type: ignore[attr-defined]
        if process is None or process.state == "running":
            return True
        process.held.append(handle)
        return False

    def let_run(self, process: Process) -> None:
        """Go on with everything that was put by."""
        process.state, process.went_on_s = "running", self.time()
        self._ready.extend(process.held)
        process.held = []

    def run_as_nobody(self, coro: "asyncio._CoroutineLike[object]") -> "asyncio.Task[object]":
        """Run something that no process owns: the network, the log's brokers, the world."""
        return self.create_task(coro, context=contextvars.Context())  # type: ignore[arg-type]
