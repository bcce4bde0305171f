"""A bounded run of several worker processes, seen by whoever starts them: one account of all they did."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from streamflow.clock import SystemClock
from streamflow.config import Settings
from streamflow.log.api import Admin, Log
from streamflow.log.connect import connect
from streamflow.processing.declarations import Declarations
from streamflow.processing.topology import Topology
from streamflow.runtime.extent import Extent
from streamflow.runtime.internal_topics import prepare_topics
from streamflow.runtime.layout import Layout
from streamflow.runtime.open_log import open_log
from streamflow.runtime.status import Outcome


class GroupRun:
    """Notes where a run begins before its workers start, and how far they came when they are done.

    A worker's own note may come after another worker has processed records already.

    Args:
        app: The app.
        settings: Resolved settings.
    """

    def __init__(self, app: Declarations, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._extent: Extent | None = None
        self._stop = anyio.Event()
        self._beginning = anyio.CancelScope()

    def request_stop(self) -> None:
        """Give up a beginning that is under way, and wait for the log no longer."""
        self._stop.set()
        self._beginning.cancel()

    async def begin(self) -> None:
        """Create the app's topics that do not exist yet, and note where the run begins and ends.

        Raises:
            LogUnavailableError: Nobody answers within `start_timeout_s`.
            TopologyError: Topics do not fit the declarations.
        """
        topology = self._app.topology()
        with self._beginning:
            async with self._log() as log:
                if log is not None:
                    self._extent = await self._found(log.admin, topology)

    async def _found(self, admin: Admin, topology: Topology) -> Extent | None:
        layout = Layout.of(topology, await prepare_topics(self._app, topology, self._settings, admin))
        if not layout.counts:
            return None
        extent = Extent(layout, self._app.id)
        await extent.find(admin, self._app, self._settings)
        return extent

    async def end(self, *, finished: bool) -> Outcome | None:
        """How the run went; None for an app without agents, and where it is not to be known any more after a stop.

        Args:
            finished: Whether every worker came to the end.

        Raises:
            LogUnavailableError: Nobody answers.
        """
        if self._extent is None:
            return None
        async with self._log() as log:
            if log is None:
                return None
            await self._extent.look(log.admin)
        return self._extent.outcome(finished=finished)

    @asynccontextmanager
    async def _log(self) -> AsyncGenerator[Log | None]:
        async with AsyncExitStack() as stack:
            yield await open_log(stack, self._connect(), self._connect, self._settings.start_timeout_s, self._stop)

    def _connect(self) -> Log:
        return connect(self._settings.broker, clock=SystemClock(), client_id=f"streamflow-{self._app.id}-supervisor")
