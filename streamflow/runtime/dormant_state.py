"""State of tasks that are not here at present: stores that lie in the slot and that nobody follows.

A task that comes back restores only what is left, so they count when tasks are assigned: each is as far behind as the
offsets between what it has and what the task has committed. How far a store is, is read once, before tasks are opened;
then it is known from whoever closes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import anyio.to_thread

from streamflow.clock import Clock
from streamflow.errors import StateCorruptedError, StateError
from streamflow.log.api import Admin
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.changelog_records import check_position
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.followed import Marks, is_followed, limit_of
from streamflow.runtime.layout import Layout
from streamflow.runtime.local_state import LocalStates
from streamflow.state.store import Checkpoint

logger = logging.getLogger("streamflow.standbys")


class DormantState:
    """The stores of a slot that nobody uses.

    Args:
        layout: How the app's work is cut into tasks.
        local: Where its stores are.
        admin: For the ends of changelogs.
        clock: Time.

    Attributes:
        lags: By task: how many offsets its store is behind, as of the last `measure` or of when it was closed.
        ran: Those whose task ran with all of its state until it was closed, which was after the last `measure`.
    """

    def __init__(self, layout: Layout, local: LocalStates, admin: Admin, clock: Clock) -> None:
        self._layout = layout
        self._subs = {sub.name: sub for sub in layout.sub_topologies if sub.tables}
        self._local = local
        self._admin = admin
        self._clock = clock
        self._stores: dict[TaskId, Checkpoint] = {}
        self.lags: dict[TaskId, int] = {}
        self.ran: set[TaskId] = set()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._stores)

    async def look(self) -> None:
        """Find the stores of the slot; only while none of them is open."""
        self._stores = await anyio.to_thread.run_sync(self._found)

    def _found(self) -> dict[TaskId, Checkpoint]:
        found: dict[TaskId, Checkpoint] = {}
        for sub in self._subs.values():
            for partition in range(max(self._layout.counts[topic] for topic in sub.topics)):
                try:
                    checkpoint = self._local.peek(sub, partition)
                except StateError as error:
                    logger.warning("%s; it counts as no state when tasks are assigned", error)
                    continue
                if checkpoint is not None:
                    found[TaskId(sub.name, partition)] = checkpoint
        return found

    def left(self, task: TaskId, checkpoint: Checkpoint, lag: int | None, *, ran: bool = False) -> None:
        """A store was closed.

        Args:
            task: Its task.
            checkpoint: How far it is.
            lag: How far behind it was then; None where that was not known.
            ran: Whether its task ran, with all of its state.
        """
        self.taken(task)
        self._stores[task] = checkpoint
        if ran:
            self.ran.add(task)
        elif lag is not None:
            self.lags[task] = lag

    def taken(self, task: TaskId) -> None:
        """A store is in use again."""
        self._stores.pop(task, None)
        self.lags.pop(task, None)
        self.ran.discard(task)

    def noted(self) -> dict[TaskId, Checkpoint]:
        """The stores as they are now, for `measure`."""
        return dict(self._stores)

    async def measure(self, stores: Mapping[TaskId, Checkpoint], marks: Marks) -> None:
        """Find out how far behind they are.

        Args:
            stores: What was `noted`.
            marks: The group's committed offsets, looked up after that.

        Raises:
            RetriableError: The log does not answer.
        """
        tables = {task: [each for each in self._tables(task[0]) if is_followed(each)] for task in stores}
        changelogs = {_tp(each, task[1]) for task, of_task in tables.items() for each in of_task}
        partitions = sorted(changelogs)
        starts = await self._admin.start_offsets(partitions) if partitions else {}
        ends = await self._admin.high_watermarks(partitions) if partitions else {}
        for task, checkpoint in stores.items():
            if self._stores.get(task) is not checkpoint:
                continue  # it was taken meanwhile, and maybe left again: what is noted of that is newer
            lag = self._lag(task, checkpoint, tables[task], marks, starts, ends) if partitions else 0
            self.left(task, checkpoint, lag)

    def _tables(self, sub: str) -> list[Table[Any, Any]]:
        return self._local.tables_of(self._subs[sub])

    def _lag(
        self,
        task: TaskId,
        checkpoint: Checkpoint,
        tables: Iterable[Table[Any, Any]],
        marks: Marks,
        starts: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
    ) -> int | None:
        """None for a store that cannot be gone on with, or whose task has committed nothing."""
        mark = CommitMark.of_task({tp: marks.get(tp) for tp in self._sources(self._subs[task[0]], task[1])})
        if mark is None:
            return None
        away_ms = self._clock.now_ms() - checkpoint.caught_up_at_ms
        lag = 0
        for table in tables:
            tp = _tp(table, task[1])
            position = checkpoint.changelogs.get(table.name, 0)
            limit = limit_of(table, task[1], mark, marks)
            end = ends[tp] if limit is None else min(limit, ends[tp])
            try:
                check_position(tp, position, starts[tp], end, away_ms, self._local.stale_after_ms(table), committed=end)
            except StateCorruptedError:
                return None
            lag += end - max(position, starts[tp])
        return max(0, lag)

    def _sources(self, sub: SubTopology, partition: int) -> list[TopicPartition]:
        return self._layout.of_task(sub, partition)


def _tp(table: Table[Any, Any], partition: int) -> TopicPartition:
    return TopicPartition(table.changelog.name, partition)
