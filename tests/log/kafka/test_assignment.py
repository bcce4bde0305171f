"""What the leader hands out, without a broker: nobody gets what another still claims, and rounds come to rest."""

import hypothesis
import hypothesis.strategies as st
import pytest

from streamflow.errors import InternalError
from streamflow.log.kafka import wire
from streamflow.log.kafka.assignment import Claim, assign, flat, nested, read_claim, unread_topics, write_claim
from streamflow.model.record import TopicPartition
from tests.contracts.records import spread

T = frozenset({"t"})


def tps(*numbers: int) -> frozenset[TopicPartition]:
    return frozenset(TopicPartition("t", number) for number in numbers)


def test_what_moves_belongs_to_nobody_for_one_round():
    claims = [Claim("a", T, tps(0, 1, 2, 3), 4), Claim("b", T, tps(), -1)]
    assert assign(spread, claims, {"t": 4}) == {"a": tps(0, 1), "b": tps()}
    claims = [Claim("a", T, tps(0, 1), 5), Claim("b", T, tps(), 5)]
    assert assign(spread, claims, {"t": 4}) == {"a": tps(0, 1), "b": tps(2, 3)}


def test_of_two_claims_the_younger_counts_and_nobody_gets_it_until_the_other_gives_it_up():
    claims = [Claim("a", T, tps(0), 4), Claim("b", T, tps(0), 6)]
    seen = []

    def assignor(members, counts):
        seen.extend(members)
        return spread(members, counts)

    assert assign(assignor, claims, {"t": 1}) == {"a": tps(), "b": tps()}
    assert {member.member_id: member.owned for member in seen} == {"a": tps(), "b": tps(0)}


def test_what_is_of_a_topic_that_does_not_exist_stays_with_its_owner():
    claims = [Claim("a", T, tps(0), 4), Claim("b", T, tps(1, 2), 4), Claim("c", T, tps(2), 3)]
    assert assign(spread, claims, {}) == {"a": tps(0), "b": tps(1), "c": tps()}


@pytest.mark.parametrize("target", [{"a": tps(0), "b": tps(0)}, {"nobody": tps(0)}])
def test_a_wrong_assignor_is_noticed(target):
    claims = [Claim("a", T, tps(), -1), Claim("b", T, tps(), -1)]
    with pytest.raises(InternalError):
        assign(lambda members, counts: target, claims, {"t": 1})


def test_topics_that_the_leader_does_not_know_are_told():
    both = [Claim("new", frozenset({"t", "n", "gone"}), tps(), -1), Claim("old", T, tps(0), 4)]
    counts = {"t": 1, "n": 2}
    known_to_the_leader = {"new": tps(), "old": tps(0)}
    assert unread_topics(both, counts, known_to_the_leader) == {"n"}
    assert unread_topics(both, counts, {"new": flat([("n", [0, 1])]), "old": tps(0)}) == frozenset()
    # What moves belongs to nobody for a round, and is still in somebody's hands.
    assert unread_topics(both, counts, {"new": flat([("n", [0, 1])]), "old": tps()}) == frozenset()


@hypothesis.given(
    owned=st.dictionaries(st.sampled_from("abcde"), st.frozensets(st.integers(0, 9)), min_size=1),
    count=st.integers(0, 10),
)
def test_whatever_members_claim_two_rounds_give_everything_to_exactly_one_of_them(owned, count):
    claims = [Claim(member_id, T, tps(*numbers), 1) for member_id, numbers in owned.items()]
    for generation in (2, 3):
        given = assign(spread, claims, {"t": count})
        for claim in claims:  # nobody gets what another claims
            others = frozenset().union(*(other.owned for other in claims if other is not claim))
            assert not given[claim.member_id] & others
        claims = [Claim(c.member_id, T, given[c.member_id], generation) for c in claims]
    held = [tp for claim in claims for tp in claim.owned]
    assert sorted(held) == sorted(tps(*range(count)))


partitions = st.frozensets(
    st.builds(TopicPartition, st.text(min_size=1, max_size=5), st.integers(0, 2**31 - 1)), max_size=20
)


@hypothesis.given(topics=st.frozensets(st.text(max_size=10)), owned=partitions, generation=st.integers(-1, 2**31 - 1))
def test_claims_and_assignments_come_back_as_they_went(topics, owned, generation):
    assert read_claim("a", write_claim(topics, owned, generation)) == Claim("a", topics, owned, generation)
    assigned, unread = wire.decode_assignment(wire.encode_assignment(nested(owned), ["new", "newer"]))
    assert (flat(assigned), unread) == (owned, ["new", "newer"])
    assert wire.decode_assignment(wire.encode_assignment({})) == ([], [])


def test_a_member_may_get_no_bytes_at_all():
    assert wire.decode_assignment(b"") == ([], [])
