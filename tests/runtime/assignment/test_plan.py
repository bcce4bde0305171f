"""The assignor on random clusters that change: what each plan promises, and where a row of plans comes to rest."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.runtime.assignment.cluster import Cluster, ClusterMember, Plan, TaskId
from streamflow.runtime.assignment.plan import plan
from tests.runtime.assignment.histories import NAMES, bound, patient, worlds
from tests.runtime.assignment.world import ACCEPTABLE, World, tasks_of


def changed(before: dict[TaskId, str], after: dict[TaskId, str]) -> dict[TaskId, str]:
    return {task: owner for task, owner in after.items() if before.get(task) != owner}


def owners(planned: Plan) -> dict[TaskId, str]:
    return {task: name for name, tasks in planned.active.items() for task in tasks}


def lag_of(member: ClusterMember, task: TaskId) -> float:
    return member.lags.get(task, 0 if task in member.active else math.inf)


def loads(world: World, held: Mapping[str, frozenset[TaskId]]) -> list[float]:
    return [len(held[name]) / worker.capacity for name, worker in world.workers.items()]


# --- every plan -----------------------------------------------------------------------------------------------------


@patient
@given(worlds(silent=True))
def test_every_task_is_active_exactly_once(world: World) -> None:
    planned = world.plan()
    assert sorted(task for tasks in planned.active.values() for task in tasks) == sorted(
        task.id for task in world.tasks
    )
    assert set(planned.active) == set(planned.standby) == set(planned.warm_up) == set(world.workers)


@patient
@given(worlds(silent=True), st.randoms(use_true_random=False))
def test_a_plan_does_not_depend_on_the_order_of_anything(world: World, shuffled: random.Random) -> None:
    cluster = world.cluster()
    members = [
        replace(member, lags=dict(shuffled.sample(sorted(member.lags.items()), len(member.lags))))
        for member in shuffled.sample(cluster.members, len(cluster.members))
    ]
    tasks = shuffled.sample(cluster.tasks, len(cluster.tasks))
    assert plan(replace(cluster, members=members, tasks=tasks)) == plan(cluster)


@patient
@given(worlds(silent=True))
def test_no_task_with_state_goes_where_its_state_is_not_while_somebody_is_caught_up(world: World) -> None:
    cluster = world.cluster()
    members = {member.member_id: member for member in cluster.members}
    for task, owner in owners(plan(cluster)).items():
        if task not in world.stateful or lag_of(members[owner], task) <= ACCEPTABLE:
            continue
        before = [member for member in cluster.members if task in member.active]
        if before and not before[0].follows:
            assert not members[owner].follows, (task, owner)  # both are of a version that does not warm up
            continue
        assert not [member for member in cluster.members if lag_of(member, task) <= ACCEPTABLE], (task, owner)
        # Nobody is caught up: it stays, or goes to who lacks least.
        nearest = min(lag_of(member, task) for member in before or cluster.members)
        assert lag_of(members[owner], task) == nearest, (task, owner)


@patient
@given(worlds(silent=True))
def test_nobody_has_a_task_twice_and_only_who_follows_has_copies(world: World) -> None:
    planned = world.plan()
    on_the_way = 0
    for name, worker in world.workers.items():
        active, standby, warm_up = planned.active[name], planned.standby[name], planned.warm_up[name]
        assert not standby & active
        assert not standby & warm_up
        assert standby | warm_up <= world.stateful
        assert worker.follows or not standby | warm_up
        for task in warm_up & active:
            assert world.owners().get(task, name) != name
        on_the_way += len(warm_up & active)
    assert sum(len(tasks) for tasks in planned.warm_up.values()) - on_the_way <= world.warm_ups


@patient
@given(worlds(silent=True))
def test_there_are_as_many_standbys_as_there_can_be(world: World) -> None:
    planned = world.plan()
    holders = owners(planned)
    copies = Counter(task for tasks in planned.standby.values() for task in tasks)
    warming = Counter(task for name, tasks in planned.warm_up.items() for task in tasks - planned.active[name])
    follow = [name for name, worker in world.workers.items() if worker.follows]
    for task in world.stateful:
        others = len([name for name in follow if name != holders[task]])
        assert min(world.replicas, others - warming[task]) <= copies[task] <= min(world.replicas, others)


# --- a row of plans ---------------------------------------------------------------------------------------------------


@patient
@given(worlds())
def test_plans_come_to_rest_and_stay_there(world: World) -> None:
    """Warm-ups that are caught up make room for the next ones; what lies about falls behind meanwhile."""
    world.settle(bound(world))
    assert not any(planned for planned in world.plan().warm_up.values())
    moves = world.moves
    for _ in range(4):
        assert not world.round()
    assert world.moves == moves


@patient
@given(worlds(silent=True))
def test_plans_come_to_rest_beside_workers_of_an_older_version(world: World) -> None:
    world.settle(bound(world))
    assert not world.round()


@patient
@given(worlds())
def test_at_rest_nobody_has_two_more_than_another_per_unit_of_capacity(world: World) -> None:
    world.settle(bound(world))
    active = loads(world, world.plan().active)
    assert max(active) - min(active) <= 1


@patient
@given(worlds(racks=False))
def test_at_rest_standbys_are_balanced_where_active_tasks_leave_the_choice(world: World) -> None:
    """Who could take one from who has two more has the task itself, or a copy."""
    world.settle(bound(world))
    planned = world.plan()
    for heavy, crowded in world.workers.items():
        for light, empty in world.workers.items():
            gap = len(planned.standby[heavy]) / crowded.capacity - (len(planned.standby[light]) + 1) / empty.capacity
            if gap > 0:
                assert planned.standby[heavy] <= planned.standby[light] | planned.active[light]


@patient
@given(worlds())
def test_at_rest_copies_are_in_as_many_racks_as_there_are(world: World) -> None:
    world.settle(bound(world))
    planned = world.plan()
    holders = owners(planned)
    for task in world.stateful:
        copies = [name for name, tasks in planned.standby.items() if task in tasks]
        used = [world.workers[name].rack for name in (holders[task], *copies)]
        named = [rack for rack in used if rack]
        unused = {worker.rack for name, worker in world.workers.items() if name not in (holders[task], *copies)}
        if len(set(named)) < len(named):
            assert unused <= set(named), (task, used)


@patient
@given(worlds(), st.sampled_from(["a", "new"]), st.sampled_from([1, 1, 2, 3]))
def test_who_joins_takes_its_share_and_next_to_nothing_else_moves(world: World, name: str, capacity: int) -> None:
    """Among the others at most one task per sub-topology, where they are not even without."""
    world.settle(bound(world))
    before = world.owners()
    world.join(name, capacity=capacity)
    world.settle(bound(world))
    moved = changed(before, world.owners())
    its = [task for task, owner in moved.items() if owner == name]
    assert len(its) <= math.ceil(
        len(world.tasks) * capacity / sum(worker.capacity for worker in world.workers.values())
    )
    assert len(moved) - len(its) <= len({task.id.sub_topology for task in world.tasks})


@patient
@given(worlds(), st.sampled_from(NAMES))
def test_when_one_leaves_its_tasks_move(world: World, name: str) -> None:
    """Besides, a standby which takes over more than its share hands as many on, and evenness may want one of each."""
    world.settle(bound(world))
    if len(world.workers) == 1 or name not in world.workers:
        return
    before = world.owners()
    left = world.leave(name)
    copied = {task for task in left.active if any(task in worker.lags for worker in world.workers.values())}
    world.settle(bound(world))
    moved = changed(before, world.owners())
    assert left.active <= set(moved)
    sub_topologies = {task.id.sub_topology for task in world.tasks}
    assert len(moved) <= len(left.active) + len(copied) + len(sub_topologies)


# --- examples ---------------------------------------------------------------------------------------------------------


def kinds_of(tasks: set[TaskId]) -> Counter[str]:
    return Counter(task.sub_topology for task in tasks)


def group(world: World, *names: str) -> World:
    for name in names:
        world.join(name)
    world.settle(bound(world))
    return world


def test_a_task_with_state_stays_until_its_target_has_warmed_up() -> None:
    world = group(World(tasks_of({"s": 6}, "s"), warm_ups=2), "a")
    world.join("b")
    first = world.plan()
    assert len(first.active["a"]) == 6
    assert len(first.warm_up["b"]) == 2
    world.apply(first)
    assert world.plan() == first, "it is not caught up yet"
    world.catch_up()
    second = world.plan()
    assert second.active["b"] == first.warm_up["b"]
    assert second.warm_up["b"] > first.warm_up["b"], "those on their way are followed on, and the next one begins"
    assert world.round()
    assert not world.workers["b"].active, "they are with nobody until their owner has given them up"
    assert world.round()
    assert world.workers["b"].active == second.active["b"]
    world.settle(bound(world))
    assert len(world.workers["b"].active) == 3


def test_the_warm_up_that_is_nearest_to_its_end_goes_first() -> None:
    """What is under way is not given up for another one."""
    world = group(World(tasks_of({"s": 6}, "s"), warm_ups=1), "a")
    world.join("b")
    (task,) = world.plan().warm_up["b"]
    under_way = TaskId("s", (task.partition + 1) % 6)
    world.workers["b"].lags[under_way] = 5 * ACCEPTABLE
    assert world.plan().warm_up["b"] == {under_way}


def test_a_task_without_state_moves_at_once() -> None:
    world = group(World(tasks_of({"s": 6})), "a")
    world.join("b")
    assert [len(tasks) for tasks in world.plan().active.values()] == [3, 3]


def test_a_standby_takes_over_in_place() -> None:
    world = group(World(tasks_of({"s": 8}, "s"), replicas=1), *"abcd")
    copies = {name: worker.standby for name, worker in world.workers.items()}
    left = world.leave("c")
    planned = world.plan()
    for task in left.active:
        (owner,) = (name for name, tasks in planned.active.items() if task in tasks)
        assert task in copies[owner]


def test_of_those_that_are_caught_up_the_nearest_takes_over() -> None:
    """A standby has nothing to read; who had a task some time ago reads what has been committed since."""
    tasks = tasks_of({"s": 12}, "s")
    ids = [task.id for task in tasks]
    behind = dict.fromkeys(ids[9:], ACCEPTABLE)  # the tasks of who has died
    members = [
        ClusterMember(name, frozenset({"s"}), frozenset(active), standby, {**behind, **dict.fromkeys(standby, 0)}, True)
        for name, active, standby in [
            ("a", ids[0:3], frozenset(ids[9:11])),
            ("b", ids[3:6], frozenset(ids[11:])),
            ("c", ids[6:9], frozenset[TaskId]()),
        ]
    ]
    active = plan(Cluster(members, tasks, 1, ACCEPTABLE)).active
    assert active["a"] & members[0].standby
    assert ids[11] in active["b"]
    assert [len(mine) for mine in active.values()] == [4, 4, 4]


def test_copies_of_what_one_worker_does_are_spread_over_the_others() -> None:
    """So when it dies each takes over a share of its work, and has the state of that."""
    world = group(World(tasks_of({"s": 24}, "s"), replicas=1), *"abcd")
    for name, worker in world.workers.items():
        others = [len(other.standby & worker.active) for one, other in world.workers.items() if one != name]
        assert others == [2, 2, 2], name


def test_who_is_overtaken_while_it_restores_hands_the_task_over() -> None:
    """A worker that restores for long serves nobody, and another one could."""
    (task,) = tasks_of({"s": 1}, "s")
    topics = frozenset({"s"})
    restoring = ClusterMember("a", topics, frozenset({task.id}), lags={task.id: 5_000_000}, follows=True)
    ready = ClusterMember("b", topics, lags={task.id: 10_000}, follows=True)
    late = replace(ready, lags={task.id: 10_001})
    assert owners(plan(Cluster([restoring, ready], [task]))) == {task.id: "b"}
    assert owners(plan(Cluster([restoring, late], [task]))) == {task.id: "a"}
    assert owners(plan(Cluster([late, replace(restoring, active=frozenset())], [task]))) == {task.id: "b"}


def test_who_cannot_follow_a_task_keeps_no_warm_up_of_it_and_the_others_go_on() -> None:
    world = group(World(tasks_of({"s": 8}, "s"), warm_ups=2), "a")
    world.join("b")
    stuck = world.plan().warm_up["b"]
    assert len(stuck) == 2
    cluster = world.cluster()
    refusing = [replace(one, refused=stuck) if one.member_id == "b" else one for one in cluster.members]
    planned = plan(replace(cluster, members=refusing))
    assert len(planned.warm_up["b"]) == 2
    assert not planned.warm_up["b"] & stuck
    assert stuck <= planned.active["a"]


def test_who_refuses_a_copy_gets_none_and_the_task_only_if_all_do() -> None:
    world = group(World(tasks_of({"s": 4}, "s"), replicas=1), *"abc")
    cluster = world.cluster()
    every = frozenset(task.id for task in world.tasks)
    refusing = [replace(one, refused=every) if one.member_id == "c" else one for one in cluster.members]
    planned = plan(replace(cluster, members=refusing))
    assert not planned.standby["c"]
    assert sum(map(len, planned.standby.values())) == 4
    assert planned.active["c"] == world.workers["c"].active  # it has those
    alone = replace(refusing[-1], active=frozenset())
    assert plan(replace(cluster, members=[alone])).active == {"c": every}


def test_who_comes_back_gets_what_it_had() -> None:
    world = group(World(tasks_of({"s": 12, "t": 6}, "st")), *"abc")
    had = world.workers["b"].active
    lags = world.leave("b").lags
    world.round()
    world.join("b").lags.update(lags)
    assert world.plan().active["b"] == had


def test_who_comes_later_gets_some_of_every_sub_topology() -> None:
    """Not only those whose name comes last: they may be the heavy ones. And of three times as many three times more."""
    world = World(tasks_of({"light": 4, "numbers": 12}))
    for names in ("a", "ab", "abcd", "abd", "ab", "abef", "af"):
        for name in set(names) ^ set(world.workers):
            world.join(name) if name in names else world.leave(name)
        world.settle(2)
        for worker in world.workers.values():
            kinds = kinds_of(worker.active)
            assert abs(kinds["light"] - 4 / len(names)) < 1.4, (names, kinds)
            assert abs(kinds["numbers"] - 12 / len(names)) < 1.4, (names, kinds)


def test_a_fresh_group_gets_as_many_of_each_sub_topology() -> None:
    world = World(tasks_of({"a": 7, "b": 4, "c": 9}, "ac"))
    for name in NAMES[:5]:
        world.join(name)
    world.apply(world.plan())
    for kind in "abc":
        counts = [kinds_of(worker.active)[kind] for worker in world.workers.values()]
        assert max(counts) - min(counts) <= 1


def test_capacity_is_a_share() -> None:
    world = World(tasks_of({"s": 12}, "s"), replicas=1)
    for name, capacity in zip("abc", (1, 2, 3), strict=True):
        world.join(name, capacity=capacity)
    assert [len(tasks) for tasks in world.plan().active.values()] == [2, 4, 6]


def test_a_large_worker_gets_no_more_than_its_share() -> None:
    """12 tasks over capacities 3, 2, 1, 1, 1 and 1 are 4 for the first: to round up for all would give it 5."""
    world = World(tasks_of({"s": 12}))
    for number, capacity in enumerate((3, 2, 1, 1, 1, 1)):
        world.join(f"m{number}", capacity=capacity)
    assert sorted(len(tasks) for tasks in world.plan().active.values()) == [1, 1, 1, 2, 3, 4]


def test_more_workers_than_tasks_are_idle_and_ready() -> None:
    world = group(World(tasks_of({"s": 2}, "s"), replicas=1), *"abcd")
    planned = world.plan()
    assert sorted(len(tasks) for tasks in planned.active.values()) == [0, 0, 1, 1]
    assert sorted(len(tasks) for tasks in planned.standby.values()) == [0, 0, 1, 1]


def test_a_standby_in_the_rack_of_its_task_moves_once_another_rack_has_the_state() -> None:
    world = World(tasks_of({"s": 1}, "s"), replicas=1)
    world.join("a", rack="x")
    world.join("b", rack="x")
    world.settle(3)
    (holder,) = world.owners().values()
    (copy,) = {"a", "b"} - {holder}
    world.join("c", rack="y")
    first = world.plan()
    assert first.standby[copy], "until then a copy in the same rack is better than none"
    assert first.warm_up["c"]
    world.settle(4)
    assert world.workers["c"].standby
    assert not world.workers[copy].standby


def test_a_member_gets_no_task_of_a_topic_it_does_not_read() -> None:
    """Two versions of an app: what only the new one reads is shared among the new ones; the rest evens that out."""
    world = World(tasks_of({"a": 8, "b": 4}, "b"), replicas=1)
    for name in ("old", "new1", "new2"):
        world.join(name)
    world.workers["old"].topics = frozenset({"a"})
    world.settle(bound(world))
    planned = world.plan()
    assert [len(tasks) for tasks in planned.active.values()] == [4, 4, 4]
    assert kinds_of(world.workers["old"].active) == {"a": 4}
    assert not planned.standby["old"]
    world.leave("new1")
    world.leave("new2")
    assert owners(world.plan()).keys() == {TaskId("a", number) for number in range(8)}, "nobody reads the others"


def test_workers_of_an_older_version_share_as_they_did() -> None:
    """They say nothing: among them a task with state moves at once, and nobody is told to follow anything."""
    world = World(tasks_of({"s": 8}, "s"), replicas=1)
    world.join("a", follows=False)
    world.settle(1)
    world.join("b", follows=False)
    planned = world.plan()
    assert [len(tasks) for tasks in planned.active.values()] == [4, 4]
    assert not any(planned.standby.values())
    assert not any(planned.warm_up.values())


def test_upgrading_one_worker_after_another_restores_nothing_twice() -> None:
    """Each stops, and comes back as one that says what it has; the others go on with what they have."""
    world = World(tasks_of({"s": 9}, "s"))
    for name in "abc":
        world.join(name, follows=False)
    world.settle(3)
    for name in "abc":
        had = world.leave(name)
        world.settle(3)
        world.join(name).lags.update(dict.fromkeys(had.active, 0))
        world.settle(bound(world))
        assert sorted(len(worker.active) for worker in world.workers.values()) == [3, 3, 3]
    moves = world.moves
    world.settle(1)
    assert world.moves == moves


def test_a_worker_of_an_older_version_takes_no_state_from_one_that_has_it() -> None:
    """It could not warm up. What nobody has, and what has no state, it gets."""
    world = group(World(tasks_of({"s": 4, "t": 4}, "s")), "a")
    world.join("old", follows=False)
    world.settle(3)
    assert kinds_of(world.workers["old"].active)["s"] == 0
    assert kinds_of(world.workers["old"].active)["t"] >= 2
    world.leave("a")
    world.settle(1)
    assert len(world.workers["old"].active) == 8


@pytest.mark.parametrize("members", [[], [ClusterMember("a", frozenset())]])
def test_without_anybody_who_may_have_them_tasks_are_nobodys(members: list[ClusterMember]) -> None:
    planned = plan(Cluster(members, tasks_of({"s": 3}, "s"), standby_replicas=1))
    assert not any((*planned.active.values(), *planned.standby.values(), *planned.warm_up.values()))
