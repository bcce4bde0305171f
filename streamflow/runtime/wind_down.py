"""The end of a worker's work, within `shutdown_timeout_s`: the records in hand are finished and committed."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import anyio

from streamflow.errors import RetriableError
from streamflow.runtime.at_least_once import AtLeastOnce
from streamflow.runtime.exactly_once import ExactlyOnce
from streamflow.runtime.task_manager import TaskManager
from streamflow.runtime.until_end import UntilEnd

logger = logging.getLogger("streamflow.worker")

CLOSE_S = 1.0
"""How long the tasks may take to close after that, at least."""
_FINAL_COMMIT_S = 3.0
_ABANDONING_S = 0.1
_LAST_LOOK_S = 1.0


async def wind_down(
    manager: TaskManager, delivery: AtLeastOnce | ExactlyOnce, ends: UntilEnd | None, shutdown_timeout_s: float
) -> bool:
    """Finish the records in hand and commit.

    Args:
        manager: The worker's tasks.
        delivery: Writes and commits.
        ends: Where a bounded run ends, which looks once more how far it came; None for another one.
        shutdown_timeout_s: Seconds for all of it and for closing, > 0.

    Returns:
        Whether the log answered; else nobody should wait for it again.
    """
    logger.info("stopping: finishing the records in hand")
    finish_s = max(0.1, shutdown_timeout_s - _FINAL_COMMIT_S - CLOSE_S)
    with anyio.move_on_after(finish_s) as finishing:
        await manager.finish_records()
    if finishing.cancelled_caught:
        logger.warning("records in hand were not done within %g s; they are processed again", finish_s)
    deadline = asyncio.get_running_loop().call_later(_FINAL_COMMIT_S, delivery.abandon)
    try:
        with anyio.move_on_after(_FINAL_COMMIT_S + _ABANDONING_S) as committing:
            await delivery.commit(manager.running())
    finally:
        deadline.cancel()
    if committing.cancelled_caught:
        logger.warning("the log did not answer the last commit; what it held is processed again")
        return False
    if ends is not None:
        with anyio.move_on_after(_LAST_LOOK_S), contextlib.suppress(RetriableError):
            await ends.look()
    return True
