"""A worker inside an event loop that is already there: what `app.running()` and the worker command share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from streamflow.runtime.worker import Worker

if TYPE_CHECKING:
    from streamflow.config import Settings
    from streamflow.processing.declarations import Declarations


@asynccontextmanager
async def hosted(app: Declarations, settings: Settings, *, web: bool) -> AsyncIterator[Worker]:
    """Run a worker while the block runs; see `App.running`."""
    worker = Worker(app, settings)
    finished = anyio.Event()

    async def run() -> None:
        try:
            # Shielded: a cancelled block asks the worker to stop, so that it can still commit; it bounds that itself.
            with anyio.CancelScope(shield=True):
                await worker.run()
        finally:
            finished.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            await worker.wait_started()
            yield worker
        finally:
            worker.request_stop()
            with anyio.CancelScope(shield=True):
                await finished.wait()
