"""What a round changes for a member, without a broker."""

from types import SimpleNamespace

import pytest

from streamflow.errors import FatalError, RetriableError
from streamflow.log.api import Assigned, Given, GroupSettings, Lost, Membership, Revoked, Told
from streamflow.log.kafka import codes, wire_group
from streamflow.log.kafka.assignment import Claim, Share, Shares, checksum, write_shares
from streamflow.log.kafka.client import Client
from streamflow.log.kafka.member import GroupMember, Vitals
from streamflow.log.kafka.options import Kafka
from streamflow.log.kafka.user_data import Answer
from streamflow.model.record import TopicPartition
from tests.contracts.records import spread


def tps(*numbers):
    return frozenset(TopicPartition("t", number) for number in numbers)


class Rounds:
    """A member that is told the outcome of each round."""

    def __init__(self, **settings):
        self.events, self.memberships, self.generation = [], [], 0
        client = Client(Kafka(servers="h:1"), "test")
        self.member = GroupMember(client, "g", frozenset({"t"}), spread, GroupSettings(**settings), self, Vitals())

    def news(self, membership, events):
        self.memberships.append(membership)
        self.events += events

    def heard(self, sent_s):
        """Ages are looked at in tests of the group."""

    def failed(self, error):
        raise error

    def round(self, assigned, told=b""):
        self.events.clear()
        self.generation += 1
        self.member._claim()
        self.member._member_id, self.member._generation = "m", self.generation
        self.member._settle(Share(assigned, Answer(told, topics=checksum(frozenset({"t"})))))
        return list(self.events)


async def test_only_differences_are_told():
    rounds = Rounds()
    assert rounds.round(tps(0, 1)) == [Assigned(tps(0, 1), 1)]
    assert rounds.round(tps(0, 1)) == []
    assert rounds.round(tps(1, 2)) == [Revoked(tps(0)), Assigned(tps(2), 3)]
    assert rounds.memberships[-1] == Membership("g", "m", 3)


async def test_what_is_told_comes_between_what_goes_and_what_comes_and_only_when_it_differs():
    rounds = Rounds()
    assert rounds.round(tps(0), b"") == [Assigned(tps(0), 1)]
    assert rounds.round(tps(1), b"one") == [Revoked(tps(0)), Told(b"one", 2), Assigned(tps(1), 2)]
    assert rounds.round(tps(1), b"one") == []
    assert rounds.round(tps(1), b"two") == [Told(b"two", 4)]
    assert rounds.round(tps(1), b"") == [Told(b"", 5)]


@pytest.mark.parametrize("anew", [b"one", b"two", b""])
async def test_who_lost_its_membership_is_told_anew(anew):
    rounds = Rounds()
    rounds.round(frozenset(), b"one")
    rounds.member._on_error(codes.UNKNOWN_MEMBER_ID, "heartbeat to")
    assert rounds.events == [Told(b"one", 1)]  # there were no partitions to lose
    assert rounds.round(frozenset(), anew) == [Told(anew, 2)]
    assert rounds.round(frozenset(), anew) == []


async def test_a_round_that_is_asked_for_is_asked_for_once_and_not_before_the_first():
    rounds = Rounds()
    rounds.member.rejoin("too early")
    assert not rounds.member._rejoin
    rounds.round(tps(0))
    rounds.member.rejoin("caught up")
    assert rounds.member._rejoin
    assert rounds.member._wake.is_set()


async def test_what_was_answered_is_claimed_no_more_and_asks_for_a_round():
    rounds = Rounds()
    rounds.round(tps(0, 1))
    rounds.round(tps(0))
    assert rounds.member._owned == tps(0, 1)
    assert not rounds.member._rejoin
    rounds.member.answered(tps(1))
    assert rounds.member._owned == tps(0)
    assert rounds.member._rejoin


async def test_what_a_later_round_gives_back_while_it_is_revoked_is_assigned_anew_once_it_is_answered():
    rounds = Rounds()
    rounds.round(tps(0, 1))
    rounds.round(tps(0))
    assert rounds.round(tps(0, 1)) == []
    rounds.member.answered(tps(1))
    assert rounds.events == [Assigned(tps(1), 3)]
    assert rounds.member._owned == tps(0, 1)
    assert not rounds.member._rejoin


async def test_a_round_is_asked_for_when_the_last_revocation_is_answered():
    rounds = Rounds()
    rounds.round(tps(0, 1, 2))
    rounds.round(tps(0))
    rounds.member.answered(tps(1))
    assert not rounds.member._rejoin
    rounds.member.answered(tps(2))
    assert rounds.member._rejoin
    rounds.member.answered(tps(2))  # twice means nothing
    assert rounds.member._owned == tps(0)


async def test_a_round_is_asked_for_what_was_given_up_also_when_the_last_revocation_comes_back():
    rounds = Rounds()
    rounds.round(tps(0, 1, 2))
    rounds.round(tps(0, 1))
    rounds.round(tps(0, 2))
    assert rounds.round(tps(0, 1)) == []
    rounds.member.answered(tps(2))
    rounds.member.answered(tps(1))
    assert rounds.events == [Assigned(tps(1), 4)]
    assert rounds.member._owned == tps(0, 1)
    assert rounds.member._rejoin  # nobody would have the third one otherwise


async def test_no_round_is_asked_for_what_the_others_have_heard_of():
    rounds = Rounds()
    rounds.round(tps(0, 1, 2))
    rounds.round(tps(0, 1))
    rounds.round(tps(0))
    rounds.member.answered(tps(2))
    rounds.round(tps(0, 1))
    rounds.member.answered(tps(1))
    assert rounds.events == [Assigned(tps(1), 4)]
    assert not rounds.member._rejoin


async def test_a_late_revocation_is_lost():
    rounds = Rounds(rebalance_timeout_ms=0)
    rounds.round(tps(0, 1))
    rounds.round(tps(0))
    rounds.events.clear()
    rounds.member._expire_revocations()
    (lost,) = rounds.events
    assert isinstance(lost, Lost)
    assert lost.partitions == tps(1)
    assert rounds.member._rejoin


async def test_an_unknown_member_loses_everything_and_joins_anew():
    rounds = Rounds()
    rounds.round(tps(0, 1))
    rounds.member._on_error(codes.UNKNOWN_MEMBER_ID, "heartbeat to")
    assert rounds.events[-1].partitions == tps(0, 1)
    assert rounds.memberships[-1] is None
    assert (rounds.member._member_id, rounds.member._owned, rounds.member._rejoin) == ("", frozenset(), True)


@pytest.mark.parametrize("code", [codes.ILLEGAL_GENERATION, codes.REBALANCE_IN_PROGRESS])
async def test_a_missed_round_loses_nothing(code):
    rounds = Rounds()
    rounds.round(tps(0, 1))
    rounds.member._on_error(code, "heartbeat to")
    assert (rounds.member._member_id, rounds.member._owned, rounds.member._rejoin) == ("m", tps(0, 1), True)


@pytest.mark.parametrize("code", [14, 15, 16, -1, 9999])
async def test_a_coordinator_that_moved_is_looked_for_again(code):
    with pytest.raises(RetriableError):
        Rounds().member._on_error(code, "join")


@pytest.mark.parametrize("code", [23, 24, 26, 30, 35, 81])
async def test_what_cannot_be_helped_is_fatal_and_names_the_group(code):
    with pytest.raises(FatalError, match="group g"):
        Rounds().member._on_error(code, "join")


async def test_a_group_that_is_too_large_for_the_broker_is_told_of_once(caplog):
    caplog.set_level("INFO", logger="streamflow.kafka")
    member = Rounds().member

    def said(*shares):
        caplog.clear()
        member._tell_size(Shares([], *shares), 70)
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    assert not said(10_000)
    ((level, text),) = said(10_000, "where tasks are")
    assert level == "WARNING"
    assert "its 70 members are not told where tasks are" in text
    assert not said(20_000, "where tasks are")
    ((level, text),) = said(1_000_000, "where tasks are")
    assert level == "WARNING"
    assert "takes 1000000 bytes even in short" in text
    assert said(30_000) == [("INFO", "group g: its members are told everything again")]
    assert said(1_000_000, "")[0][0] == "WARNING"


@pytest.mark.parametrize("instance_id", [None, "one"])
async def test_only_a_static_member_can_have_missed_a_round(instance_id, monkeypatch):
    """The answer to a join may be lost twice: nobody was given what such a member claims."""
    rounds = Rounds(instance_id=instance_id)
    member, generations = rounds.member, iter([4, 6])

    async def coordinator():
        return 1

    async def send(node, call, *_, **__):
        share = write_shares([Claim("m", frozenset({"t"}), tps(), -1)], {"m": Given(tps(0))}, {"t": 1}, "").assignments
        join = {"generation": next(generations), "leader": "", "member_id": "m"} if not isinstance(call, Sync) else {}
        return SimpleNamespace(error_code=0, assignment=share[0][1], **join)

    class Sync:
        def __init__(self, *_):
            pass

    monkeypatch.setattr(wire_group, "SYNC_GROUP", Sync)
    monkeypatch.setattr(member, "_find_coordinator", coordinator)
    monkeypatch.setattr(member._client, "send", send)
    for _ in range(2):
        member._settle(await member._round())
    lost = [event for event in rounds.events if isinstance(event, Lost)]
    assert [event.partitions for event in lost] == ([tps(0)] if instance_id else [])
    assert member._owned == tps(0)
