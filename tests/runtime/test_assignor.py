"""The assignor on random groups: every task once, balanced to within one, sticky, settled after one more round."""

from hypothesis import given
from hypothesis import strategies as st

from streamflow.log.api import Member
from streamflow.model.record import TopicPartition
from streamflow.runtime.assignor import AssignedTask, TaskAssignor, assign, tasks_of

COUNTS = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 9), min_size=1)
MEMBERS = st.sets(st.sampled_from([f"m{number}" for number in range(8)]), min_size=1)


def members_of(ids: set[str], topics: frozenset[str], owned: dict[str, list[AssignedTask]]) -> list[Member]:
    return [
        Member(one, topics, frozenset(tp for task in owned.get(one, []) for tp in task.partitions))
        for one in sorted(ids)
    ]


def sizes(assignment: dict[str, list[AssignedTask]]) -> list[int]:
    return [len(tasks) for tasks in assignment.values()]


@given(COUNTS, MEMBERS)
def test_every_task_has_one_owner_and_nobody_has_two_more_than_another(counts: dict[str, int], ids: set[str]) -> None:
    tasks = tasks_of({topic: [topic] for topic in counts}, counts)
    assignment = assign(members_of(ids, frozenset(counts), {}), tasks)
    assert sorted(task for owned in assignment.values() for task in owned) == sorted(tasks)
    assert max(sizes(assignment)) - min(sizes(assignment)) <= 1


@given(COUNTS, MEMBERS, MEMBERS)
def test_who_stays_keeps_what_balance_allows(counts: dict[str, int], before: set[str], after: set[str]) -> None:
    topics = frozenset(counts)
    tasks = tasks_of({topic: [topic] for topic in counts}, counts)
    first = assign(members_of(before, topics, {}), tasks)
    second = assign(members_of(after, topics, first), tasks)
    assert sorted(task for owned in second.values() for task in owned) == sorted(tasks)
    assert max(sizes(second)) - min(sizes(second)) <= 1
    share = -(-len(tasks) // len(after))
    for one in before & after:
        kept = set(first[one]) & set(second[one])
        assert len(kept) >= min(len(first[one]), len(tasks) // len(after))
        assert len(second[one]) <= share
    third = assign(members_of(after, topics, second), tasks)
    assert {one: set(owned) for one, owned in third.items()} == {one: set(owned) for one, owned in second.items()}


def test_who_comes_later_gets_some_of_every_sub_topology() -> None:
    """Not only those whose name comes last: they may be the heavy ones."""
    topics = frozenset({"light", "numbers"})
    tasks = tasks_of({topic: [topic] for topic in topics}, dict.fromkeys(topics, 6))
    owned: dict[str, list[AssignedTask]] = {}
    for ids in ({"a"}, {"a", "b"}, {"a", "b", "c"}, {"b", "c"}, {"b", "c", "d"}):
        owned = assign(members_of(ids, topics, owned), tasks)
        for mine in owned.values():
            kinds = [sum(task.sub_topology == topic for task in mine) for topic in topics]
            assert max(kinds) - min(kinds) <= 1, owned


def test_a_task_is_never_split() -> None:
    assignor = TaskAssignor({"both": ["left", "right"]})
    topics = frozenset({"left", "right"})
    members = [Member(one, topics, frozenset()) for one in ("m0", "m1", "m2")]
    for each in assignor(members, {"left": 4, "right": 3}).values():
        numbers = {tp.partition for tp in each.partitions}
        expected = {TopicPartition("left", number) for number in numbers}
        expected |= {TopicPartition("right", number) for number in numbers if number < 3}
        assert each.partitions == expected


def test_a_member_gets_no_task_of_a_topic_it_does_not_read() -> None:
    old = Member("old", frozenset({"a"}), frozenset())
    new = Member("new", frozenset({"a", "b"}), frozenset())
    given_out = TaskAssignor({"a": ["a"], "b": ["b"]})([new, old], {"a": 4, "b": 4})
    assert all(tp.topic == "a" for tp in given_out["old"].partitions)
    assert sum(len(given.partitions) for given in given_out.values()) == 8
