"""Each sub-topology by itself is spread evenly: its tasks are other work than those of the next one."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.spread import Spread
from tests.runtime.assignment.histories import KINDS, NAMES, bound, patient, worlds
from tests.runtime.assignment.world import World, tasks_of


def counts(world: World) -> dict[str, list[tuple[int, int]]]:
    """By sub-topology: how many of its tasks each worker has, and its capacity."""
    kinds = sorted({task.id.sub_topology for task in world.tasks})
    return {
        kind: [
            (sum(task.sub_topology == kind for task in worker.active), worker.capacity)
            for worker in world.workers.values()
        ]
        for kind in kinds
    }


def assert_even(world: World) -> None:
    """No two workers differ by more than one task per unit of capacity, of any sub-topology and in all."""
    by_kind = counts(world)
    in_all = [(len(worker.active), worker.capacity) for worker in world.workers.values()]
    for kind, row in [*by_kind.items(), ("all", in_all)]:
        for (many, large), (few, small) in itertools.permutations(row, 2):
            assert many * small - few * large <= large * small, (kind, row)


def round_within_limits(world: World) -> bool:
    """One rebalance. No more is copied at a time than is allowed; what waits to be handed over is copied already."""
    planned = world.plan()
    copied = sum(len(planned.warm_up[name] - planned.active[name]) for name in world.workers)
    assert copied <= world.warm_ups
    moved = world.apply(planned)
    world.catch_up()
    return moved


def settle_within_limits(world: World) -> None:
    for _ in range(bound(world)):
        if not round_within_limits(world):
            return
    raise AssertionError("still moving")


# --- wherever a group has been ----------------------------------------------------------------------------------------


@patient
@given(worlds())
def test_at_rest_every_sub_topology_is_even(world: World) -> None:
    """With any capacities, racks and standbys, whoever has come and gone."""
    world.settle(bound(world))
    assert_even(world)


@patient
@given(worlds(capacities=False))
def test_equal_capacities_of_any_size_differ_by_one_task_at_most(world: World) -> None:
    for worker in world.workers.values():
        worker.capacity = 4
    world.settle(bound(world))
    for row in counts(world).values():
        assert max(row)[0] - min(row)[0] <= 1, row


@patient
@given(KINDS, st.sets(st.sampled_from("abcd")), st.integers(1, 3), st.lists(st.integers(0, 4), max_size=5))
def test_growing_step_by_step(kinds: dict[str, int], stateful: set[str], warm_ups: int, pauses: list[int]) -> None:
    """One joins after the other, some while the warm-ups of those before are under way."""
    world = World(tasks_of(kinds, stateful), warm_ups=warm_ups)
    world.join(NAMES[0])
    settle_within_limits(world)
    for name, pause in zip(NAMES[1:], pauses, strict=False):
        world.join(name)
        for _ in range(pause):
            round_within_limits(world)
    settle_within_limits(world)
    assert_even(world)
    assert not round_within_limits(world)


@patient
@given(KINDS, st.sets(st.sampled_from("abcd")), st.integers(0, 2), st.permutations(NAMES[:5]))
def test_shrinking_step_by_step(kinds: dict[str, int], stateful: set[str], replicas: int, order: list[str]) -> None:
    """Standbys take over where they are, which is not even; then it becomes so."""
    world = World(tasks_of(kinds, stateful), replicas)
    for name in order:
        world.join(name)
    settle_within_limits(world)
    for name in order[:-1]:
        world.leave(name)
        settle_within_limits(world)
        assert_even(world)


@patient
@given(worlds(capacities=False), st.data())
def test_workers_that_read_less_do_not_keep_a_group_from_rest(world: World, data: st.DataObject) -> None:
    """Two versions at a time. It is as even as that allows, and then nothing moves."""
    topics = sorted({tp.topic for task in world.tasks for tp in task.partitions})
    for worker in list(world.workers.values())[1:]:
        if data.draw(st.booleans()):
            worker.topics = frozenset(data.draw(st.sets(st.sampled_from(topics))))
    world.settle(bound(world) + len(world.workers))
    assert not world.round()


@patient
@given(worlds(), st.data())
def test_workers_that_cannot_take_some_tasks_do_not_keep_a_group_from_rest(world: World, data: st.DataObject) -> None:
    """It is balanced in all as far as that allows, and then nothing moves."""
    ids = sorted(task.id for task in world.tasks)
    for worker in world.workers.values():
        worker.refused = data.draw(st.sets(st.sampled_from(ids)))
    world.settle(bound(world) + len(world.workers))
    assert not world.round()


@patient
@given(worlds(capacities=False), st.data())
def test_where_one_worker_cannot_take_some_tasks_the_others_of_their_kind_make_it_even(
    world: World, data: st.DataObject
) -> None:
    """As long as there are enough others for its share, of each sub-topology."""
    name = data.draw(st.sampled_from(sorted(world.workers)))
    kinds = {task.id.sub_topology for task in world.tasks}
    for kind in sorted(kinds):
        of_kind = sorted(task.id for task in world.tasks if task.id.sub_topology == kind)
        share = -(-len(of_kind) // len(world.workers))
        world.workers[name].refused |= set(data.draw(st.permutations(of_kind))[share:])
    world.settle(bound(world) + len(world.workers))
    assert_even(world)


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pauses", list(itertools.product(range(4), repeat=2)))
def test_each_of_four_workers_gets_some_of_the_source_and_of_what_it_repartitions(pauses: tuple[int, int]) -> None:
    """Three tasks each, and one worker had three of the one and none of the other."""
    world = World(tasks_of({"by-digit-repartition": 6, "numbers": 6}, ["by-digit-repartition", "numbers"]))
    world.join("a")
    world.settle(3)
    for name, pause in zip("bcd", (*pauses, 0), strict=True):
        world.join(name)
        for _ in range(pause):
            world.round()
    world.settle(bound(world))
    for row in counts(world).values():
        assert Counter(number for number, _ in row) == {1: 2, 2: 2}


def test_what_was_uneven_is_exchanged_and_no_more() -> None:
    """So it may be left by the leader of an older version. Of four tasks each two have to change places."""
    world = World(tasks_of({"heavy": 4, "light": 4}, ["heavy"]))
    tasks = {kind: {task.id for task in world.tasks if task.id.sub_topology == kind} for kind in ("heavy", "light")}
    world.join("a").active = tasks["heavy"]
    world.join("b").active = tasks["light"]
    world.settle(bound(world))
    assert_even(world)
    assert world.moves == 4


def test_balance_comes_before_evenness() -> None:
    """Only one member may have `b` and has it already: it gets so much less of `a`."""
    spread = Spread({"a": 6}, {"m": 1, "n": 1}, {"b": {"m": 4}})
    none = {"a": {"m": 0, "n": 0}}
    assert spread.counts(none, none) == {"a": {"m": 1, "n": 5}}


def test_what_only_one_may_have_counts_where_the_others_of_its_kind_are_shared_out() -> None:
    world = World(tasks_of({"a": 4, "b": 4}))
    world.join("m")
    world.join("n").refused = {TaskId("a", 0), TaskId("a", 1)}
    world.settle(bound(world))
    assert_even(world)
    assert counts(world) == {"a": [(2, 1), (2, 1)], "b": [(2, 1), (2, 1)]}


def test_who_owns_a_task_keeps_it_before_who_could_go_on_with_it() -> None:
    """One of three has gone, and another one had copies of all that was its."""
    held = {"a": {"m": 2, "n": 3}}
    assert Spread({"a": 5}, dict.fromkeys("mn", 1), {}).counts(held, held) == held
    held = {"a": {"m": 2, "n": 2, "o": 0}}
    owned = {"a": {"m": 1, "n": 2, "o": 0}}
    spread = Spread({"a": 4}, dict.fromkeys("mno", 1), {})
    assert spread.counts(held, owned) == {"a": {"m": 1, "n": 2, "o": 1}}
