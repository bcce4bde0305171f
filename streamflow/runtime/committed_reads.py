"""Committed values of the tables that this worker holds, for whoever asks from outside.

An answer is given under the assignment in force: the task is this worker's, its tables are restored, and the group has
heard of this worker within a session, so that nobody else can have been given the task. That holds before the read and
after it, so it held throughout. A process that was stopped and wakes up does not pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import anyio
import anyio.to_thread

from streamflow.errors import ConfigurationError, RecordError, StateCorruptedError, StreamFlowError
from streamflow.log.api import Group
from streamflow.model.position import positions_of, text_of
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.processing.set_table import Pairs
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.layout import Layout
from streamflow.runtime.read_question import Answer, Question
from streamflow.runtime.task import Task
from streamflow.runtime.task_manager import TaskManager
from streamflow.state.keys import ByteRange
from streamflow.state.overlay import Overlay
from streamflow.state.values import MISSING

MOST_ROWS = 1_000
_MOST_BYTES = 4 * 1024 * 1024
_POLL_S = 0.01
_SCANS = 4


class Misdirected(StreamFlowError):
    """Another worker has the partition, or gets it."""


class NotReadableYet(StreamFlowError):
    """The partition is this worker's, and cannot be read at present."""


class UnknownTable(StreamFlowError):
    """The app has no such table."""


class CommittedReads:
    """Reads of what one worker holds.

    Args:
        app: The app.
        layout: How its work is cut into tasks.
        manager: The worker's tasks.
        group: Its membership.
        session_timeout_s: Silence after which the group gives its tasks to others.
    """

    def __init__(
        self, app: Declarations, layout: Layout, manager: TaskManager, group: Group, session_timeout_s: float
    ) -> None:
        self._app = app
        self._manager = manager
        self._group = group
        self._session_timeout_s = session_timeout_s
        self._layout = layout
        self._subs = {name: sub for sub in layout.sub_topologies for name in sub.tables}
        # Scans wait for the disk in threads, of which others need some, too.
        self._scans = anyio.CapacityLimiter(_SCANS)

    def table(self, name: str) -> tuple[Table[Any, Any], SubTopology]:
        """A table and what it is processed with.

        Raises:
            UnknownTable: The app has none of that name, or no agent uses it.
        """
        table, sub = self._app.tables.get(name), self._subs.get(name)
        if table is None or sub is None:
            raise UnknownTable(f"app {self._app.id!r} has no table {name!r}")
        return table, sub

    def owns(self, sub: SubTopology, partition: int) -> bool:
        """Whether a task is assigned to this worker, open or not."""
        wanted = self._layout.of_task(sub, partition)
        return bool(wanted) and self._group.assignment.issuperset(wanted)

    def has_copy(self, sub: SubTopology, partition: int) -> bool:
        """Whether this worker has a standby of a task."""
        return False

    def check_positions(self, table: Table[Any, Any], sub: SubTopology, at: str) -> None:
        """Refuse positions that this table never comes to.

        Raises:
            ConfigurationError: One is of a topic that does not fill it.
        """
        known = {*sub.topics, table.changelog.name}
        for tp in positions_of(at):
            if tp.topic not in known:
                raise ConfigurationError(
                    f"the position {tp.topic}:{tp.partition} is of a topic that agents of table {table.name!r} do not "
                    f"read; it knows {', '.join(sorted(known))}. What is sent to a topic before these may still be on "
                    "its way there"
                )

    async def answer(self, question: Question) -> Answer:
        """Read.

        Args:
            question: What, of partitions that this worker holds.

        Raises:
            UnknownTable: There is no such table.
            Misdirected: One of the partitions is not this worker's.
            NotReadableYet: One cannot be read within the time that the question gives.
            ConfigurationError: The question does not fit the table.
        """
        table, sub = self.table(question.table)
        if question.order != table.keys_in_order.name:
            raise ConfigurationError(
                f"table {table.name!r}: the asker writes its keys in another way: another version?"
            )
        at = positions_of(question.at)
        key = None if question.key is None else key_of(table, question.key)
        give_up_s = anyio.current_time() + question.timeout_s
        tasks = [await self._held(table, sub, number, at, give_up_s) for number in question.partitions]
        position = text_of(_union(task.committed_positions(table.name) for task in tasks))
        overlays = [_tables(task).overlays[table.name] for task in tasks]
        try:
            if question.key is not None:
                rows, is_complete = _value(key, overlays, question.key), True
            else:
                span = bounds_of(table, question)
                rows, is_complete = await anyio.to_thread.run_sync(
                    _scan, overlays, span, question.limit, limiter=self._scans
                )
        except StreamFlowError as error:
            self._check_still(sub, tasks)
            raise NotReadableYet(str(error)) from error
        self._check_still(sub, tasks)
        return Answer(rows, is_complete, position)

    async def _held(
        self,
        table: Table[Any, Any],
        sub: SubTopology,
        partition: int,
        at: Mapping[TopicPartition, int],
        give_up_s: float,
    ) -> Task:
        """A task whose tables can be read and have come far enough."""
        while True:
            try:
                task = self._standing(sub, partition)
                behind = _behind(task.committed_positions(table.name), at)
                if behind is None:
                    return task
                error = NotReadableYet(f"partition {partition} of table {table.name!r} has not come to {behind} yet")
            except NotReadableYet as exc:
                error = exc
            left_s = give_up_s - anyio.current_time()
            if left_s <= 0:
                raise error
            await anyio.sleep(min(left_s, _POLL_S))

    def _standing(self, sub: SubTopology, partition: int) -> Task:
        """A task that may be read now."""
        if self._group.membership is None or not self.owns(sub, partition):
            raise Misdirected(f"partition {partition} of {', '.join(sub.topics)} is not this worker's")
        age_s = self._group.statistics().last_heartbeat_age_s
        if age_s is None or age_s >= self._session_timeout_s:
            raise NotReadableYet("this worker was not heard of in its group for a session")
        task = self._manager.tasks.get((sub.name, partition))
        if task is None or not task.is_readable:
            raise NotReadableYet(
                f"partition {partition} of {', '.join(sub.topics)} is being opened, restored or closed"
            )
        return task

    def _check_still(self, sub: SubTopology, tasks: list[Task]) -> None:
        for task in tasks:
            if self._standing(sub, task.partition) is not task:
                raise NotReadableYet(f"task {task.name} was opened anew while it was read")


def bounds_of(table: Table[Any, Any], question: Question) -> ByteRange:
    """The range of stored keys that is asked for.

    Raises:
        ConfigurationError: A key that is no key of the table.
    """
    if question.under is None:
        return question.low, question.high
    if not isinstance(table, Pairs):
        raise ConfigurationError(f"table {table.name!r} is no set table")
    try:
        low, high = table.keys_in_order.prefix((table.home_codec.decode(question.under),))
    except RecordError as error:
        raise ConfigurationError(error.message) from error
    return max(low, question.low), high


def _tables(task: Task) -> Any:
    return task.tables


def _behind(positions: Mapping[TopicPartition, int], at: Mapping[TopicPartition, int]) -> str | None:
    """What is asked for of these partitions and not there yet; None where nothing is."""
    for tp, offset in at.items():
        if positions.get(tp, offset) < offset:
            return f"{tp.topic}:{tp.partition}:{offset}"
    return None


def _union(several: Iterator[dict[TopicPartition, int]]) -> dict[TopicPartition, int]:
    return {tp: offset for positions in several for tp, offset in positions.items()}


def key_of(table: Table[Any, Any], store_key: bytes) -> Any:
    """A key of which another worker gives the bytes.

    Raises:
        ConfigurationError: It is no key of the table.
    """
    try:
        return table.keys_in_order.decode(store_key)
    except StateCorruptedError as error:
        raise ConfigurationError(str(error)) from error


def _value(key: Any, overlays: list[Overlay], store_key: bytes) -> list[tuple[bytes, bytes]]:
    for overlay in overlays:
        held = overlay.committed(key)
        if held is not MISSING:
            return [(store_key, overlay.values.payload(held))]
    return []


def _scan(overlays: list[Overlay], span: ByteRange, limit: int) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The first rows of a range of several partitions, and whether these are all; in a thread."""
    entries = [overlay.entries(*span, committed=True) for overlay in overlays]
    merged = entries[0] if len(entries) == 1 else heapq.merge(*entries)
    rows: list[tuple[bytes, bytes]] = []
    size_bytes = 0
    for row in islice(merged, min(limit, MOST_ROWS)):
        rows.append(row)
        size_bytes += len(row[0]) + len(row[1])
        if size_bytes >= _MOST_BYTES:
            break
    return rows, next(iter(merged), None) is None
