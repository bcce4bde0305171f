"""What workers that are gone have left open is ended at once, and not when the log's time-out for it is over.

A worker that is killed in the middle of a commit leaves a transaction open on Kafka. Who reads its partitions, or their
offsets, waits until the broker aborts it. Each worker says its transactional id, and everybody is told whose is whose;
an id that was among those and is no more is one that nobody commits with, so it is fenced, which ends what is open.

Nothing depends on it but time: who waits for the offsets reads none of an open transaction. So it is done beside
everything else, by more than one worker where that is safer, and one that was only thought to be gone opens another
producer (see `exactly_once.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

import anyio

from streamflow.clock import Clock
from streamflow.errors import AuthorizationError, ProducerFencedError, RetriableError, StreamFlowError
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route

logger = logging.getLogger("streamflow.tasks")

_FIRST_RETRY_S = 0.1
_MAX_RETRY_S = 5.0
_WAIT = "Its partitions wait until the log does so (transaction_timeout_ms)"


class AbandonedTransactions:
    """One worker's part in it.

    Args:
        own_id: The transactional id of this worker; empty where it has none, and nothing is done then.
        fence: Ends what is open of an id, see `log.api.Admin.fence_producer`.
        clock: For the time between tries.
    """

    def __init__(self, own_id: str, fence: Callable[[str], Awaitable[bool]], clock: Clock) -> None:
        self.own_id = own_id
        self._fence = fence
        self._clock = clock
        self._routes: Collection[Route] = ()
        self._gone: set[str] = set()
        self._under_way: dict[str, anyio.CancelScope] = {}
        self._may_not = False
        self._news = asyncio.Event()

    def told(self, routes: Collection[Route]) -> None:
        """Take over what is said now; who is back is let alone at once.

        A worker of an older version, or one at least once, says no id, and may use the one that has gone: then all of
        it is left to the log's time-out; so it is where the routes are left out, as they are too many for the log.
        """
        said = _ids(routes)
        if not self.own_id or not all(said) or not said:
            self._let_alone(self._gone | self._under_way.keys())
            return
        self._gone |= left_behind(self._routes, routes, self.own_id)
        self._let_alone(said)  # who is back has settled its own
        self._routes = routes
        self._news.set()

    def _let_alone(self, ids: Collection[str]) -> None:
        self._gone.difference_update(ids)
        for transactional_id in self._under_way.keys() & set(ids):
            self._under_way.pop(transactional_id).cancel()

    async def run(self) -> None:
        """Fence who is gone, for ever."""
        async with anyio.create_task_group() as tasks:
            while True:
                await self._news.wait()
                self._news.clear()
                for transactional_id in sorted(self._gone - self._under_way.keys()):
                    scope = self._under_way[transactional_id] = anyio.CancelScope()
                    tasks.start_soon(self._end, transactional_id, scope)

    async def _end(self, transactional_id: str, scope: anyio.CancelScope) -> None:
        with scope:
            await self._until_ended(transactional_id)
        if self._under_way.get(transactional_id) is scope:
            del self._under_way[transactional_id]
            self._gone.discard(transactional_id)

    async def _until_ended(self, transactional_id: str) -> None:
        delay_s = _FIRST_RETRY_S
        while not self._may_not:
            try:
                was_open = await self._fence(transactional_id)
            except (RetriableError, ProducerFencedError) as error:  # fenced: another one was faster, or is at it
                if delay_s == _FIRST_RETRY_S:
                    logger.warning("ending what a worker that is gone has left open: %s; trying again", error)
                await self._clock.sleep(delay_s)
                delay_s = min(2 * delay_s, _MAX_RETRY_S)
            except AuthorizationError as error:
                self._warn(error)
            except StreamFlowError as error:
                logger.warning(
                    "what a worker that is gone has left open cannot be ended from here: %s. %s", error, _WAIT
                )
                return
            else:
                if was_open or delay_s > _FIRST_RETRY_S:  # an earlier try, which was told of, may have ended it
                    logger.info("what transactional id %s has left open is ended: its worker is gone", transactional_id)
                else:
                    logger.debug(
                        "transactional id %s is fenced: its worker is gone and has left nothing open", transactional_id
                    )
                return

    def _warn(self, error: AuthorizationError) -> None:
        if not self._may_not:
            logger.warning(
                "what a worker that is gone has left open cannot be ended from here: %s. %s; allow this user the "
                "transactional ids of all workers of the app",
                error,
                _WAIT,
            )
        self._may_not = True


def left_behind(before: Collection[Route], now: Collection[Route], own_id: str) -> set[str]:
    """The transactional ids that nobody says any more, and that this worker is to fence.

    Who has got one of its tasks does; and the first of those that were there before, for tasks that were on their way
    and for workers that have just come and do not know of it.

    Args:
        before: What was told before.
        now: What is told now.
        own_id: The transactional id of this worker.
    """
    mine = frozenset[TaskId]().union(*(route.active for route in now if route.transactional_id == own_id))
    said = _ids(now)
    is_first = min(_ids(before) & said, default="") == own_id
    return {
        route.transactional_id
        for route in before
        if route.transactional_id not in said and (is_first or mine & route.active)
    }


def _ids(routes: Collection[Route]) -> set[str]:
    return {route.transactional_id for route in routes}
