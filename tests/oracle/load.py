"""What feeds the oracle's workers: numbers in large batches, so that feeding takes little of the machine."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from streamflow.clock import SystemClock
from streamflow.log.api import Log
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import NONE
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition
from tests.oracle.app import KEYS, made_number

_TICK_S = 0.05
_MAX_BATCH_BYTES = 1 << 18


class Load:
    """Writes numbers at an even rate; what could not be written while the log was away follows at once.

    Args:
        log: Where to.
        topic: Which topic.
        partitions: How many it has.
        dice: Makes the keys and what is random in the values.
        per_s: How many a second.
        total: How many in all; None: until it is stopped.
        is_far_ahead: Asked now and then; nothing is written while it says so.
    """

    def __init__(
        self,
        log: Log,
        topic: str,
        partitions: int,
        dice: random.Random,
        *,
        per_s: int,
        total: int | None = None,
        is_far_ahead: Callable[[], bool] = lambda: False,
    ) -> None:
        self._log = log
        self._dice = dice
        self._per_s = per_s
        self._total = total
        self._is_far_ahead = is_far_ahead
        tps = [TopicPartition(topic, number) for number in range(partitions)]
        self._homes = {key: tps[partition_for(key, partitions)] for key in (b"k%d" % number for number in range(KEYS))}
        self.sent = 0
        """Written and acknowledged."""

    @property
    def is_done(self) -> bool:
        return self.sent == self._total

    async def run(self, stop: asyncio.Event) -> None:
        """Write until `stop` is set or all are written."""
        began_s = time.monotonic()
        async with self._log.producer() as producer:
            while not (stop.is_set() or self.is_done):
                due = round((time.monotonic() - began_s) * self._per_s) - self.sent
                count = 0 if self._is_far_ahead() else min(max(due, 0), self._per_s)
                if self._total is not None:
                    count = min(count, self._total - self.sent)
                for tp, builder in self._batches(count):
                    await producer.enqueue(tp, builder.seal())
                await producer.flush()
                self.sent += count
                await asyncio.sleep(_TICK_S)

    def _batches(self, count: int) -> list[tuple[TopicPartition, BatchBuilder]]:
        open_ones: dict[TopicPartition, BatchBuilder] = {}
        made: list[tuple[TopicPartition, BatchBuilder]] = []
        at_ms = SystemClock().now_ms()
        for sequence in range(self.sent, self.sent + count):
            key, number = made_number(sequence, self._dice)
            tp = self._homes[key]
            data = number.to_bytes(8, "big", signed=True)
            builder = open_ones.get(tp)
            if builder is None or not builder.append(at_ms, key, data, []):
                builder = open_ones[tp] = BatchBuilder(NONE, _MAX_BATCH_BYTES)
                builder.append(at_ms, key, data, [])
                made.append((tp, builder))
        return made
