"""What the leader hands out, without a broker: nobody gets what another still claims, and rounds come to rest."""

import hypothesis
import hypothesis.strategies as st
import pytest

from streamflow.errors import InternalError
from streamflow.log.api import Given, Member
from streamflow.log.kafka import wire_group
from streamflow.log.kafka.assignment import (
    Claim,
    Share,
    assign,
    checksum,
    flat,
    nested,
    read_claim,
    read_share,
    unread_topics,
    write_claim,
    write_shares,
)
from streamflow.log.kafka.user_data import Answer, Spoken
from streamflow.model.record import TopicPartition
from tests.contracts.records import spread

T = frozenset({"t"})


def tps(*numbers: int) -> frozenset[TopicPartition]:
    return frozenset(TopicPartition("t", number) for number in numbers)


def given(**numbers: frozenset[TopicPartition]) -> dict[str, Given]:
    return {member_id: Given(partitions) for member_id, partitions in numbers.items()}


def test_what_moves_belongs_to_nobody_for_one_round():
    claims = [Claim("a", T, tps(0, 1, 2, 3), 4), Claim("b", T, tps(), -1)]
    assert assign(spread, claims, {"t": 4}) == given(a=tps(0, 1), b=tps())
    claims = [Claim("a", T, tps(0, 1), 5), Claim("b", T, tps(), 5)]
    assert assign(spread, claims, {"t": 4}) == given(a=tps(0, 1), b=tps(2, 3))


def test_of_two_claims_the_younger_counts_and_nobody_gets_it_until_the_other_gives_it_up():
    claims = [Claim("a", T, tps(0), 4), Claim("b", T, tps(0), 6)]
    seen = []

    def assignor(members, counts):
        seen.extend(members)
        return spread(members, counts)

    assert assign(assignor, claims, {"t": 1}) == given(a=tps(), b=tps())
    assert {member.member_id: member.owned for member in seen} == {"a": tps(), "b": tps(0)}


def test_what_is_of_a_topic_that_does_not_exist_stays_with_its_owner():
    claims = [Claim("a", T, tps(0), 4), Claim("b", T, tps(1, 2), 4), Claim("c", T, tps(2), 3)]
    assert assign(spread, claims, {}) == given(a=tps(0), b=tps(1), c=tps())


@pytest.mark.parametrize("target", [given(a=tps(0), b=tps(0)), given(nobody=tps(0))])
def test_a_wrong_assignor_is_noticed(target):
    claims = [Claim("a", T, tps(), -1), Claim("b", T, tps(), -1)]
    with pytest.raises(InternalError):
        assign(lambda members, counts: target, claims, {"t": 1})


def test_topics_that_the_leader_does_not_know_are_told():
    both = [Claim("new", frozenset({"t", "n", "gone"}), tps(), -1), Claim("old", T, tps(0), 4)]
    counts = {"t": 1, "n": 2}
    known_to_the_leader = given(new=tps(), old=tps(0))
    assert unread_topics(both, counts, known_to_the_leader) == {"n"}
    assert unread_topics(both, counts, given(new=flat([("n", [0, 1])]), old=tps(0))) == frozenset()
    # What moves belongs to nobody for a round, and is still in somebody's hands.
    assert unread_topics(both, counts, given(new=flat([("n", [0, 1])]), old=tps())) == frozenset()


@hypothesis.given(
    owned=st.dictionaries(st.sampled_from("abcde"), st.frozensets(st.integers(0, 9)), min_size=1),
    count=st.integers(0, 10),
)
def test_whatever_members_claim_two_rounds_give_everything_to_exactly_one_of_them(owned, count):
    claims = [Claim(member_id, T, tps(*numbers), 1) for member_id, numbers in owned.items()]
    for generation in (2, 3):
        shares = {one: each.partitions for one, each in assign(spread, claims, {"t": count}).items()}
        for claim in claims:  # nobody gets what another claims
            others = frozenset().union(*(other.owned for other in claims if other is not claim))
            assert not shares[claim.member_id] & others
        claims = [Claim(c.member_id, T, shares[c.member_id], generation) for c in claims]
    held = [tp for claim in claims for tp in claim.owned]
    assert sorted(held) == sorted(tps(*range(count)))


partitions = st.frozensets(
    st.builds(TopicPartition, st.text(min_size=1, max_size=5), st.integers(0, 2**31 - 1)), max_size=20
)


@hypothesis.given(
    topics=st.frozensets(st.text(max_size=10)),
    owned=partitions,
    generation=st.integers(-1, 2**31 - 1),
    words=st.binary(max_size=50),
)
def test_claims_and_shares_come_back_as_they_went(topics, owned, generation, words):
    claim = read_claim("a", "shop-0", write_claim(topics, owned, generation, words))
    assert claim == Claim("a", topics, owned, generation, Spoken(words), "shop-0")
    ((member_id, assignment),) = write_shares([claim], {"a": Given(owned, words)}, {}, "b").assignments
    assert (member_id, read_share(assignment)) == ("a", Share(owned, Answer(words, topics=checksum(topics))))


def test_a_share_says_what_who_takes_its_place_has_to_know():
    claims = [Claim("a", T, tps(0, 1), 4, Spoken()), Claim("b", frozenset({"t", "n"}), tps(), 4, Spoken())]
    shares = dict(write_shares(claims, given(a=tps(0), b=tps()), {"t": 2, "n": 1}, "a").assignments)
    assert read_share(shares["a"]).answer == Answer(b"", ["n"], True, checksum(T), {"t": 2, "n": 1})
    assert read_share(shares["b"]).answer == Answer(b"", ["n"], False, checksum(frozenset({"n", "t"})))
    assert checksum(T) != checksum(frozenset({"n", "t"})) != 0


def test_a_member_may_get_no_bytes_at_all():
    assert read_share(b"") == Share(tps(), Answer(), is_spoken=False)


def test_the_assignor_hears_what_members_say_and_each_is_told_what_it_says_of_it():
    claims = [Claim("b", T, tps(), 4, None), Claim("a", T, tps(0), 4, Spoken(b"lag 3"), "shop-0")]
    heard = []

    def assignor(members, counts):
        heard.extend(members)
        return {"a": Given(tps(0), b"follow 1"), "b": Given(tps(1))}

    assert assign(assignor, claims, {"t": 2}) == {"a": Given(tps(0), b"follow 1"), "b": Given(tps(1))}
    assert heard == [Member("a", T, tps(0), b"lag 3", "shop-0"), Member("b", T, tps())]


# --- what workers of before wrote, up to commit 352dfaa ----------------------------------------------------------

OLD_CLAIM = (
    b"\x00\x02\x00\x00\x00\x02\x00\x01n\x00\x01t\x00\x00\x00\x00\x00\x00\x00\x01"
    b"\x00\x01t\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x04"
)
OLD_SHARE = b"\x00\x00\x00\x00\x00\x01\x00\x01t\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00"
OLD_SHARE_WITH_UNREAD = (
    b"\x00\x00\x00\x00\x00\x01\x00\x01t\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\nn\nnew.er-1"
)


def test_a_worker_of_before_says_nothing():
    assert read_claim("old", None, OLD_CLAIM) == Claim("old", frozenset({"n", "t"}), tps(0, 3), 4, None)


def test_a_worker_of_before_is_told_what_it_can_read():
    old, topics = read_claim("old", None, OLD_CLAIM), frozenset({"n", "new.er-1", "t"})
    claims = [old, Claim("new", topics, tps(), 4, Spoken(b"words"))]
    shares = {"old": Given(tps(0, 3), b"told"), "new": Given(tps(1), b"told")}
    written = dict(write_shares(claims, shares, {"t": 4, "n": 1, "new.er-1": 1}, "new").assignments)
    assert written["old"] == OLD_SHARE_WITH_UNREAD
    assert read_share(written["new"]).answer.unread == ["n", "new.er-1"]
    assert dict(write_shares(claims, shares, {"t": 4}, "old").assignments)["old"] == OLD_SHARE


def test_a_leader_of_before_tells_nothing_but_what_nobody_reads():
    assert read_share(OLD_SHARE) == Share(tps(0, 3), Answer(), is_spoken=False)
    assert read_share(OLD_SHARE_WITH_UNREAD) == Share(tps(0, 3), Answer(unread=["n", "new.er-1"]), is_spoken=False)


@pytest.mark.parametrize("data", [b"\x02\x80", b"\x01\xc1", b"\x01", b"\x01\x81\xa4says\x05\xa4told\x05"])
def test_what_cannot_be_read_counts_as_nothing_said(data):
    claim = read_claim("a", None, wire_group.encode_subscription(["t"], data, {}, 1))
    assert claim == Claim("a", T, tps(), 1, None)
    assert read_share(wire_group.encode_assignment(nested(tps(1)), data)) == Share(tps(1), Answer(), is_spoken=False)


def test_fields_of_a_later_version_are_passed_over():
    later = b"\x01" + b"\x82\xa4says\xc4\x01w\xa4more\x05"
    assert read_claim("a", None, wire_group.encode_subscription(["t"], later, {}, 1)).spoken == Spoken(b"w")
