"""Opening the log, and what a member of the group has open of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio

from streamflow.errors import LogUnavailableError
from streamflow.log.api import Admin, Group, Log, Reader
from streamflow.runtime.at_least_once import AtLeastOnce
from streamflow.runtime.exactly_once import ExactlyOnce

logger = logging.getLogger("streamflow.worker")

_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class OpenLog:
    """The parts of the log that a worker works with while it is a member.

    Attributes:
        group: The membership.
        reader: The source lane.
        admin: Offsets, topics, deletions.
        delivery: Writes outputs and commits.
    """

    group: Group
    reader: Reader
    admin: Admin
    delivery: AtLeastOnce | ExactlyOnce


async def open_log(
    stack: AsyncExitStack, log: Log, connect: Callable[[], Log], timeout_s: float, stop: anyio.Event
) -> Log | None:
    """Open the log, and wait a while for one that is away.

    Args:
        stack: Closes it.
        log: What to open first.
        connect: Makes another one: each is opened once.
        timeout_s: Seconds to wait for it.
        stop: Ends the wait.

    Returns:
        It; None when a stop came first.

    Raises:
        LogUnavailableError: It did not answer in time.
    """
    deadline_s = anyio.current_time() + timeout_s
    told = False
    while True:
        try:
            return await stack.enter_async_context(log)
        except LogUnavailableError as error:
            if anyio.current_time() + _RETRY_S > deadline_s:
                raise LogUnavailableError(
                    f"{error}\nwaited {timeout_s:g} s for it (start_timeout_s): start it, or say where it is with "
                    "broker= or STREAMFLOW_BROKER"
                ) from error
            if not told:
                logger.warning("%s; waiting for it, %g s at most", error, timeout_s)
                told = True
        with anyio.move_on_after(_RETRY_S):
            await stop.wait()
            return None
        log = connect()
