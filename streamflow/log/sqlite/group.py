"""A member of a consumer group: what its user sees, and the heartbeat that keeps it alive.

For a file the heartbeat is a thread with a connection of its own, so that an agent that blocks the event loop does not
cost the membership; in memory it is a task, so that virtual time drives it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from streamflow.errors import InternalError, RetriableError, StreamFlowError
from streamflow.log.api import Group, GroupEvent, GroupStatistics, Membership, OffsetMark, Unheard
from streamflow.log.sqlite import membership, tables
from streamflow.log.sqlite.database import Database
from streamflow.log.sqlite.execution import Session
from streamflow.log.sqlite.membership import MemberStanding, Step, Subscription, check_membership
from streamflow.log.tasks import TaskOwner
from streamflow.log.unread_topics import UnreadTopics
from streamflow.model.record import TopicPartition

logger = logging.getLogger("streamflow.sqlite")

LOOK_S = 0.025
"""How often the heartbeat thread looks whether another member wants something: microseconds each time."""
_LOCK_WAIT_S = 1.0
"""A heartbeat that waits longer for the lock is tried anew; leaving gives up then, and the session expires instead."""
_CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Wishes:
    """What the user wants of the next step.

    Attributes:
        says: What to say.
        rounds: How often a new target was asked for.
    """

    says: bytes = b""
    rounds: int = 0


class Heart:
    """What beats: makes the steps and remembers where the member stands. Used by one thread at a time.

    Args:
        session: A connection.
        mine: Who it beats for.
        monotonic: Time in seconds.
        wishes: What its user wants; may be written by other threads.
    """

    def __init__(self, session: Session, mine: Subscription, monotonic: Callable[[], float], wishes: Wishes) -> None:
        self.session = session
        self.standing = MemberStanding()
        self.statistics = GroupStatistics()
        self.last_beat: float | None = None
        self.progressed = True
        self.answers: deque[frozenset[TopicPartition]] = deque()
        self.wishes = wishes
        self._mine = mine
        self._monotonic = monotonic
        self._quiet_s = 0.0
        self._rounds = 0
        self._rebalancing_since: float | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between heartbeats."""
        return self._mine.settings.heartbeat_interval_ms / 1000

    def beat(self) -> Step:
        """Make one step.

        Raises:
            StreamFlowError: It was not stored; nothing has changed, and nothing that was answered is forgotten.
        """
        now = self._monotonic()
        # A process that was stopped, or a clock that jumped, has not been watching: that time counts as one interval.
        elapsed = 0.0 if self.last_beat is None else min(now - self.last_beat, 2 * self.interval_s)
        quiet = 0.0 if self.progressed else self._quiet_s + elapsed
        answers = list(self.answers)
        says, rounds = self.wishes.says, self.wishes.rounds
        step = self.session.write(
            lambda sql: membership.step(
                sql,
                self._mine,
                self.standing,
                elapsed_s=elapsed,
                answered=frozenset().union(*answers),
                stuck=self._stuck(quiet),
                says=says,
                new_target=rounds != self._rounds,
            )
        )
        self._rounds = rounds
        for _ in answers:
            self.answers.popleft()
        self._quiet_s, self.progressed = quiet, False
        self._count(step, now)
        self.standing = step.standing
        self.last_beat = now
        return step

    def is_due(self) -> bool:
        """Whether another member changed something, or this one's user wants something."""
        if self.answers or self.wishes.rounds != self._rounds:
            return True
        return self.session.direct(lambda sql: membership.version(sql, self._mine.group_id)) != self.standing.version

    def leave(self) -> None:
        """Leave the group; a static member stays, until it comes back or its session is over."""
        if self.standing.member_id and self._mine.settings.instance_id is None:
            self.session.write(lambda sql: membership.leave(sql, self._mine.group_id, self.standing.member_id))

    def _stuck(self, quiet_s: float) -> str | None:
        limit_ms = self._mine.settings.max_poll_interval_ms
        if quiet_s * 1000 <= limit_ms:
            return None
        return (
            f"no progress for more than max_poll_interval_ms ({limit_ms} ms): an agent hangs or blocks the event loop "
            f"in one record; member {self.standing.member_id} of group {self._mine.group_id!r} has given everything up "
            "and rejoins when it gets on. Make the record's work shorter, or raise max_poll_interval_ms"
        )

    def _count(self, step: Step, now: float) -> None:
        if self._rebalancing_since is None and (
            step.standing.generation != self.standing.generation or not step.standing.settled
        ):
            self._rebalancing_since = now
        if self._rebalancing_since is not None and step.standing.settled:
            self.statistics.rebalances += 1
            self.statistics.rebalance_s += self._monotonic() - self._rebalancing_since
            self._rebalancing_since = None


class SqliteGroup(Group):
    """The member as its user sees it, on the event loop.

    Args:
        database: The open database.
        mine: Group, topics, assignor and time-outs.
        says: What to say with the first join.
    """

    def __init__(self, database: Database, mine: Subscription, says: bytes) -> None:
        self._database = database
        self._mine = mine
        self._loop = asyncio.get_running_loop()
        self._events: deque[GroupEvent] = deque()
        self._failure: StreamFlowError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._standing = MemberStanding()
        self._unread = UnreadTopics(mine.group_id, logger)
        self.wishes = Wishes(says)
        self._last_beat: float | None = None
        self.heart: Heart | None = None
        self.wake: Callable[[], None] = lambda: None

    async def next_event(self) -> GroupEvent:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def say(self, words: bytes) -> None:
        self.wishes.says = words

    def rejoin(self, why: str) -> None:
        self._loop.call_soon_threadsafe(self._ask_for_target, why)

    def _ask_for_target(self, why: str) -> None:
        if self._standing.member_id:
            logger.info("group %s: asking for a new assignment: %s", self._mine.group_id, why)
            self.wishes.rounds += 1
            self.wake()

    def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        if self.heart is not None and partitions:
            self.heart.answers.append(partitions)
            self._standing = _without(self._standing, partitions)
            self.wake()

    @property
    def membership(self) -> Membership | None:
        if not self._standing.member_id:
            return None
        standing, instance_id = self._standing, self._mine.settings.instance_id
        return Membership(self._mine.group_id, standing.member_id, standing.generation, instance_id)

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        return self._standing.owned

    async def committed(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, OffsetMark | None]:
        found = await self._database.reader.read(lambda sql: tables.read_offsets(sql, self._mine.group_id))
        return {tp: found.get(tp) for tp in partitions}

    async def commit(self, offsets: Mapping[TopicPartition, OffsetMark], membership: Membership) -> None:
        def work(sql: sqlite3.Connection) -> None:
            check_membership(sql, membership, offsets)
            tables.store_offsets(sql, membership.group_id, offsets)

        await self._database.writer.write(work)

    def report_progress(self) -> None:
        if self.heart is not None:
            self.heart.progressed = True

    def unheard(self) -> Sequence[Unheard]:
        return self._standing.unheard

    def statistics(self) -> GroupStatistics:
        if self.heart is None:
            return GroupStatistics()
        told, last = self.heart.statistics, self._last_beat
        return GroupStatistics(told.rebalances, told.rebalance_s, None if last is None else self._monotonic() - last)

    def apply(self, step: Step, beat_s: float | None) -> None:
        """Take over what a step gave.

        Args:
            step: The step.
            beat_s: When it began, monotonic: who finds a fresh heartbeat has been told what was lost before it.
        """
        self._last_beat = beat_s
        unanswered = frozenset[TopicPartition]() if self.heart is None else frozenset().union(*self.heart.answers)
        self._standing = _without(step.standing, unanswered)
        self._events.extend(step.events)
        self._wake_waiter()
        self._unread.tell(step.standing.unread)
        if step.told_others:
            self._database.wrote(members=True)

    def fail(self, error: StreamFlowError) -> None:
        """Membership is over: `next_event` raises from now on."""
        self._failure = error
        self._standing = MemberStanding()
        self._wake_waiter()

    def _monotonic(self) -> float:
        return self._database.waits.monotonic()

    def _wake_waiter(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _known(error: Exception) -> StreamFlowError:
    if isinstance(error, StreamFlowError):
        return error
    unknown = InternalError(f"the heartbeat failed: {error!r}")
    unknown.__cause__ = error
    return unknown


def _without(standing: MemberStanding, partitions: frozenset[TopicPartition]) -> MemberStanding:
    left = standing.owned - partitions
    return MemberStanding(standing.member_id, standing.generation, standing.version, left, unheard=standing.unheard)


@asynccontextmanager
async def joined(database: Database, mine: Subscription, says: bytes) -> AsyncGenerator[SqliteGroup]:
    """Join a group, and leave it at the end of the block."""
    group = SqliteGroup(database, mine, says)
    if database.members is None:
        thread = HeartThread(group, database, mine)
        await thread.start()
        try:
            yield group
        finally:
            await thread.stop()
        return
    heart = group.heart = Heart(database.session(durable=False), mine, database.waits.monotonic, group.wishes)
    group.apply(heart.beat(), heart.last_beat)
    try:
        async with TaskOwner(f"heartbeat {mine.group_id}", _beat_inline(group, heart, database)):
            yield group
    finally:
        heart.leave()
        database.wrote(members=True)


async def _beat_inline(group: SqliteGroup, heart: Heart, database: Database) -> None:
    changes = database.members
    if changes is None:
        raise InternalError("only a log in memory beats inline")
    while True:
        due: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ring(due: asyncio.Future[None] = due) -> None:
            if not due.done():
                due.set_result(None)

        async def ring_later(ring: Callable[[], None] = ring) -> None:
            await database.waits.sleep(heart.interval_s)
            ring()

        group.wake = ring
        async with TaskOwner("heartbeat interval", ring_later()):
            with changes.waking(due):
                if not heart.is_due():
                    await due
        try:
            group.apply(heart.beat(), heart.last_beat)
        except Exception as error:
            group.fail(_known(error))
            return


class HeartThread:
    """The heartbeat of a member of a file's group.

    Args:
        group: Whom to tell.
        database: The open database.
        mine: Who it beats for.
    """

    def __init__(self, group: SqliteGroup, database: Database, mine: Subscription) -> None:
        self._group = group
        self._database = database
        self._mine = mine
        self._loop = asyncio.get_running_loop()
        self._woken = threading.Event()
        self._stopping = False
        self._joined: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name=f"streamflow-heartbeat-{mine.group_id}", daemon=True)

    async def start(self) -> None:
        """Join.

        Raises:
            StreamFlowError: The first step failed.
        """
        self._thread.start()
        try:
            await self._joined
        except BaseException:
            await self.stop()
            raise
        self._group.wake = self._woken.set

    async def stop(self) -> None:
        """Leave and end the thread, within 5 s."""
        self._stopping = True
        self._woken.set()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._ended], timeout=_CLOSE_TIMEOUT_S)
        if self._ended.done():
            self._thread.join()

    def _main(self) -> None:
        session: Session | None = None
        try:
            session = self._database.session(durable=False, busy_timeout_s=_LOCK_WAIT_S)
            heart = self._group.heart = Heart(session, self._mine, time.monotonic, self._group.wishes)
            self._tell(self._first, heart.beat(), heart.last_beat)
            self._keep_beating(heart)
            heart.leave()
        except Exception as error:
            self._tell(self._failed, _known(error))
        finally:
            if session is not None:
                session.close()
            self._tell(self._settle, self._ended)

    def _keep_beating(self, heart: Heart) -> None:
        while not self._stopping:
            try:
                self._pause(heart)
                if not self._stopping:
                    self._tell(self._group.apply, heart.beat(), heart.last_beat)
            except RetriableError:
                # Locked or full: the others cannot beat either, so nobody expires; the age of the last beat tells.
                self._woken.wait(0.1)

    def _pause(self, heart: Heart) -> None:
        """Sleeps until the next heartbeat is due, or somebody wants something."""
        until = (heart.last_beat or 0.0) + heart.interval_s
        while not self._stopping:
            left = until - time.monotonic()
            if left <= 0 or self._woken.wait(min(LOOK_S, left)):
                self._woken.clear()
                return
            if heart.is_due():
                return

    def _first(self, step: Step, beat_s: float | None) -> None:
        self._group.apply(step, beat_s)
        self._settle(self._joined)

    def _failed(self, error: StreamFlowError) -> None:
        if not self._joined.done():
            self._joined.set_exception(error)
        elif not self._stopping:
            self._group.fail(error)

    def _settle(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop is closed: its owner left without leaving the group
            self._stopping = True
