"""Running agents that may not end when they are cancelled."""

from __future__ import annotations

import asyncio
import logging

import anyio

from streamflow.errors import FatalError
from streamflow.runtime.run import AgentRun

logger = logging.getLogger("streamflow.tasks")

PATIENCE_S = 5.0
"""How long a cancelled agent is waited for."""


class Patience:
    """Runs the agents of one task; cancelled, waits for them, but not for ever.

    Args:
        task: The task's name.

    Attributes:
        seconds: How long to wait, > 0.
        deaf: Agents that went on after they were cancelled and patience was over, by name.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self.seconds = PATIENCE_S
        self.deaf: dict[str, asyncio.Task[None]] = {}

    async def run(self, run: AgentRun) -> None:
        """Run one agent until it is over.

        Raises:
            FatalError: It was cancelled by somebody else, and its task would stand still without a word.

        It is no child of the task group, which would wait for an agent that swallows its cancellation as long as that
        goes on: worker, host and all. The scope is cancelled as a task group's would be.
        """
        scope = anyio.CancelScope()

        async def within_scope() -> None:
            with scope:
                await run.run()

        agent = asyncio.create_task(within_scope(), name=f"agent {run.agent.name} of task {self._task}")
        try:
            await asyncio.wait((agent,))
        except asyncio.CancelledError:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait((agent,), timeout=self.seconds)
            if agent.done():
                agent.result()
            else:
                self._leave(run.agent.name, agent)
            raise
        if agent.cancelled():
            raise FatalError(
                f"agent {run.agent.name!r} of task {self._task} was cancelled, and not by its worker: code in it, or a "
                "library that it calls, cancels the task it runs in (`asyncio.current_task().cancel()`)"
            )
        agent.result()

    def _leave(self, name: str, agent: asyncio.Task[None]) -> None:
        agent.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # looked at: nobody else will
        self.deaf[name] = agent
        logger.error(
            "task %s: agent %r goes on %g s after it was cancelled; let `asyncio.CancelledError` pass. What it sends "
            "is dropped, but it takes processor time, and this process may end only when it does",
            self._task,
            name,
            self.seconds,
        )
