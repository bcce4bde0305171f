"""Where tasks start: at what the log has committed, or where the settings say."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamflow.clock import Clock
from streamflow.config import Settings
from streamflow.errors import RetriableError
from streamflow.log.api import OffsetMark, TopicDescription
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.runtime.beginnings import beginnings
from streamflow.runtime.layout import Layout
from streamflow.runtime.open_log import OpenLog

logger = logging.getLogger("streamflow.tasks")

_RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Start:
    """Where a partition starts.

    Attributes:
        position: The next offset to process.
        mark: What is committed; None where nothing is.
    """

    position: int
    mark: OffsetMark | None


class TaskStarts:
    """Asks the log, until it answers, where partitions start.

    Args:
        log: What is open of it.
        app: The app.
        settings: Its settings.
        layout: What partitions there were when this worker started.
        clock: Time.
    """

    def __init__(self, log: OpenLog, app: Declarations, settings: Settings, layout: Layout, clock: Clock) -> None:
        self._group = log.group
        self._admin = log.admin
        self._app = app
        self._settings = settings
        self._counts = layout.counts
        self._clock = clock

    def is_new(self, tp: TopicPartition) -> bool:
        """Whether a partition was added since this worker started."""
        return tp.partition >= self._counts[tp.topic]

    async def of(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Start]:
        """Where partitions start, and what the log has committed for them."""
        committed = await self.committed(partitions)
        missing = [tp for tp in partitions if committed[tp] is None]
        while True:
            try:
                fresh = await self.begin(missing)
                break
            except RetriableError as error:
                logger.warning("looking for the starts of partitions: %s; trying again", error)
                await self._clock.sleep(_RETRY_S)
        starts = {tp: Start(position, None) for tp, position in fresh.items()}
        starts.update({tp: Start(mark.offset, mark) for tp, mark in committed.items() if mark is not None})
        return starts

    async def committed(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, OffsetMark | None]:
        """What the group has committed; None where it has nothing."""
        while True:
            try:
                return await self._group.committed(partitions)
            except RetriableError as error:
                logger.warning("reading committed offsets: %s; trying again", error)
                await self._clock.sleep(_RETRY_S)

    async def described(self, topics: Sequence[str]) -> Mapping[str, TopicDescription]:
        """Topics as they are in the log now."""
        while True:
            try:
                return await self._admin.describe(topics)
            except RetriableError as error:
                logger.warning("looking at changelogs: %s; trying again", error)
                await self._clock.sleep(_RETRY_S)

    async def begin(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where partitions without an offset start.

        Raises:
            RetriableError: The log does not answer.
        """
        return await beginnings(self._admin, self._app, self._settings, partitions, self.is_new)
