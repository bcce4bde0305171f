"""Committed values of the tables that this worker holds, for whoever asks from outside.

An answer is given under the assignment in force: the task is this worker's, its tables are restored, and the group has
heard of this worker within a session, so that nobody else can have been given the task. That holds before the read and
after it, so it held throughout. A process that was stopped and wakes up does not pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import islice
from typing import Any

import anyio
import anyio.to_thread

from streamflow.errors import ConfigurationError, RecordError, StateCorruptedError, StreamFlowError
from streamflow.log.api import Group
from streamflow.model.position import positions_of, text_of
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.processing.reads_guard import ReadsGuard
from streamflow.processing.set_table import Pairs
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.internal_topics import reply_topic_name
from streamflow.runtime.layout import Layout
from streamflow.runtime.read_question import Answer, Question
from streamflow.runtime.readable import Copied, Owned, Readable, Row
from streamflow.runtime.standby import Standby
from streamflow.runtime.task_manager import TaskManager
from streamflow.state.keys import ByteRange

MOST_ROWS = 1_000
_MOST_BYTES = 4 * 1024 * 1024
_POLL_S = 0.01
_SCANS = 4


class Misdirected(StreamFlowError):
    """Another worker has the partition, or gets it."""


class NotReadableYet(StreamFlowError):
    """The partition is this worker's, and cannot be read at present."""


class OtherApp(Misdirected):
    """Workers of another app, or of the same app id on another log, were meant: they were at this address before."""


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

    @property
    def app_id(self) -> str:
        """Id of the app."""
        return self._app.id

    @property
    def guard(self) -> ReadsGuard | None:
        """Who decides what may be read; None where all may."""
        return self._app.reads_guard

    def check_asker(self, question: Question) -> None:
        """Refuse what is not asked of this app.

        Raises:
            OtherApp: It is not.
        """
        if question.app and question.app != self._app.id:
            raise OtherApp(f"this is a worker of app {self._app.id!r}, not of {question.app!r}")
        own = self.topic_id(question.table)
        if question.topic_id and own and question.topic_id != own:
            raise OtherApp(
                f"this is a worker of app {self._app.id!r} on another log: table {question.table!r} is known by id "
                f"{own} here, and asked for as {question.topic_id}. Give workers of two logs addresses of their own"
            )

    def topic_id(self, table: str) -> str:
        """Id of a topic of the app's own that tells a table's log from others; empty where it is not known.

        A source that fills a table may be made anew while workers run, so that they know different ids of it.
        """
        found = self._app.tables.get(table)
        if found is None:
            return ""
        topic = found.changelog.name if found.source is None else reply_topic_name(self._app.id)
        return self._layout.ids.get(topic, "")

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

    def has_copy(self, table: Table[Any, Any], sub: SubTopology, partition: int, at: str) -> bool:
        """Whether a standby of this worker can answer now: it knows that it has come to `at`, and how far it is behind.

        A position of a source it never knows: the owner does.
        """
        try:
            return self._copied(table, sub, partition).behind(positions_of(at)) is None
        except (Misdirected, NotReadableYet):
            return False

    def check_positions(self, table: Table[Any, Any], sub: SubTopology, at: str) -> None:
        """Refuse positions that this table never comes to.

        Raises:
            ConfigurationError: One is of a topic that does not fill it, or of a partition that there is not: while
                workers run, the topics of a table get no more.
        """
        counts = {topic: self._layout.counts[topic] for topic in sub.topics}
        counts.setdefault(table.changelog.name, max(counts.values()))
        for tp in positions_of(at):
            if tp.topic in counts:
                check_partition(tp, counts[tp.topic])
            else:
                raise ConfigurationError(
                    f"the position {tp.topic}:{tp.partition} is of a topic that agents of table {table.name!r} do not "
                    f"read; it knows {', '.join(sorted(counts))}. What is sent to a topic before these may still be on "
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
        parts, without = await self._held(table, sub, question, at)
        try:
            if question.key is not None:
                rows, is_complete = _value(parts, key, question.key), True
            else:
                span = bounds_of(table, question)
                rows, is_complete = await anyio.to_thread.run_sync(
                    _scan, parts, span, question.limit, limiter=self._scans
                )
        except StreamFlowError as error:
            self._check_still(table, sub, parts)
            raise NotReadableYet(str(error)) from error
        self._check_still(table, sub, parts)
        position = text_of({tp: offset for part in parts for tp, offset in part.positions.items()})
        lags = [part.lag for part in parts if part.lag is not None]
        return Answer(rows, is_complete, position, sum(lags) if lags else None, without)

    async def _held(
        self, table: Table[Any, Any], sub: SubTopology, question: Question, at: Mapping[TopicPartition, int]
    ) -> tuple[list[Readable], dict[int, str]]:
        """The partitions that can be read and have come far enough; and why others are left out, where they may be."""
        give_up_s = anyio.current_time() + question.timeout_s
        while True:
            parts: list[Readable] = []
            missing: dict[int, NotReadableYet | Misdirected] = {}
            for number in question.partitions:
                try:
                    parts.append(self._far_enough(table, sub, number, at, stale_ok=question.stale_ok))
                except (NotReadableYet, Misdirected) as error:
                    missing[number] = error
            if not missing or (question.partly and parts):
                return parts, {number: str(error) for number, error in missing.items()}
            for number, reason in missing.items():
                # Waiting does not help, or less than asking another one does.
                if isinstance(reason, Misdirected) or not self.owns(sub, number):
                    raise reason
            left_s = give_up_s - anyio.current_time()
            if left_s <= 0:
                raise next(iter(missing.values()))
            await anyio.sleep(min(left_s, _POLL_S))

    def _far_enough(
        self,
        table: Table[Any, Any],
        sub: SubTopology,
        partition: int,
        at: Mapping[TopicPartition, int],
        *,
        stale_ok: bool,
    ) -> Readable:
        part = self._readable(table, sub, partition, stale_ok=stale_ok)
        late = part.behind(at)
        if late is not None:
            raise NotReadableYet(_late(part, late, at[late]))
        return part

    def _readable(self, table: Table[Any, Any], sub: SubTopology, partition: int, *, stale_ok: bool) -> Readable:
        """A partition that may be read now."""
        if self._group.membership is None or not self.owns(sub, partition):
            if not stale_ok:
                raise Misdirected(f"partition {partition} is not this worker's")
            return self._copied(table, sub, partition)
        age_s = self._group.statistics().last_heartbeat_age_s
        if age_s is None or age_s >= self._session_timeout_s:
            raise NotReadableYet("this worker was not heard of in its group for a session")
        task = self._manager.tasks.get((sub.name, partition))
        if task is None or not task.is_readable:
            raise NotReadableYet(f"partition {partition} is being opened, restored or closed")
        return Owned(task, table)

    def _copied(self, table: Table[Any, Any], sub: SubTopology, partition: int) -> Readable:
        standby = self._standby(sub, partition)
        if standby is None:
            raise Misdirected(f"partition {partition} is not this worker's, and it has no copy of it")
        lag, state = standby.lag, standby.state
        if lag is None or state is None or table.name not in standby.positions:
            raise NotReadableYet(f"how far the copy of partition {partition} is behind is not known yet")
        if standby.is_silent:
            raise NotReadableYet(f"the copy of partition {partition} has heard nothing of its changelog for long")
        return Copied(standby, table, state.store, lag)

    def _standby(self, sub: SubTopology, partition: int) -> Standby | None:
        return self._manager.standbys.held().get(TaskId(sub.name, partition))

    def _check_still(self, table: Table[Any, Any], sub: SubTopology, parts: list[Readable]) -> None:
        for part in parts:
            holder = part.holder
            now = self._readable(table, sub, holder.partition, stale_ok=part.lag is not None)
            if now.holder is not holder:
                raise NotReadableYet(f"partition {holder.partition} was opened anew while it was read")


def check_partition(tp: TopicPartition, count: int) -> None:
    """Refuse a position of a partition that a topic does not have.

    Args:
        tp: Whose position it is.
        count: How many partitions the topic has.

    Raises:
        ConfigurationError: It does not have it.
    """
    if tp.partition >= count:
        there = "0" if count == 1 else f"0 to {count - 1}"
        raise ConfigurationError(
            f"the position {tp.topic}:{tp.partition} is of no partition that there is: {tp.topic} has {there}"
        )


def _late(part: Readable, tp: TopicPartition, offset: int) -> str:
    partition = part.holder.partition
    if tp not in part.positions and part.lag is not None:
        return f"the copy of partition {partition} does not know whether it has come to offset {offset} of {tp}"
    return f"partition {partition} has not come to offset {offset} of {tp} yet"


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


def key_of(table: Table[Any, Any], store_key: bytes) -> Any:
    """A key of which another worker gives the bytes.

    Raises:
        ConfigurationError: It is no key of the table.
    """
    try:
        return table.keys_in_order.decode(store_key)
    except StateCorruptedError as error:
        raise ConfigurationError(str(error)) from error


def _value(parts: list[Readable], key: Any, store_key: bytes) -> list[Row]:
    values = (part.value(key, store_key) for part in parts)
    return [(store_key, value) for value in values if value is not None]


def _scan(parts: list[Readable], span: ByteRange, limit: int) -> tuple[list[Row], bool]:
    """The first rows of a range of several partitions, and whether these are all; in a thread."""
    limit = min(limit, MOST_ROWS)
    entries = [part.entries(*span, limit + 1) for part in parts]  # one more tells whether there are more
    merged = entries[0] if len(entries) == 1 else heapq.merge(*entries)
    rows: list[Row] = []
    size_bytes = 0
    for row in islice(merged, limit):
        rows.append(row)
        size_bytes += len(row[0]) + len(row[1])
        if size_bytes >= _MOST_BYTES:
            break
    return rows, next(iter(merged), None) is None
