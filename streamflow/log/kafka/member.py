"""A member of a group, in the control thread: the classic protocol with cooperative rebalancing (KIP-62, 394, 429).

What it holds (`owned`) is what its tasks work on, and differs from what the last round assigned while partitions that
have to move are still being revoked. It joins later rounds meanwhile, claiming what it still owns; once that is
answered, or its time is up, it joins again without it, and the leader gives it to somebody else.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import anyio

from streamflow.error_groups import main_error
from streamflow.errors import FatalError, InstanceTakenError, RetriableError, StreamFlowError
from streamflow.log.api import (
    Assigned,
    Assignor,
    GroupEvent,
    GroupSettings,
    GroupStatistics,
    Lost,
    Membership,
    Revoked,
    Told,
)
from streamflow.log.kafka import codes, wire_group
from streamflow.log.kafka.assignment import (
    MOST_BYTES,
    Share,
    Shares,
    assign,
    checksum,
    read_claim,
    read_share,
    write_claim,
    write_shares,
)
from streamflow.log.kafka.client import Client, backoff_s
from streamflow.log.unread_topics import UnreadTopics
from streamflow.model.record import TopicPartition

logger = logging.getLogger("streamflow.kafka")

PROTOCOL = "streamflow-v1"
_LEAVE_TIMEOUT_S = 2.0
_METADATA_TIMEOUT_S = 3.0
_LEAST_JOIN_TIMEOUT_S = 5.0
_FATAL_JOIN = {
    codes.INCONSISTENT_GROUP_PROTOCOL: "other consumers of this group speak another protocol: give this app its own id",
    codes.INVALID_SESSION_TIMEOUT: "session_timeout_ms is outside the broker's group.min/max.session.timeout.ms",
    81: "the group has reached the broker's group.max.size",
}

Partitions = frozenset[TopicPartition]


class Host(Protocol):
    """Who is told; every call may be made from the control thread."""

    def news(self, membership: Membership | None, events: list[GroupEvent]) -> None:
        """The membership to commit under from now on, and what happened, in order."""
        ...

    def heard(self, sent_s: float) -> None:
        """The coordinator has answered what was sent at that monotonic time.

        It is told in order with `news`: who finds a fresh heartbeat has been told what was lost before it.
        """
        ...

    def failed(self, error: StreamFlowError) -> None:
        """The group cannot be joined."""
        ...


@dataclass(slots=True)
class Vitals:
    """What crosses the thread border as plain values.

    Attributes:
        says: What goes with the next join.
    """

    says: bytes = b""
    last_progress: float = field(default_factory=time.monotonic)
    last_heartbeat: float | None = None
    rebalances: int = 0
    rebalance_s: float = 0.0

    def statistics(self) -> GroupStatistics:
        """As the contract wants them."""
        age = None if self.last_heartbeat is None else time.monotonic() - self.last_heartbeat
        return GroupStatistics(self.rebalances, self.rebalance_s, age)


class GroupMember:
    """One membership, from joining to leaving.

    Args:
        client: The control loop's connections.
        group_id: Consumer group.
        topics: What to subscribe to.
        assignor: Used while this member is the leader.
        settings: Time-outs.
        host: Who is told.
        vitals: Shared numbers.
    """

    def __init__(
        self,
        client: Client,
        group_id: str,
        topics: frozenset[str],
        assignor: Assignor,
        settings: GroupSettings,
        host: Host,
        vitals: Vitals,
    ) -> None:
        self._client = client
        self._group_id = group_id
        self._topics = topics
        self._assignor = assignor
        self._settings = settings
        self._instance_id = settings.instance_id
        self._host = host
        self._vitals = vitals
        self._member_id = ""
        self._generation = -1
        # The last round that it took part in, to its end or not.
        self._joined = -1
        self._owned: Partitions = frozenset()
        # What it has as the last round was told: nobody gets that before the next one.
        self._claimed: Partitions = frozenset()
        self._assigned: Partitions = frozenset()
        self._revoking: dict[TopicPartition, float] = {}
        self._counts: dict[str, int] = {}
        self._unread = UnreadTopics(group_id, logger)
        self._room = ("", False)
        # What was told last; None: whatever was is not valid any more.
        self._told: bytes | None = b""
        self._is_leader = False
        self._settled = False
        self._coordinator: int | None = None
        self._rejoin = False
        self._wake = anyio.Event()
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        """Take part until cancelled; then leave at once."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch_progress)
                tasks.start_soon(self._watch_partitions)
                while True:
                    with anyio.CancelScope() as self._scope:
                        await self._take_part()
                    await self._sit_out()
        except* StreamFlowError as group:
            self._host.failed(cast("StreamFlowError", main_error(group)))
        finally:
            if self._instance_id is None:  # a static one may come back
                with anyio.move_on_after(_LEAVE_TIMEOUT_S, shield=True):
                    await self._leave()

    def answered(self, partitions: Partitions) -> None:
        """The tasks of these partitions are closed: they may go."""
        self._release(partitions & self._revoking.keys())

    def rejoin(self, why: str) -> None:
        """Join again: what it says is to be heard."""
        if self._generation >= 0 and not self._rejoin:
            logger.info("group %s: asking for a new round: %s", self._group_id, why)
            self._rejoin = True
            self._wake.set()

    def nudge(self) -> None:
        """Ask the coordinator now: a commit was refused."""
        self._wake.set()

    async def _take_part(self) -> None:
        while True:
            await self._rebalance()
            await self._stay()

    # --- one round -----------------------------------------------------------------------------------------------

    async def _rebalance(self) -> None:
        started = time.monotonic()
        failures = 0
        while True:
            self._expire_revocations()
            try:
                share = await self._round()
            except RetriableError as exc:
                failures += 1
                self._coordinator = None
                logger.log(logging.WARNING if failures == 1 else logging.DEBUG, "group %s: %s", self._group_id, exc)
                await anyio.sleep(backoff_s(failures))
                continue
            if share is not None:
                break
        self._vitals.rebalances += 1
        self._vitals.rebalance_s += time.monotonic() - started
        self._settle(share)

    async def _round(self) -> Share | None:
        """Join and sync once; None means: at once again."""
        node = await self._find_coordinator()
        claim = self._claim()
        call = wire_group.join_group(
            self._group_id,
            self._settings.session_timeout_ms,
            self._settings.rebalance_timeout_ms,
            self._member_id,
            self._instance_id,
            PROTOCOL,
            claim,
        )
        # A round may take as long as others need to revoke. Its answer may be on a connection that is dead in silence
        # all the same, so it is asked for again: the broker takes a repeated request of a member for the same one.
        timeout_s = max(self._settings.session_timeout_ms / 1000, _LEAST_JOIN_TIMEOUT_S)
        joined = await self._client.send(node, call, "join", timeout_s=timeout_s)
        if joined.error_code == codes.MEMBER_ID_REQUIRED:
            self._member_id = joined.member_id
            return None
        if joined.error_code:
            self._on_error(joined.error_code, "join")
            return None
        self._member_id = joined.member_id
        # Only a static one is kept without its joining. Of a round that another one seems to have missed, it took part
        # in the join, whose answer was lost: nobody was given what it claimed.
        if self._instance_id is not None and 0 <= self._joined < joined.generation - 1:
            reason = "the group went on for a round without this member: it was silent for too long"
            self._lose(reason, joined.member_id)
        self._joined = joined.generation
        if self._owned:
            # Nobody gets what this member claims, so its commits go on. The broker takes them under the new generation
            # only: those within a transaction at once, others when the leader has assigned.
            now = Membership(self._group_id, self._member_id, joined.generation, self._instance_id)
            self._host.news(now, [])
        self._is_leader = joined.leader == joined.member_id
        # Who comes back as the leader of a group that stands still has nothing to assign (KIP-814).
        is_done = getattr(joined, "skip_assignment", False)
        assignments = await self._lead(joined) if self._is_leader and not is_done else []
        call = wire_group.SYNC_GROUP(self._group_id, joined.generation, self._member_id, self._instance_id, assignments)
        sent_s = time.monotonic()
        synced = await self._client.send(node, call, "join", timeout_s=timeout_s)
        if synced.error_code:
            self._on_error(synced.error_code, "sync with")
            return None
        self._generation = joined.generation
        self._host.heard(sent_s)
        share = read_share(synced.assignment)
        if is_done:
            self._counts = share.answer.counts
        self._unread.tell(self._topics.intersection(share.answer.unread))
        return share

    def _claim(self) -> bytes:
        """What a round is told; what was asked for so far is answered by this one."""
        self._rejoin = False
        self._claimed = self._owned
        return write_claim(self._topics, self._owned, self._generation, self._vitals.says)

    async def _lead(self, joined: Any) -> list[tuple[str, bytes]]:
        claims = [read_claim(*member[:3]) for member in joined.members]
        self._counts = await self._partition_counts(frozenset[str]().union(*(claim.topics for claim in claims)))
        try:
            given = assign(self._assignor, claims, self._counts)
        except StreamFlowError:
            raise
        except Exception as exc:
            raise FatalError(f"the assignor of group {self._group_id} failed: {exc!r}") from exc
        said_bytes = sum(len(member[2]) for member in joined.members)
        shares = write_shares(claims, given, self._counts, joined.leader, said_bytes=said_bytes)
        self._tell_size(shares, len(claims))
        return shares.assignments

    def _tell_size(self, shares: Shares, count: int) -> None:
        before, self._room = self._room, (shares.without, shares.size_bytes > MOST_BYTES)
        if self._room == before:
            return
        if shares.size_bytes > MOST_BYTES:
            logger.warning(
                "group %s: what its %d members say and are told takes %d bytes even in short. The broker keeps that in "
                "one record, of at most message.max.bytes (1048588 unless it is set otherwise), and refuses more: "
                "nobody would be assigned anything. Run fewer workers",
                self._group_id,
                count,
                shares.size_bytes,
            )
        elif shares.without:
            logger.warning(
                "group %s: its %d members are not told %s. The broker keeps what all are told in one record of 1 MB, "
                "in which that has no room. Run fewer workers",
                self._group_id,
                count,
                shares.without,
            )
        else:
            logger.info("group %s: its members are told everything again", self._group_id)

    async def _partition_counts(self, topics: frozenset[str]) -> dict[str, int]:
        try:
            with anyio.fail_after(_METADATA_TIMEOUT_S):  # the others wait, and the session runs
                await self._client.refresh(topics)
        except (RetriableError, TimeoutError) as exc:
            logger.warning("group %s: assigning by the partition counts of before: %s", self._group_id, exc)
        known = self._client.topics
        return {topic: len(known[topic].leaders) for topic in topics if topic in known}

    def _on_error(self, code: int, verb: str) -> None:
        """Decide what a refused join, sync or heartbeat means.

        Raises:
            RetriableError: Find the coordinator again, after a pause.
            FatalError: The group cannot be joined.
        """
        what = f"{verb} group {self._group_id}"
        if code == codes.UNKNOWN_MEMBER_ID:
            self._lose("the session expired: the group went on without this member")
        elif code in (codes.ILLEGAL_GENERATION, codes.REBALANCE_IN_PROGRESS):
            pass  # a round was missed, not the membership: nobody gets what this member still claims
        elif code == codes.FENCED_INSTANCE_ID:
            raise InstanceTakenError(
                f"{what}: another worker was started with instance_id {self._instance_id!r} and has taken this one's "
                "place. Give every worker an instance_id of its own"
            )
        elif code in _FATAL_JOIN:
            raise FatalError(f"{what}: {_FATAL_JOIN[code]} ({codes.name(code)})")
        else:
            raise codes.error(code, what)
        self._rejoin = True

    # --- what a round changes ------------------------------------------------------------------------------------

    def _settle(self, share: Share) -> None:
        # Who takes a static member's place is given its share as it was: of topics, too, that only its version reads.
        assigned = self._assigned = frozenset(tp for tp in share.partitions if tp.topic in self._topics)
        going = self._owned - assigned - self._revoking.keys()
        coming = assigned - self._owned
        self._owned |= coming
        deadline = time.monotonic() + self._settings.rebalance_timeout_ms / 1000
        self._revoking.update(dict.fromkeys(going, deadline))
        events: list[GroupEvent] = []
        if going:
            events.append(Revoked(going))
        is_first, self._settled = not self._settled, True
        if not self._revoking and self._is_behind(share, is_first):
            self._rejoin = True
        if share.answer.told != self._told:
            self._told = share.answer.told
            events.append(Told(self._told, self._generation))
        if coming:
            events.append(Assigned(coming, self._generation))
        self._host.news(self._membership, events)

    def _is_behind(self, share: Share, is_first: bool) -> bool:
        """Whether a share is that of the static member whose place this one has taken, and asks for a round.

        It had to give something up and cannot do so any more, had other topics, or spoke as workers of before.
        """
        if not share.is_spoken:
            return is_first and self._instance_id is not None
        return share.answer.withheld or share.answer.topics != checksum(self._topics)

    @property
    def _membership(self) -> Membership | None:
        if not self._member_id or self._generation < 0:
            return None
        return Membership(self._group_id, self._member_id, self._generation, self._instance_id)

    def _release(self, partitions: Partitions) -> None:
        """Given up by its tasks; a round since may have given some of it back."""
        for tp in partitions:
            del self._revoking[tp]
        back = partitions & self._assigned
        self._owned -= partitions - back
        if back:
            self._host.news(self._membership, [Assigned(back, self._generation)])
        # Also for what was given up before these: the last one may just have come back.
        if not self._revoking and self._claimed - self._owned:
            self._rejoin = True
        self._wake.set()

    def _expire_revocations(self) -> None:
        now = time.monotonic()
        late = frozenset(tp for tp, deadline in self._revoking.items() if deadline <= now)
        if late:
            limit_ms = self._settings.rebalance_timeout_ms
            reason = f"not given up within rebalance_timeout_ms ({limit_ms} ms): another member takes over"
            self._host.news(self._membership, [Lost(late, reason)])
            self._release(late)

    def _lose(self, reason: str, member_id: str = "") -> None:
        """Everything is gone; a member joins anew, with an id of its own.

        Args:
            reason: Why.
            member_id: The id it has yet.
        """
        lost = self._owned
        self._member_id, self._generation, self._joined = member_id, -1, -1
        self._owned = self._claimed = self._assigned = frozenset()
        self._revoking.clear()
        self._is_leader = False
        if self._told:
            self._told = None
        if lost:
            logger.warning("group %s: lost %d partitions: %s", self._group_id, len(lost), reason)
        self._host.news(None, [Lost(lost, reason)] if lost else [])

    # --- between rounds ------------------------------------------------------------------------------------------

    async def _stay(self) -> None:
        """Heartbeats, until there is a reason to join again."""
        while not self._rejoin:
            with anyio.move_on_after(self._settings.heartbeat_interval_ms / 1000):
                await self._wake.wait()
            if self._wake.is_set():
                self._wake = anyio.Event()
            self._expire_revocations()
            if not self._rejoin:
                await self._heartbeat()

    async def _heartbeat(self) -> None:
        try:
            node = await self._find_coordinator()
            call = wire_group.HEARTBEAT(self._group_id, self._generation, self._member_id, self._instance_id)
            timeout_s = max(self._settings.session_timeout_ms / 3000, 1.0)
            # Its session begins anew when the coordinator has it, and an answer may be read much later: by a process
            # that was stopped in between.
            sent_s = time.monotonic()
            response = await self._client.send(node, call, "heartbeat", timeout_s=timeout_s)
            if response.error_code:
                self._on_error(response.error_code, "heartbeat to")
        except RetriableError as exc:
            self._coordinator = None
            logger.debug("group %s: %s", self._group_id, exc)
        else:
            if not response.error_code:
                self._host.heard(sent_s)

    async def _find_coordinator(self) -> int:
        if self._coordinator is None:
            self._coordinator = await self._client.coordinator("group", self._group_id)
        return self._coordinator

    async def _leave(self) -> None:
        if not self._member_id or self._coordinator is None:
            return
        try:
            # A connection of its own: a parked join would hold it up.
            await self._client.send(
                self._coordinator,
                wire_group.LEAVE_GROUP(self._group_id, [(self._member_id, self._instance_id)]),
                "leave",
                timeout_s=_LEAVE_TIMEOUT_S,
            )
        except StreamFlowError as exc:
            logger.info("group %s: could not leave, the session will expire: %s", self._group_id, exc)

    # --- watching ------------------------------------------------------------------------------------------------

    async def _watch_progress(self) -> None:
        limit_s = self._settings.max_poll_interval_ms / 1000
        while True:
            await anyio.sleep(min(0.25, limit_s / 4))
            if self._is_stuck(limit_s):
                self._scope.cancel()

    def _is_stuck(self, limit_s: float) -> bool:
        return time.monotonic() - self._vitals.last_progress > limit_s

    async def _sit_out(self) -> None:
        """Give everything up and stay away until the data loop gets on again."""
        limit_ms = self._settings.max_poll_interval_ms
        await self._leave()
        self._lose(
            f"no progress for more than max_poll_interval_ms ({limit_ms} ms): an agent hangs or blocks the event loop "
            "in one record. Make the record's work shorter, or raise max_poll_interval_ms",
            # Under its old id the broker can tell it from one that took its name meanwhile.
            "" if self._instance_id is None else self._member_id,
        )
        while self._is_stuck(limit_ms / 1000):  # noqa: ASYNC110  # another thread says so by writing a number
            await anyio.sleep(0.05)

    async def _watch_partitions(self) -> None:
        """A topic that grew or came to be is assigned anew; the leader watches for all."""
        while True:
            await anyio.sleep(self._client.options.metadata_max_age_ms / 1000)
            if not self._is_leader:
                continue
            counts = await self._partition_counts(frozenset(self._counts) | self._topics)
            if counts != self._counts and self._is_leader:
                logger.info("group %s: partition counts changed: %s", self._group_id, counts)
                self._rejoin = True
                self._wake.set()
