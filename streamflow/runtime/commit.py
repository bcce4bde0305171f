"""Commits: what both processing guarantees share; `exactly_once.py` and `at_least_once.py` make them.

Invariant of both: positions, outputs and table changes are taken from a task in one step without an await between, so
the offsets never pass a record whose effects are not in the same commit or acknowledged before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter

from streamflow.clock import Clock
from streamflow.log.api import Group, OffsetMark
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.commits")

FIRST_RETRY_S = 0.02
_MAX_RETRY_S = 1.0
_TELL_FROM_S = 0.25

Offsets = dict[TopicPartition, OffsetMark]


class Commits:
    """What both guarantees share: one commit at a time, retried until the log answers.

    Args:
        group: The current group membership, asked at each try.
        sensors: Metrics hooks.
        clock: For back-off.

    Attributes:
        wanted: Set when a commit is wanted before the interval is over.
        last_commit_s: Monotonic time of the last commit; None before the first.
        trying_since_s: Since when a commit is being tried; None while none is.
        generation: Of the last assignment the task manager has acted on.
    """

    def __init__(self, group: Callable[[], Group], sensors: Sensors, clock: Clock) -> None:
        self._group = group
        self._sensors = sensors
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self.wanted = asyncio.Event()
        self.last_commit_s: float | None = None
        self.trying_since_s: float | None = None
        self.generation = -1

    def _sent(self, batches: Iterable[tuple[TopicPartition, SealedBatch]]) -> None:
        for tp, batch in batches:
            self._sensors.batch_out(tp.topic, batch.num_records, batch.size_bytes)

    def _succeeded(self, started_s: float, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        self.last_commit_s = self._clock.monotonic()
        if offsets:
            self._sensors.committed(perf_counter() - started_s, len(offsets))

    def hurry(self) -> None:
        """Commit soon: somebody waits for an answer."""
        self.wanted.set()

    async def _back_off(self, error: Exception, delay_s: float) -> float:
        """Wait before the next try; returns how long to wait before the one after it."""
        self._sensors.commit_failed(type(error).__name__)
        if _TELL_FROM_S <= delay_s < 2 * _TELL_FROM_S:  # once per commit, and not for what passes at once
            logger.warning("commit: %s; trying again until it succeeds", error)
        await self._clock.sleep(delay_s)
        return min(delay_s * 2, _MAX_RETRY_S)
