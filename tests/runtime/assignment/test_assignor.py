"""The assignor as a log's group calls it: partitions and bytes, of workers of several versions."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from hypothesis import given
from hypothesis import strategies as st

import streamflow as sf
from streamflow.log.api import Given, Member
from streamflow.model.record import TopicPartition
from streamflow.processing.topology import SubTopology, Topology
from streamflow.runtime.assignment.assignor import TaskAssignor, tasks_of
from streamflow.runtime.assignment.cluster import AssignedTask, TaskId
from streamflow.runtime.assignment.words import VERSION, Route, Says, Told
from streamflow.runtime.layout import Layout

COUNTS = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 9), min_size=1)
MEMBERS = st.sets(st.sampled_from([f"m{number}" for number in range(8)]), min_size=1)
S = frozenset({"s"})


def tps(topic: str, *partitions: int) -> frozenset[TopicPartition]:
    return frozenset(TopicPartition(topic, partition) for partition in partitions)


def ids(name: str, *partitions: int) -> frozenset[TaskId]:
    return frozenset(TaskId(name, partition) for partition in partitions)


def members_after(names: set[str], topics: frozenset[str], before: dict[str, Given]) -> list[Member]:
    return [Member(one, topics, before[one].partitions if one in before else frozenset()) for one in sorted(names)]


def of_topic(one: Given, topic: str) -> frozenset[TopicPartition]:
    return frozenset(tp for tp in one.partitions if tp.topic == topic)


# --- who says nothing: a group of workers without tables, or of the version before -----------------------------------


@given(COUNTS, MEMBERS, MEMBERS)
def test_silent_members_share_all_and_who_stays_keeps_what_balance_allows(
    counts: dict[str, int], before: set[str], after: set[str]
) -> None:
    topics = frozenset(counts)
    everything = sorted(TopicPartition(topic, number) for topic, count in counts.items() for number in range(count))
    assignor = TaskAssignor({topic: [topic] for topic in counts}, counts)
    first = dict(assignor(members_after(before, topics, {}), counts))
    second = dict(assignor(members_after(after, topics, first), counts))
    for given_out in (first, second):
        assert sorted(tp for each in given_out.values() for tp in each.partitions) == everything
        sizes = [len(each.partitions) for each in given_out.values()]
        assert max(sizes) - min(sizes) <= 1
        assert not any(each.told for each in given_out.values())
        for topic in counts:
            each_has = [len(of_topic(each, topic)) for each in given_out.values()]
            assert max(each_has) - min(each_has) <= 1
    for one in before & after:
        for topic in counts:
            had, has = of_topic(first[one], topic), of_topic(second[one], topic)
            assert had <= has or has <= had  # what is to be even may take some of it, and exchanges nothing
    assert dict(assignor(members_after(after, topics, second), counts)) == second


def test_a_task_is_never_split() -> None:
    assignor = TaskAssignor({"both": ["left", "right"]})
    topics = frozenset({"left", "right"})
    members = [Member(one, topics, frozenset()) for one in ("m0", "m1", "m2")]
    for each in assignor(members, {"left": 4, "right": 3}).values():
        numbers = {tp.partition for tp in each.partitions}
        assert each.partitions == tps("left", *numbers) | tps("right", *(number for number in numbers if number < 3))


def test_partition_p_of_each_topic_that_has_one_belongs_to_task_p() -> None:
    assert tasks_of({"both": ["left", "right"], "none": ["missing"]}, {"left": 2, "right": 1}, ["both"]) == [
        AssignedTask(TaskId("both", 0), tps("left", 0) | tps("right", 0), stateful=True),
        AssignedTask(TaskId("both", 1), tps("left", 1), stateful=True),
    ]


def test_a_partition_that_is_added_goes_to_who_has_the_task() -> None:
    """`right` had one partition, and has three: tasks 1 and 2 grow where they are."""
    topics = frozenset({"left", "right"})
    owned = {"m0": tps("left", 0, 2) | tps("right", 0), "m1": tps("left", 1)}
    members = [Member(one, topics, partitions) for one, partitions in owned.items()]
    given_out = TaskAssignor({"both": ["left", "right"]})(members, {"left": 3, "right": 3})
    assert given_out["m0"].partitions == owned["m0"] | tps("right", 2)
    assert given_out["m1"].partitions == owned["m1"] | tps("right", 1)


def test_two_tasks_that_become_one_stay_with_who_has_more_of_it() -> None:
    """A new version lets agents share a table: what were two sub-topologies has one owner per partition now."""
    topics = frozenset({"a", "b", "c"})
    members = [Member("m0", topics, tps("a", 0)), Member("m1", topics, tps("b", 0) | tps("c", 0))]
    given_out = TaskAssignor({"a": ["a", "b", "c"]})(members, {"a": 1, "b": 1, "c": 1})
    assert given_out["m0"].partitions == frozenset()
    assert given_out["m1"].partitions == tps("a", 0) | tps("b", 0) | tps("c", 0)


# --- who speaks -----------------------------------------------------------------------------------------------------


def member(name: str, says: Says, *owned: int) -> Member:
    return Member(name, S, tps("s", *owned), says.encode())


def test_state_stays_and_everybody_is_told_what_it_does_and_who_does_what() -> None:
    assignor = TaskAssignor({"s": ["s"]}, ["s"], standby_replicas=1, max_warmup_replicas=1)
    a = member("a", Says(url="http://a", follows=True, unpacks=True), 0, 1, 2, 3)
    b = member("b", Says(url="http://b", follows=True, lags={TaskId("s", 2): 10_001, TaskId("s", 3): 10_000}))
    lags = dict.fromkeys(ids("s", 0, 1), 0)
    c = member("c", Says(url="http://c", follows=True, standby=ids("s", 0, 1), lags=lags, unpacks=True))
    given_out = assignor([a, b, c], {"s": 4})
    told = {name: Told.decode(each.told) for name, each in given_out.items()}
    # Each is to have one or two: b is caught up with 3 and gets it once a has let it go; c with 0 or 1.
    (to_c,) = given_out["c"].partitions
    assert given_out["b"].partitions == tps("s", 3)
    assert given_out["a"].partitions == tps("s", 0, 1, 2) - {to_c}
    # On their way, and so followed until they are there.
    assert told["b"].warm_up == ids("s", 3)
    assert told["c"].warm_up == ids("s", to_c.partition)
    standbys = sorted(task for each in told.values() for task in each.standby)
    assert standbys == sorted(ids("s", 0, 1, 2, 3))
    active = {name: ids("s", *(tp.partition for tp in each.partitions)) for name, each in given_out.items()}
    assert {name: each.active for name, each in told.items()} == {"a": active["a"], "b": None, "c": active["c"]}
    # All know the same, also who is told by name because it does not read the shorter form.
    routes = {name: Route(f"http://{name}", active[name], told[name].standby) for name in ("a", "b", "c")}
    assert told["b"].routes == routes
    assert told["a"].routes == told["c"].routes
    assert sorted(told["a"].routes.values(), key=lambda route: route.url) == list(routes.values())


def test_everybody_is_told_the_transactional_ids_that_are_said() -> None:
    """By their tasks: b's are told with the id that b says, and c says none."""
    a, b = (member(name, Says(transactional_id=f"app-{name}", unpacks=True), at) for at, name in enumerate("ab"))
    given_out = TaskAssignor({"s": ["s"]})([a, b, member("c", Says(follows=True, unpacks=True))], {"s": 2})
    for each in given_out.values():
        routes = Told.decode(each.told).routes.values()
        assert {route.transactional_id: route.active for route in routes} == {
            "app-a": ids("s", 0),
            "app-b": ids("s", 1),
            "": frozenset(),
        }


def test_a_lag_of_more_than_is_acceptable_is_warmed_up_first() -> None:
    a = member("a", Says(follows=True), 0, 1)
    b = member("b", Says(follows=True, lags={TaskId("s", 1): 501}))
    strict = TaskAssignor({"s": ["s"]}, ["s"], acceptable_lag_records=500)([a, b], {"s": 2})
    assert strict["a"].partitions == tps("s", 0, 1)
    assert Told.decode(strict["b"].told).warm_up == ids("s", 1)
    easy = TaskAssignor({"s": ["s"]}, ["s"], acceptable_lag_records=501)([a, b], {"s": 2})
    assert easy["b"].partitions == tps("s", 1)


def test_capacity_and_rack_are_heard() -> None:
    assignor = TaskAssignor({"s": ["s"]}, ["s"], standby_replicas=1)
    a = member("a", Says(follows=True, capacity=3, rack="x"))
    b = member("b", Says(follows=True, rack="x"))
    c = member("c", Says(follows=True, rack="y", capacity=2))
    given_out = assignor([a, b, c], {"s": 6})
    assert [len(each.partitions) for each in given_out.values()] == [3, 1, 2]
    copies = {name: Told.decode(each.told).standby for name, each in given_out.items()}
    assert copies["c"] == {TaskId(*tp) for name in "ab" for tp in given_out[name].partitions}
    assert copies["a"] | copies["b"] == {TaskId(*tp) for tp in given_out["c"].partitions}


def test_beside_speakers_the_silent_are_told_nothing_and_take_part() -> None:
    assignor = TaskAssignor({"s": ["s"], "t": ["t"]}, ["s"], standby_replicas=1)
    topics = frozenset({"s", "t"})
    says = Says(url="http://new", follows=True).encode()
    given_out = assignor(
        [Member("new", topics, tps("s", 0, 1), says), Member("old", topics, frozenset())], {"s": 2, "t": 2}
    )
    assert given_out["new"].partitions == tps("s", 0, 1)
    assert given_out["old"] == Given(tps("t", 0, 1))
    told = Told.decode(given_out["new"].told)
    assert told == Told(routes={"new": Route("http://new", ids("s", 0, 1)), "old": Route("", ids("t", 0, 1))})


def test_what_a_newer_or_broken_worker_says_does_not_stop_the_leader() -> None:
    newer = bytes([VERSION]) + msgspec.msgpack.encode({"follows": True, "lags": {"gone": {7: 1}}, "cores": [1, 2]})
    unreadable = bytes([VERSION + 1]) + b"?"
    members = [Member("a", S, frozenset(), newer), Member("b", S, frozenset(), unreadable)]
    given_out = TaskAssignor({"s": ["s"]}, ["s"])(members, {"s": 4})
    assert [len(each.partitions) for each in given_out.values()] == [2, 2]


def test_what_a_worker_assigns_by_comes_from_its_topology_and_settings() -> None:
    """A sub-topology has state if it has tables; the settings are those of the leader."""
    subs = (SubTopology("s", ("s",), ("count",), (), ("counts",)), SubTopology("t", ("t",), ("map",), ()))
    layout = Layout(Topology("app", (), (), subs), {"s": 2, "t": 2})
    settings = sf.App(
        "app", standby_replicas=1, max_warmup_replicas=1, acceptable_lag_records=7, broker="memory://"
    ).settings()
    topics = frozenset({"s", "t"})
    a = Member("a", topics, tps("s", 0, 1) | tps("t", 0, 1), Says(follows=True).encode())
    b = Member("b", topics, frozenset(), Says(follows=True, lags={TaskId("s", 1): 8}).encode())
    given_out = TaskAssignor.of(layout, settings)([a, b], dict(layout.counts))
    assert tps("s", 0, 1) < given_out["a"].partitions
    assert given_out["b"].partitions < tps("t", 0, 1)
    told = Told.decode(given_out["b"].told)
    assert told.warm_up == ids("s", 1)
    assert told.standby == ids("s", 0)


# --- who lost its session -------------------------------------------------------------------------------------------


def ran(*partitions: int, **lags: int) -> Says:
    """A worker that runs these, or did, and has others with the lags of partitions `p0`, `p1`, ..."""
    others = {TaskId("s", int(name[1:])): lag for name, lag in lags.items()}
    return Says(follows=True, unpacks=True, ran=ids("s", *partitions), lags=others)


def owned_by(given_out: Mapping[str, Given]) -> dict[str, frozenset[TopicPartition]]:
    return {name: each.partitions for name, each in given_out.items()}


def behind(given_out: Mapping[str, Given]) -> frozenset[TaskId]:
    (told,) = {Told.decode(each.told).behind for each in given_out.values()}
    return told


def test_all_that_lost_their_sessions_get_back_what_they_ran_in_whatever_order_they_come() -> None:
    assignor = TaskAssignor({"s": ["s"]}, ["s"])
    mine = {"b": (0, 1), "c": (2, 5), "a": (3, 4)}
    says = {name: ran(*tasks) for name, tasks in mine.items()}
    before: dict[str, Given] = {}
    for count in (1, 2, 3, 3):
        members = [
            Member(name, S, before[name].partitions if name in before else frozenset(), says[name].encode())
            for name in list(mine)[:count]
        ]
        owners = {tp: member.member_id for member in members for tp in member.owned}
        wanted = assignor(members, {"s": 6})
        # What goes to another one is nobody's until its owner has let it go.
        before = {
            name: Given(frozenset(tp for tp in given.partitions if owners.get(tp, name) == name), given.told)
            for name, given in wanted.items()
        }
    assert owned_by(wanted) == {name: tps("s", *tasks) for name, tasks in mine.items()}
    assert not behind(wanted)
    assert not any(Told.decode(each.told).warm_up for each in wanted.values())


def test_what_all_lost_goes_to_who_ran_it_though_others_are_caught_up() -> None:
    """As what need not move stays."""
    assignor = TaskAssignor({"s": ["s"]}, ["s"])
    copies = {"a": ran(0, 1, p2=0, p3=0), "b": ran(2, 3, p4=0, p5=0), "c": ran(4, 5, p0=0, p1=0)}
    given_out = assignor([member(name, says) for name, says in copies.items()], {"s": 6})
    assert owned_by(given_out) == {"a": tps("s", 0, 1), "b": tps("s", 2, 3), "c": tps("s", 4, 5)}
    assert not any(Told.decode(each.told).warm_up for each in given_out.values())


def test_who_comes_back_gets_back_what_others_have_yet_to_restore() -> None:
    """It was stopped for longer than its session: one is not open yet, one half restored, one ready there."""
    assignor = TaskAssignor({"s": ["s"]}, ["s"])
    back = member("back", ran(0, 1, 2))
    given_out = assignor([back, member("else", ran(2, 3, 4, 5, p1=50_000), 0, 1, 2, 3, 4, 5)], {"s": 6})
    assert given_out["back"].partitions == tps("s", 0, 1)
    assert Told.decode(given_out["back"].told).warm_up == ids("s", 0, 1, 2)  # two are on their way
    assert not behind(given_out)


def test_who_comes_back_warms_up_what_went_on_without_it() -> None:
    """How far is not known: it may have been away for hours."""
    assignor = TaskAssignor({"s": ["s"]}, ["s"])
    back = member("back", ran(0, 1))
    for other in (ran(0, 1, 2, 3), ran(2, 3, p0=9_999, p1=0), Says(follows=True)):
        given_out = assignor([back, member("else", other, 0, 1, 2, 3)], {"s": 4})
        assert not given_out["back"].partitions
        assert Told.decode(given_out["back"].told).warm_up == ids("s", 0, 1)


def test_what_is_measured_counts_more_than_what_was_running() -> None:
    assignor = TaskAssignor({"s": ["s"]}, ["s"])
    says = Says(follows=True, ran=ids("s", 0, 1), lags={TaskId("s", 0): 10_000, TaskId("s", 1): 10_001})
    given_out = assignor([member("back", says), member("else", ran(0, 1, 2, 3), 0, 1, 2, 3)], {"s": 4})
    assert given_out["back"].partitions == tps("s", 0)


def test_everybody_is_told_what_is_to_be_restored() -> None:
    assignor = TaskAssignor({"s": ["s"], "t": ["t"]}, ["s"])
    topics = frozenset({"s", "t"})
    a = Member("a", topics, tps("s", 0, 1) | tps("t", 0), ran(0, p1=10_001).encode())
    b = Member("b", topics, frozenset(), ran(p2=10_001, p3=10_000).encode())
    assert behind(assignor([a, b], {"s": 5, "t": 1})) == ids("s", 1, 2, 4)
