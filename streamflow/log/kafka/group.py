"""A consumer group as the data loop sees it: events in order, commits fenced, offsets stable.

The protocol runs in a control thread (`log/kafka/member.py`), so that no user code keeps a heartbeat from being sent;
commits and offset fetches go from the data loop, on a connection of their own (a parked join would block them).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from streamflow.errors import FatalError, InternalError, RetriableError, StreamFlowError, TaskMigratedError
from streamflow.log.api import (
    Assigned,
    Assignor,
    Group,
    GroupEvent,
    GroupSettings,
    GroupStatistics,
    Lost,
    Membership,
    OffsetMark,
    Revoked,
    Told,
)
from streamflow.log.kafka import codes, wire, wire_group
from streamflow.log.kafka.admin import by_topic
from streamflow.log.kafka.client import Client, backoff_s, retried
from streamflow.log.kafka.control import ControlThread
from streamflow.log.kafka.member import GroupMember, Vitals
from streamflow.model.record import TopicPartition

_FETCH_TIMEOUT_S = 30.0


class KafkaGroup(Group):
    """A `Group`; enter it with `async with`, which starts to join and does not wait for it.

    Args:
        client: The data loop's connections.
        group_id: Consumer group.
        topics: What to take part in.
        assignor: Used while this member is the leader.
        settings: Time-outs.
        says: What goes with the first join.
    """

    def __init__(
        self,
        client: Client,
        group_id: str,
        topics: frozenset[str],
        assignor: Assignor,
        settings: GroupSettings,
        says: bytes,
    ) -> None:
        self._client = client
        self._group_id = group_id
        self._topics = topics
        self._assignor = assignor
        self._settings = settings
        self._vitals = Vitals(says)
        self._events: deque[GroupEvent] = deque()
        self._failure: StreamFlowError | None = None
        self._membership: Membership | None = None
        self._owned_since: dict[TopicPartition, int] = {}
        self._revoking: set[TopicPartition] = set()
        self._news = asyncio.Event()
        self._coordinator: int | None = None
        self._control = ControlThread(f"streamflow-group-{group_id}", self._take_part, self._on_end)
        self._member: GroupMember | None = None

    async def __aenter__(self) -> KafkaGroup:
        await self._control.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._control.__aexit__(*exc_info)
        self._membership = None
        self._owned_since.clear()

    def is_of(self, membership: Membership) -> bool:
        """Whether this member is the one that a membership names."""
        now = self._membership
        return now is not None and (now.group_id, now.member_id) == (membership.group_id, membership.member_id)

    # --- contract ------------------------------------------------------------------------------------------------

    async def next_event(self) -> GroupEvent:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            await self._wait_for_news()
        return self._events.popleft()

    def say(self, words: bytes) -> None:
        self._vitals.says = words

    def rejoin(self, why: str) -> None:
        self._control.call(self._ask_for_round, why)

    def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        answered = partitions & self._revoking  # a late answer to what was lost meanwhile means nothing
        self._revoking -= answered
        for tp in answered:
            self._owned_since.pop(tp, None)
        if answered:
            self._control.call(self._on_answered, answered)

    @property
    def membership(self) -> Membership | None:
        return self._membership

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self._owned_since)

    def report_progress(self) -> None:
        self._vitals.last_progress = time.monotonic()

    def statistics(self) -> GroupStatistics:
        return self._vitals.statistics()

    # --- offsets -------------------------------------------------------------------------------------------------

    async def committed(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, OffsetMark | None]:
        failures = 0
        while True:
            found = await retried(lambda: self._fetch_offsets(partitions), timeout_s=_FETCH_TIMEOUT_S)
            if found is not None:
                return found
            failures += 1  # a transaction on them is open: it ends, by its time-out at the latest
            await anyio.sleep(backoff_s(failures, cap_s=0.2))

    async def _fetch_offsets(
        self, partitions: Sequence[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetMark | None] | None:
        topics: dict[str, list[int]] = {}
        for topic, partition in partitions:
            topics.setdefault(topic, []).append(partition)
        call = wire_group.OFFSET_FETCH(self._group_id, [(topic, parts, {}) for topic, parts in topics.items()], True)
        response = await self._ask(call)
        told = [(topic, *part) for topic, parts, _tags in response.topics for part in parts]
        worst = response.error_code or next((part[5] for part in told if part[5]), codes.NONE)
        if worst == codes.UNSTABLE_OFFSET_COMMIT:
            return None
        if worst and worst != codes.GROUP_ID_NOT_FOUND:
            self._coordinator = None
            raise codes.error(worst, f"read the offsets of group {self._group_id}")
        found: dict[TopicPartition, OffsetMark | None] = dict.fromkeys(partitions)
        for topic, partition, offset, _epoch, metadata, _code, _ in told:
            if offset >= 0:
                found[TopicPartition(topic, partition)] = OffsetMark(offset, metadata or "")
        return found

    async def commit(self, offsets: Mapping[TopicPartition, OffsetMark], membership: Membership) -> None:
        sent = self.current(offsets, membership)
        fields = by_topic((tp, (mark.offset, -1, mark.metadata)) for tp, mark in offsets.items())
        call = wire_group.OFFSET_COMMIT(self._group_id, sent.generation, sent.member_id, sent.instance_id, fields)
        response = await self._ask(call)
        told = {code for _topic, parts in response.topics for _partition, code in parts} - {codes.NONE}
        if told & codes.MEMBERSHIP_REFUSED:
            raise await self.why_refused(told, offsets, membership, sent)
        if told & codes.COORDINATOR_MOVED:
            self._coordinator = None
        if told:
            code = max(told)
            error = codes.error(code, f"commit offsets of group {self._group_id}")
            if code == codes.UNKNOWN_TOPIC_OR_PARTITION:  # the coordinator may not have heard of a new topic yet
                error = RetriableError(str(error))
            raise error

    def current(self, offsets: Mapping[TopicPartition, OffsetMark], membership: Membership) -> Membership:
        """The membership under which the broker takes offsets that were owned under this one and are still.

        Raises:
            TaskMigratedError: This member does not own one of them, or has not all the time since.
        """
        who = check_membership(membership)
        now = self._membership
        if membership.group_id != self._group_id:
            raise TaskMigratedError(f"{who}: this is not a member of group {self._group_id!r}; nothing was stored")
        if now is not None and now.member_id == membership.member_id:
            if membership.generation > now.generation:
                raise TaskMigratedError(f"{who}: the group is in generation {now.generation} only; nothing was stored")
            for tp in offsets:
                since = self._owned_since.get(tp)
                if since is None or since > membership.generation:
                    raise TaskMigratedError(f"{who} does not own {tp} (any more); nothing was stored")
            return now
        return membership

    async def why_refused(
        self, told: set[int], offsets: Mapping[TopicPartition, OffsetMark], membership: Membership, sent: Membership
    ) -> StreamFlowError:
        """Wait for the round that is under way, and see whether the partitions are still here.

        Args:
            told: The codes of the refusal.
            offsets: What was to be committed.
            membership: Under which it was owned.
            sent: Under which it was sent.
        """
        who = check_membership(sent)
        reason = ", ".join(codes.name(code) for code in sorted(told))
        if told & {codes.UNKNOWN_MEMBER_ID, codes.FENCED_INSTANCE_ID}:
            self._control.call(self._nudge)
            return TaskMigratedError(f"{who} is not in the group any more ({reason}); nothing was stored")
        again = RetriableError(f"{who}: a rebalance is under way ({reason}); commit again with the current membership")
        if codes.ILLEGAL_GENERATION not in told:
            return again
        with anyio.move_on_after(self._settings.session_timeout_ms / 1000):
            while self._membership == sent:
                self._control.call(self._nudge)
                await self._wait_for_news()
        now = self._membership
        if now is None or now.member_id != sent.member_id:
            return TaskMigratedError(f"{who} is not in the group any more ({reason}); nothing was stored")
        try:
            self.current(offsets, membership)
        except TaskMigratedError as exc:
            return exc
        return again

    async def _ask(self, call: wire.Call) -> Any:
        if self._coordinator is None:
            self._coordinator = await self._client.coordinator("group", self._group_id)
        try:
            return await self._client.send(self._coordinator, call, ("offsets", self._group_id))
        except RetriableError:
            self._coordinator = None
            raise

    # --- the border to the control thread ------------------------------------------------------------------------

    async def _take_part(self) -> None:
        """In the control thread."""
        async with Client(self._client.options, self._client.client_id) as client:
            self._member = GroupMember(
                client, self._group_id, self._topics, self._assignor, self._settings, self, self._vitals
            )
            await self._member.run()

    def _on_answered(self, partitions: frozenset[TopicPartition]) -> None:
        if self._member is not None:
            self._member.answered(partitions)

    def _ask_for_round(self, why: str) -> None:
        if self._member is not None:
            self._member.rejoin(why)

    def _nudge(self) -> None:
        if self._member is not None:
            self._member.nudge()

    def news(self, membership: Membership | None, events: list[GroupEvent]) -> None:
        """Called by the control thread (see `member.Host`)."""
        self._control.tell(self._take_news, membership, events)

    def heard(self, sent_s: float) -> None:
        """Called by the control thread (see `member.Host`)."""
        self._control.tell(self._take_heartbeat, sent_s)

    def _take_heartbeat(self, sent_s: float) -> None:
        self._vitals.last_heartbeat = sent_s

    def failed(self, error: StreamFlowError) -> None:
        """Called by the control thread (see `member.Host`)."""
        self._control.tell(self._take_failure, error)

    def _take_news(self, membership: Membership | None, events: list[GroupEvent]) -> None:
        self._membership = membership
        for event in events:
            if isinstance(event, Assigned):
                self._owned_since.update(dict.fromkeys(event.partitions, event.generation))
            elif isinstance(event, Revoked):
                self._revoking |= event.partitions
            elif isinstance(event, Lost):
                gone = event.partitions & self._owned_since.keys()  # what was answered in time is not lost
                self._revoking -= gone
                for tp in gone:
                    del self._owned_since[tp]
                event = Lost(gone, event.reason)
            if isinstance(event, Told) or event.partitions:
                self._events.append(event)
        self._tell_waiters()

    def _take_failure(self, error: StreamFlowError) -> None:
        if self._failure is None:
            self._failure = error if isinstance(error, FatalError) else _fatal(error)
        self._membership = None
        self._tell_waiters()

    def _on_end(self, exc: BaseException | None) -> None:
        error = InternalError(f"the control thread of group {self._group_id} ended: {exc!r}")
        error.__cause__ = exc
        self._take_failure(error)

    async def _wait_for_news(self) -> None:
        await self._news.wait()

    def _tell_waiters(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def check_membership(membership: Membership) -> str:
    """Refuse what the broker would take unfenced.

    Returns:
        The member, for messages.

    Raises:
        TaskMigratedError: It has no member id, or no generation.
    """
    who = f"member {membership.member_id!r} of group {membership.group_id!r}, generation {membership.generation}"
    if not membership.member_id or membership.generation < 0:
        raise TaskMigratedError(f"{who}: this is no membership; nothing was stored")
    return who


def _fatal(error: StreamFlowError) -> FatalError:
    fatal = FatalError(str(error))
    fatal.__cause__ = error
    return fatal
