"""What was fetched goes to its task; a partition whose records are gone goes on where it may."""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio.abc

from streamflow.config import Settings
from streamflow.errors import FatalError, OffsetOutOfRangeError, RetriableError, TopologyError, UnknownTopicError
from streamflow.log.api import Fetched, Reader
from streamflow.model.record import TopicPartition
from streamflow.runtime.task import Surroundings, Task
from streamflow.runtime.task_starts import TaskStarts

logger = logging.getLogger("streamflow.tasks")

_RETRY_S = 0.2


class Arrivals:
    """What comes over the source lane of one worker.

    Args:
        starts: Where partitions start.
        reader: The lane.
        shared: What tasks share.
        settings: For messages.
        task_of: The task that owns a partition now; None where it has none.
    """

    def __init__(
        self,
        starts: TaskStarts,
        reader: Reader,
        shared: Surroundings,
        settings: Settings,
        task_of: Callable[[TopicPartition], Task | None],
    ) -> None:
        self._starts = starts
        self._reader = reader
        self._shared = shared
        self._settings = settings
        self._task_of = task_of

    def take(self, fetched: Fetched, resets: anyio.abc.TaskGroup) -> None:
        """Give a fetch to its task.

        Args:
            fetched: What came.
            resets: Task group in which the start of a partition is looked for, so that no other one waits for it.
        """
        task = self._task_of(fetched.tp)
        if task is None:
            return
        if isinstance(fetched.error, OffsetOutOfRangeError):
            task.inputs.by_tp[fetched.tp].is_out_of_range = True  # so nothing is asked, and this comes once
            resets.start_soon(self._out_of_range, task, fetched.tp, fetched.error)
        elif isinstance(fetched.error, UnknownTopicError):
            raise UnknownTopicError(
                f"{fetched.error}: topic {fetched.tp.topic!r} was deleted while this worker read it. What "
                "was committed stays as it is. If the topic shall be there, start it again: it makes the topic anew, "
                "empty; else take what needs it out of the app"
            ) from fetched.error
        elif fetched.error is not None:
            raise fetched.error if isinstance(fetched.error, FatalError) else FatalError(str(fetched.error))
        else:
            if fetched.batches:
                self._shared.sensors.batches_in(fetched.tp, len(fetched.batches), fetched.size_bytes)
            task.inputs.add(fetched)

    async def _out_of_range(self, task: Task, tp: TopicPartition, error: OffsetOutOfRangeError) -> None:
        """Records were deleted before they were read: go on as for a partition without offset, and say so.

        Not so with tables, which would stand for records that nobody has seen, or for some twice. And not where another
        worker is done with the records, and this one, which was cut off, has not heard that it lost the task.
        """
        if await self._is_done_elsewhere(task, tp, error) or self._task_of(tp) is not task:
            return
        if task.tables is not None:
            self._shared.fail(_out_of_range_with_tables(task, tp, error))
            return
        position = await self._new_start(task, tp)
        if position is None or self._task_of(tp) is not task:
            return  # it has gone to another worker, who finds out as well
        logger.error(
            "%s; going on at %d as auto_offset_reset=%s says: records in between were deleted before this app read "
            "them, or the topic was made anew",
            error,
            position,
            self._settings.auto_offset_reset,
        )
        task.inputs.by_tp[tp].move_to(position)
        task.inputs.wake()
        self._reader.add(tp, position)
        self._reader.ask(tp)

    async def _is_done_elsewhere(self, task: Task, tp: TopicPartition, error: OffsetOutOfRangeError) -> bool:
        """Whether another worker has committed what is asked for here; the task is told to start anew then."""
        mark = (await self._starts.committed([tp]))[tp]
        if mark is None or mark.offset <= error.offset:
            return False
        return await self._shared.delivery.was_overtaken(task)

    async def _new_start(self, task: Task, tp: TopicPartition) -> int | None:
        """Ask until the log answers; None when the task has let the partition go meanwhile."""
        while self._task_of(tp) is task:
            try:
                return (await self._starts.begin([tp]))[tp]
            except RetriableError as unanswered:
                logger.warning("looking for the start of %s: %s; trying again", tp, unanswered)
                await self._shared.clock.sleep(_RETRY_S)
        return None


def _out_of_range_with_tables(task: Task, tp: TopicPartition, error: OffsetOutOfRangeError) -> TopologyError:
    names = ", ".join(task.sub_topology.tables)
    if error.offset < error.log_start:
        what = f"{error.log_start - error.offset} records were deleted before this app read them"
        way = f"commit offset {error.log_start} to go on without them"
    else:
        what = "the topic was made anew, or has lost records"
        way = f"commit an offset within {error.log_start}..{error.end_offset} to go on with the tables as they are"
    return TopologyError(
        f"{error}: {what}, and the tables {names} would not be what their input says. Stop all workers and choose: "
        f"{way} (`kafka-consumer-groups --reset-offsets --to-offset` on Kafka), or start the app over, "
        "`streamflow reset APP`"
    )
