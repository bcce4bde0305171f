"""Deletes what has been processed from repartition topics: nobody else reads them, and nothing else deletes it.

Invariant: only what lies below an offset that this member has committed, of a partition that it still owns, is deleted:
a record is gone only when all that follows from it is in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from streamflow.clock import Clock
from streamflow.errors import StreamFlowError
from streamflow.log.api import Admin
from streamflow.model.record import TopicPartition

logger = logging.getLogger("streamflow.purge")

PURGE_INTERVAL_S = 30.0


class Committed(Protocol):
    """A task, as far as it matters here."""

    committed: dict[TopicPartition, int]
    lost: bool


class Purge:
    """Purges the repartition topics of one worker's tasks.

    Args:
        admin: Deletes records.
        clock: For the interval.
        topics: Names of the repartition topics.
        tasks: The tasks this worker owns now.
    """

    def __init__(
        self, admin: Admin, clock: Clock, topics: Iterable[str], tasks: Callable[[], Iterable[Committed]]
    ) -> None:
        self._admin = admin
        self._clock = clock
        self._topics = frozenset(topics)
        self._tasks = tasks
        self._purged: dict[TopicPartition, int] = {}

    async def run(self) -> None:
        """Purge every 30 s until cancelled."""
        while self._topics:
            await self._clock.sleep(PURGE_INTERVAL_S)
            await self.purge()

    async def purge(self) -> None:
        """Purge now; what cannot be deleted is logged, and tried again the next time."""
        before = self._deletable()
        if not before:
            return
        try:
            await self._admin.delete_records(before)
        except StreamFlowError as error:
            logger.warning("purging %s: %s; trying again later", ", ".join(map(str, sorted(before))), error)
        else:
            self._purged.update(before)

    def _deletable(self) -> Mapping[TopicPartition, int]:
        return {
            tp: offset
            for task in self._tasks()
            if not task.lost
            for tp, offset in task.committed.items()
            if tp.topic in self._topics and offset > self._purged.get(tp, 0)
        }
