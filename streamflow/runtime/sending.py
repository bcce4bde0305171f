"""What a process needs to send and ask outside any record's turn; workers and clients share it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from streamflow.clock import Clock
from streamflow.config import Settings
from streamflow.log.api import Log
from streamflow.model.record import RecordMetadata
from streamflow.processing.agent import Agent
from streamflow.processing.context import Outgoing
from streamflow.processing.declarations import Declarations
from streamflow.runtime.asks import Asks
from streamflow.runtime.internal_topics import reply_topic_name
from streamflow.runtime.outputs import Staged
from streamflow.runtime.sender import DirectSender
from streamflow.runtime.targets import KnownTargets
from streamflow.sensors import Sensors

_SHARE = 8  # sends outside of turns may hold an eighth of the memory budget before they wait


class ProcessSender:
    """Sends and asks for one app in this process; made by `open`.

    Args:
        direct: Sends records.
        asks: Asks agents.
    """

    def __init__(self, direct: DirectSender, asks: Asks) -> None:
        self._direct = direct
        self._asks = asks

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        app: Declarations,
        settings: Settings,
        log: Log,
        known: KnownTargets,
        clock: Clock,
        sensors: Sensors,
    ) -> AsyncGenerator[ProcessSender]:
        """Run while the block runs.

        Args:
            app: The app.
            settings: Its memory budget.
            log: An open log.
            known: Its targets, the reply topic among them.
            clock: Time.
            sensors: Metrics hooks.
        """
        with anyio.CancelScope() as scope:
            async with log.producer() as producer:
                max_bytes = settings.memory_budget_bytes // _SHARE
                direct = DirectSender(producer, known, clock, sensors, max_bytes=max_bytes)
                asks = Asks(log, direct, known.targets[reply_topic_name(app.id)], clock)
                async with direct.open(), anyio.create_task_group() as tasks:
                    tasks.start_soon(asks.run)
                    try:
                        yield cls(direct, asks)
                    finally:
                        tasks.cancel_scope.cancel()
                if direct.abandoned:
                    scope.cancel()  # the producer, too, would wait for a log that does not answer
                    await anyio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """The log is away: at its end, wait for nothing that is still to be sent."""
        self._direct.abandoned = True

    def end_by(self, time_s: float) -> None:
        """Send what waits at the end until then, in the event loop's time, but for a second at least."""
        self._direct.end_by_s = time_s

    @property
    def waiting(self) -> int:
        """Records that were sent and are not yet acknowledged."""
        return self._direct.waiting

    async def send(self, outgoing: Outgoing) -> RecordMetadata:
        """See `processing.context.Sender`."""
        return await self._direct.send(outgoing)

    def send_nowait(self, outgoing: Outgoing) -> None:
        """See `processing.context.Sender`."""
        self._direct.send_nowait(outgoing)

    async def ask(self, agent: Agent[Any, Any, Any], value: Any, *, key: Any, timeout_s: float) -> Any:
        """See `processing.context.Sender`."""
        return await self._asks.ask(agent, value, key=key, timeout_s=timeout_s)

    def send_answers(self, answers: Iterable[Staged]) -> None:
        """Send answers of a record that stops the worker: outside any commit, since its record is not committed."""
        for out, timestamp_ms, key, value, headers in answers:
            self._direct.send_encoded((out.tp, timestamp_ms, key, value, headers))
