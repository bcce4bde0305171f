"""Commits: what both processing guarantees share; `exactly_once.py` and `at_least_once.py` make them.

Invariant of both: positions, outputs and table changes are taken from a task in one step without an await between, so
the offsets never pass a record whose effects are not in the same commit or acknowledged before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import TypeVar

from streamflow.clock import Clock
from streamflow.errors import RetriableError
from streamflow.log.api import Group, OffsetMark
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.task_view import Sealed, TaskView
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.commits")

FIRST_RETRY_S = 0.02
_MAX_RETRY_S = 1.0
_TELL_FROM_S = 0.25

T = TypeVar("T")
Offsets = dict[TopicPartition, OffsetMark]


class Commits:
    """What both guarantees share: one commit at a time, retried until the log answers.

    Args:
        group: The current group membership, asked at each try.
        sensors: Metrics hooks.
        clock: For back-off.

    Attributes:
        transactional_id: What its commits are fenced by; empty where there is none.
        wanted: Set when a commit is wanted before the interval is over.
        last_commit_s: Monotonic time of the last commit; None before the first.
        trying_since_s: Since when a commit is being tried; None while none is.
        overtaken: Told of a task that another worker has had in between: it is to be opened anew.
    """

    transactional_id: str = ""

    def __init__(self, group: Callable[[], Group], sensors: Sensors, clock: Clock) -> None:
        self._group = group
        self._sensors = sensors
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self.wanted = asyncio.Event()
        self._committed = asyncio.Event()
        self.last_commit_s: float | None = None
        self.trying_since_s: float | None = None
        self.overtaken: Callable[[TaskView], None] = _nobody_is_told

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

    async def _next_commit(self) -> None:
        """Ask for a commit and wait until one was made."""
        self._committed.clear()
        self.wanted.set()
        await self._committed.wait()

    def _let_go_of_others(self, tasks: Iterable[TaskView]) -> None:
        """Mark the tasks lost whose partitions are not all this member's now.

        Their event may be still to come, and their partitions may be back before it; whoever had them in between was
        free to commit, also in a generation in which this member looked already. So nothing of them may be committed.
        """
        assignment = self._group().assignment
        for task in tasks:
            if not task.lost and not assignment.issuperset(task.committed):
                logger.warning("task %s has gone to another worker; what it had is dropped", task.name)
                self._is_overtaken(task)

    async def _keep_owned(self, sealed: Sequence[Sealed], generation: int) -> None:
        """Make sure, once per generation, that nobody else has committed for these tasks meanwhile.

        A partition may leave and come back while this member hears of neither; what it goes on with then stands on old
        positions. The commit id in the log tells: it has to be the task's own last one, or one of those whose answers
        were lost. Tasks it does not fit are marked lost, and told. They have to be this member's in that generation
        already: until it has them, another one may commit.
        """
        tasks = {each.task.anchor: each.task for each in sealed if each.task.checked_generation != generation}
        if not tasks:
            return
        marks = await self._group().committed(list(tasks))
        for tp, task in tasks.items():
            commit_id = CommitMark.of(marks[tp]).id
            if commit_id == task.commit_id or commit_id in task.commit_ids_under_way or task.lost:
                task.checked_generation = generation
            else:
                self._is_committed_elsewhere(task)

    async def was_overtaken(self, task: TaskView) -> bool:
        """Look up whether another worker has committed for a task since it was opened; then it is lost, and told."""
        marks = await self._until_answered(lambda: self._group().committed([task.anchor]))
        commit_id = CommitMark.of(marks[task.anchor]).id
        if commit_id == task.commit_id or commit_id in task.commit_ids_under_way:
            return False
        self._is_committed_elsewhere(task)
        return True

    def _is_committed_elsewhere(self, task: TaskView) -> None:
        logger.warning("task %s: another worker has committed for it meanwhile; it starts anew", task.name)
        self._is_overtaken(task)

    def _is_overtaken(self, task: TaskView) -> None:
        task.lost = True
        self.overtaken(task)

    async def _back_off(self, error: Exception, delay_s: float) -> float:
        """Wait before the next try; returns how long to wait before the one after it."""
        self._sensors.commit_failed(type(error).__name__)
        if _TELL_FROM_S <= delay_s < 2 * _TELL_FROM_S:  # once per commit, and not for what passes at once
            logger.warning("commit: %s; trying again until it succeeds", error)
        await self._clock.sleep(delay_s)
        return min(delay_s * 2, _MAX_RETRY_S)

    async def _until_answered(self, call: Callable[[], Awaitable[T]]) -> T:
        delay_s = FIRST_RETRY_S
        while True:
            try:
                return await call()
            except RetriableError as error:
                delay_s = await self._back_off(error, delay_s)


def _nobody_is_told(_: TaskView) -> None:
    """The task manager has not come yet."""
