"""What the leader of a group hands out: the assignor's target, without what somebody else still owns (KIP-429)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamflow.errors import InternalError
from streamflow.log.api import Assignor, Given, Member
from streamflow.log.kafka import user_data, wire_group
from streamflow.log.kafka.user_data import Answer, Spoken
from streamflow.model.record import TopicPartition

MOST_BYTES = 900_000
"""A broker keeps what the members of a group say and are told in one record, which it does not compress by default, of
at most `message.max.bytes` (1,048,588 by default). It refuses a larger one, and the whole round with it (KAFKA-7149).
What is left is for its own fields."""
_OF_A_MEMBER_BYTES = 200
"""Ids, client, host and times of a member in that record."""

_NOTHING = Given(frozenset())


@dataclass(frozen=True, slots=True)
class Claim:
    """What a member said when it joined.

    Attributes:
        member_id: Its id.
        topics: What it subscribes to.
        owned: What it says it owns.
        generation: In which generation it owned that.
        spoken: What it says beside; None for a worker of before, which is not told anything either.
        instance_id: Its static name.
    """

    member_id: str
    topics: frozenset[str]
    owned: frozenset[TopicPartition]
    generation: int
    spoken: Spoken | None = None
    instance_id: str | None = None


def read_claim(member_id: str, instance_id: str | None, metadata: bytes) -> Claim:
    """Decode a member's subscription."""
    topics, data, owned, generation = wire_group.decode_subscription(metadata)
    spoken = user_data.read_spoken(data)
    return Claim(member_id, frozenset(topics), flat(owned), generation, spoken, instance_id)


def write_claim(topics: frozenset[str], owned: frozenset[TopicPartition], generation: int, says: bytes) -> bytes:
    """Encode this member's subscription."""
    return wire_group.encode_subscription(sorted(topics), user_data.write(Spoken(says)), nested(owned), generation)


@dataclass(frozen=True, slots=True)
class Share:
    """What a round gave this member.

    Attributes:
        partitions: What it is to own.
        answer: What it is told beside.
        is_spoken: Whether it was told anything beside: not so by a leader of before, or one that takes this member for
            a worker of before, as which a static member was here last.
    """

    partitions: frozenset[TopicPartition]
    answer: Answer
    is_spoken: bool = True


def read_share(assignment: bytes) -> Share:
    """Decode what the leader gave, whatever its version."""
    assigned, data = wire_group.decode_assignment(assignment)
    answer = user_data.read_answer(data)
    if answer is None:
        return Share(flat(assigned), Answer(unread=user_data.read_old_lines(data)), is_spoken=False)
    return Share(flat(assigned), answer)


@dataclass(frozen=True, slots=True)
class Shares:
    """What a leader hands in.

    Attributes:
        assignments: By member id, encoded.
        size_bytes: What the broker has to keep, about.
        without: What members are not told because it would be too much; empty where they are told all.
    """

    assignments: list[tuple[str, bytes]]
    size_bytes: int
    without: str = ""


def write_shares(
    claims: Sequence[Claim],
    given: Mapping[str, Given],
    counts: Mapping[str, int],
    leader: str,
    *,
    said_bytes: int = 0,
    most_bytes: int = MOST_BYTES,
) -> Shares:
    """Encode what each member is given, so that it can read it, and the broker keeps it.

    Args:
        claims: What every member said.
        given: What each is given.
        counts: Partitions per topic.
        leader: Member id of who leads.
        said_bytes: Size of what the members said.
        most_bytes: What the broker keeps.
    """
    unread = sorted(unread_topics(claims, counts, given))
    levels = max((len(each.shorter) for each in given.values()), default=0)
    level, shares = 0, _shares(claims, given, counts, leader, unread, said_bytes)
    while shares.size_bytes > most_bytes and level < levels:
        level += 1
        shortened = {member_id: _in_short(mine, level) for member_id, mine in given.items()}
        longest = max((mine.shorter for mine in given.values()), key=len)
        shares = _shares(claims, shortened, counts, leader, unread, said_bytes)
        shares = replace(shares, without=longest[level - 1].without)
    return shares


def _in_short(mine: Given, level: int) -> Given:
    return replace(mine, told=mine.shorter[min(level, len(mine.shorter)) - 1].told) if mine.shorter else mine


def _shares(
    claims: Sequence[Claim],
    given: Mapping[str, Given],
    counts: Mapping[str, int],
    leader: str,
    unread: list[str],
    said_bytes: int,
) -> Shares:
    assignments: list[tuple[str, bytes]] = []
    for claim in claims:
        mine = given[claim.member_id]
        answer = Answer(
            mine.told,
            unread,
            not claim.owned <= mine.partitions,
            checksum(claim.topics),
            dict(counts) if claim.member_id == leader else {},
        )
        data = user_data.write_answer(answer, claim.spoken)
        assignments.append((claim.member_id, wire_group.encode_assignment(nested(mine.partitions), data)))
    told_bytes = sum(len(data) for _, data in assignments)
    return Shares(assignments, said_bytes + told_bytes + _OF_A_MEMBER_BYTES * len(claims))


def checksum(topics: frozenset[str]) -> int:
    """A number that tells other topics."""
    return zlib.crc32("\n".join(sorted(topics)).encode())


def assign(assignor: Assignor, claims: Sequence[Claim], counts: Mapping[str, int]) -> Mapping[str, Given]:
    """Hand out what is free, leave with its owner what stays, and keep back what has to move first.

    Partitions of a topic that does not exist stay where they are: whoever reads them says so, which stops the worker.
    Taken away, they would leave a worker behind that has nothing to do and says nothing.

    Args:
        assignor: The app's.
        claims: What every member said.
        counts: Partitions per topic.

    Returns:
        What every member is given. What is kept back belongs to nobody in this round; its owner sees that it lost it,
        gives it up and joins again.

    Raises:
        InternalError: The assignor gave one partition to two members, or to nobody known.
    """
    claimed_by: dict[TopicPartition, set[str]] = {}
    for claim in claims:
        for tp in claim.owned:
            claimed_by.setdefault(tp, set()).add(claim.member_id)
    members = sorted((_member(claim, claims) for claim in claims), key=lambda member: member.member_id)
    target = assignor(members, counts)
    _check(target, {member.member_id for member in members})
    given: dict[str, Given] = {}
    for member in members:
        meant = target.get(member.member_id, _NOTHING)
        partitions = meant.partitions | _of_no_topic(member, counts)
        free = frozenset(tp for tp in partitions if not claimed_by.get(tp, set()) - {member.member_id})
        given[member.member_id] = Given(free, meant.told, meant.shorter)
    return given


def _of_no_topic(member: Member, counts: Mapping[str, int]) -> frozenset[TopicPartition]:
    return frozenset(tp for tp in member.owned if tp.topic not in counts)


def unread_topics(claims: Sequence[Claim], counts: Mapping[str, int], given: Mapping[str, Given]) -> frozenset[str]:
    """Topics that some members subscribe to, and of which nobody has a partition: the leader does not know them.

    That happens while two versions of an app run. Only the leader can see it, so it tells the others.

    Args:
        claims: What every member said.
        counts: Partitions per topic.
        given: What is handed out.
    """
    held = {tp.topic for claim in claims for tp in claim.owned}
    held |= {tp.topic for each in given.values() for tp in each.partitions}
    subscribed = {topic for claim in claims for topic in claim.topics if counts.get(topic)}
    return frozenset(subscribed - held)


def _member(claim: Claim, claims: Sequence[Claim]) -> Member:
    """A member whose claims others do not overrule: of two claims to a partition the younger counts (KIP-792)."""
    overruled = {
        tp
        for other in claims
        if other is not claim and (other.generation, other.member_id) > (claim.generation, claim.member_id)
        for tp in other.owned & claim.owned
    }
    says = b"" if claim.spoken is None else claim.spoken.says
    return Member(claim.member_id, claim.topics, claim.owned - overruled, says, claim.instance_id)


def _check(target: Mapping[str, Given], known: set[str]) -> None:
    seen: set[TopicPartition] = set()
    for member_id, given in target.items():
        partitions = given.partitions
        if member_id not in known or partitions & seen:
            raise InternalError(f"the assignor gave {sorted(partitions)[:3]}... to {member_id!r} wrongly")
        seen |= partitions


def flat(topics: Sequence[tuple[str, Sequence[int]]]) -> frozenset[TopicPartition]:
    """From partitions per topic."""
    return frozenset(TopicPartition(topic, partition) for topic, partitions in topics for partition in partitions)


def nested(partitions: frozenset[TopicPartition]) -> dict[str, list[int]]:
    """To partitions per topic."""
    topics: dict[str, list[int]] = {}
    for topic, partition in sorted(partitions):
        topics.setdefault(topic, []).append(partition)
    return topics
