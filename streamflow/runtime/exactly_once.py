"""Exactly once: one atomic commit over outputs, changelogs and offsets of all tasks.

A commit does not stop the work: what it holds is sealed, and processing goes on while the log answers. What was sealed
is sent unchanged until the log has decided, and before anything newer. Where the outcome is unknown, a new producer
with the same id settles it, and the commit id in the stable committed offsets tells which way. A producer that was
fenced, as this worker was taken for dead, is replaced: whether its tasks are still its own, the membership tells.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Self

import anyio

from streamflow.clock import Clock
from streamflow.errors import (
    ConfigurationError,
    FatalError,
    IndeterminateCommitError,
    ProducerFencedError,
    ProductionError,
    RetriableError,
    TaskMigratedError,
)
from streamflow.log.api import Admin, AtomicCommit, Group, Membership, TransactionalProducer
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit import FIRST_RETRY_S, Commits, Offsets
from streamflow.runtime.commit_mark import CommitMark, new_commit_id
from streamflow.runtime.task_view import Sealed, TaskView
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.commits")

_CHANGE_PATIENCE_S = 10.0
_CHANGE_POLL_S = 0.02
# As many as have got tasks of one that they take for dead may fence it, once each; a double does so at every commit.
_MAX_FENCES = 10

OpenProducer = Callable[[str], AbstractAsyncContextManager[TransactionalProducer]]


@dataclass(slots=True)
class _Taken:
    """What one commit holds, of all tasks."""

    id: str
    sealed: list[Sealed]

    def drop_lost(self) -> None:
        """Leave out the tasks that have gone."""
        self.sealed = [each for each in self.sealed if not each.task.lost]


class ExactlyOnce(Commits):
    """One atomic commit over outputs, changelogs and offsets.

    Args:
        transactional_id: This worker's, which no other one has.
        open_producer: Opens a producer with a transactional id.
        admin: For the ends of changelogs after a commit whose answer was lost.
        group: See `Commits`.
        sensors: See `Commits`.
        clock: See `Commits`.

    Attributes:
        transactional_id: See above.
        patience_s: How long a commit that the log refuses waits for the group to say why, in seconds.
    """

    def __init__(
        self,
        transactional_id: str,
        open_producer: OpenProducer,
        admin: Admin,
        group: Callable[[], Group],
        sensors: Sensors,
        clock: Clock,
    ) -> None:
        super().__init__(group, sensors, clock)
        self.transactional_id = transactional_id
        self._open_producer = open_producer
        self._admin = admin
        self._opened = AsyncExitStack()
        self._producer: TransactionalProducer | None = None
        self.patience_s = _CHANGE_PATIENCE_S
        # What the group's membership was when the commit that is first in line was tried.
        self._tried: Membership | None = None
        # Sealed and not yet with the log: they are first in line, also when the commit that took them was cancelled.
        self._taken: deque[_Taken] = deque()
        # Whether it is unknown if the first of them was stored, also when whoever looks for the answer was cancelled.
        self._is_outcome_unknown = False
        # The producer stores nothing any more.
        self._is_fenced = False
        # As which member this worker was fenced last, and how often.
        self._fenced_as, self._fences = "", 0

    async def __aenter__(self) -> Self:
        self._producer = await self._opened.enter_async_context(self._open_producer(self.transactional_id))
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._opened.aclose()

    def abandon(self) -> None:
        """Wait no longer for the log's answer: the process has to end. The next one with this id learns the outcome."""
        if self._producer is not None:
            self._producer.abandon()

    async def idle(self, task: TaskView) -> None:
        """Nothing leaves before its commit."""

    async def linger(self, tasks: Iterable[TaskView]) -> None:
        """Nothing leaves before its commit."""

    async def make_room(self, task: TaskView) -> None:
        """Ask for a commit and wait for it."""
        await self._next_commit()

    async def commit(self, tasks: Iterable[TaskView]) -> None:
        """See `Delivery`."""
        async with self._one_at_a_time:
            sealed = [each for task in tasks if not task.lost and (each := task.seal())]
            if sealed:
                self._taken.append(_Taken(new_commit_id(), sealed))
            delay_s = FIRST_RETRY_S
            while self._taken:
                if self.trying_since_s is None:
                    self.trying_since_s = self._clock.monotonic()
                try:
                    if self._is_outcome_unknown:
                        await self._settle_unknown()
                    else:
                        if self._is_fenced:
                            await self._until_answered(self._replace_producer)
                        await self._commit_first()
                except TaskMigratedError as error:
                    await self._migrated(error)
                except IndeterminateCommitError as error:
                    self._is_outcome_unknown = True
                    self._sensors.commit_failed(type(error).__name__)
                    logger.warning("commit: %s; finding out whether it was stored", error)
                except RetriableError as error:
                    if self._is_explained():
                        self._sensors.commit_failed(type(error).__name__)
                    else:
                        delay_s = await self._back_off(error, delay_s)
            self.trying_since_s = None
            self._committed.set()

    def _is_explained(self) -> bool:
        """Whether a rebalance has ended since the commit was tried, so that it goes again without a pause."""
        now = self._group().membership
        return not self._is_outcome_unknown and now is not None and now != self._tried

    async def _commit_first(self) -> None:
        """Commit what is first in line, under the membership of now."""
        taken = self._taken[0]
        self._let_go_of_others(each.task for each in taken.sealed)
        taken.drop_lost()
        if taken.sealed:
            self._tried = self._group().membership
            await self._commit_owned(taken, self._membership())
        self._taken.popleft()

    async def _commit_owned(self, taken: _Taken, membership: Membership) -> None:
        await self._keep_owned(taken.sealed, membership.generation)
        taken.drop_lost()
        if not taken.sealed:
            return
        started_s = perf_counter()
        offsets = {tp: mark for each in taken.sealed for tp, mark in each.marked(taken.id).items()}
        outputs = [batch for each in taken.sealed for batch in each.batches]
        for each in taken.sealed:
            each.task.commit_ids_under_way.add(taken.id)
        ends = await self._store(AtomicCommit(outputs, offsets, membership))
        self._is_committed(taken, offsets, ends, started_s)

    async def _store(self, commit: AtomicCommit) -> Mapping[TopicPartition, int]:
        if self._producer is None:
            raise FatalError("exactly once: committed before the producer was opened")
        try:
            return await self._producer.commit(commit)
        except ProductionError as error:
            raise FatalError(f"an output could not be written: {error}") from error
        except ProducerFencedError as error:
            self._is_fenced = True
            if self._group().membership is not None:
                self._count_fence(commit.membership, error)
            logger.warning("commit: %s; a new producer takes its place", error)
            if self._group().membership is None:
                raise TaskMigratedError(str(error)) from error
            raise RetriableError(str(error)) from error

    def _count_fence(self, membership: Membership | None, error: ProducerFencedError) -> None:
        """Tell who was taken for dead from who has a double, by which it is fenced again and again.

        Who was taken for dead is a new member of the group from then on, and was fenced a few times at once: by those
        that have got its tasks.

        Raises:
            ConfigurationError: It has a double.
        """
        member_id = "" if membership is None else membership.member_id
        self._fences = self._fences + 1 if member_id == self._fenced_as else 1
        self._fenced_as = member_id
        if self._fences >= _MAX_FENCES:
            raise ConfigurationError(
                f"{error}. That was so {self._fences} times while this worker was a member of its group, so another "
                "process has the same slot: the data directory was copied, or two workers on different machines share "
                "it. Give each its own data_dir"
            ) from error

    def _membership(self) -> Membership:
        current = self._group().membership
        if current is None:
            raise TaskMigratedError("not a member of the group at present")
        return current

    def _is_committed(
        self, taken: _Taken, offsets: Offsets, ends: Mapping[TopicPartition, int], started_s: float
    ) -> None:
        for each in taken.sealed:
            each.committed(taken.id, ends)
            self._sent(each.batches)
        self._succeeded(started_s, offsets)

    # --- when it does not succeed ------------------------------------------------------------------------------

    async def _migrated(self, error: TaskMigratedError) -> None:
        """The log refuses the membership: wait for what the group has to say, then find out whose partitions are gone.

        A rebalance under way ends with a new generation (the commit is sent again under it) or with the loss of tasks
        (the commit is sent without them). Where neither comes, each task is tried alone; one that is refused alone
        starts anew.
        """
        self._sensors.commit_failed(type(error).__name__)
        if await self._has_group_changed():
            return
        taken = self._taken.popleft()
        if len(taken.sealed) > 1:
            self._taken.extendleft(_Taken(taken.id, [each]) for each in reversed(taken.sealed))
            return
        for each in taken.sealed:
            logger.warning("task %s has gone to another worker; what it had is dropped: %s", each.task.name, error)
            self._is_overtaken(each.task)

    async def _has_group_changed(self) -> bool:
        sealed, before = self._taken[0].sealed, self._tried
        with anyio.move_on_after(self.patience_s):
            while True:
                now = self._group().membership
                if (now is not None and now != before) or any(each.task.lost for each in sealed):
                    return True
                await anyio.sleep(_CHANGE_POLL_S)
        return False

    async def _settle_unknown(self) -> None:
        """Learn whether the first commit in line was stored; if it was not, it is sent again."""
        started_s = perf_counter()
        await self._until_answered(self._replace_producer)
        taken = self._taken[0]
        taken.drop_lost()
        anchors = [each.task.anchor for each in taken.sealed]
        if not anchors:
            self._is_outcome_unknown = False
            return
        # The ends come first: where the marks are still this commit's, nothing of another worker's is below them.
        changelogs = [tp for each in taken.sealed if each.task.tables for tp in each.task.tables.changelogs()]
        ends = await self._until_answered(lambda: self._admin.end_offsets(changelogs)) if changelogs else {}
        marks = await self._until_answered(lambda: self._group().committed(anchors))
        self._is_outcome_unknown = False
        stored = [each for each in taken.sealed if CommitMark.of(marks[each.task.anchor]).id == taken.id]
        if not stored:
            logger.warning("commit: it was not stored, and is sent again")
            return
        logger.info("commit: it was stored")
        for each in taken.sealed:
            if each not in stored:
                self._is_committed_elsewhere(each.task)
        taken.sealed = stored
        self._is_committed(taken, {tp: mark for each in stored for tp, mark in each.marks.items()}, ends, started_s)
        self._taken.popleft()

    async def _replace_producer(self) -> None:
        self._producer = None
        await self._opened.aclose()
        self._opened = AsyncExitStack()
        self._producer = await self._opened.enter_async_context(self._open_producer(self.transactional_id))
        self._is_fenced = False
