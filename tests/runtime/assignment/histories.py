"""Random clusters with a history, for properties of the assignor."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from streamflow.runtime.assignment.cluster import TaskId
from tests.runtime.assignment.world import ACCEPTABLE, World, tasks_of

NAMES = [f"m{number}" for number in range(8)]
KINDS = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=1)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["join", "join", "join", "come back", "leave", "die"]),
        st.sampled_from(NAMES),
        st.sampled_from(["", "x", "y", "z"]),
        st.sampled_from([1, 1, 2, 3]),
    ),
    min_size=1,
    max_size=8,
)

patient = settings(suppress_health_check=[HealthCheck.too_slow])
"""Drawing a world makes plans, which takes long where the machine is busy."""


@st.composite
def worlds(draw: st.DrawFn, *, racks: bool = True, capacities: bool = True, silent: bool = False) -> World:
    """A cluster with a history, in the middle of whatever it is about."""
    kinds = draw(KINDS)
    world = World(
        tasks_of(kinds, draw(st.sets(st.sampled_from("abcd")))), draw(st.integers(0, 3)), draw(st.integers(1, 5))
    )
    gone: dict[str, dict[TaskId, int]] = {}
    for what, name, rack, capacity in draw(EVENTS):
        if name not in world.workers:
            follows = not silent or draw(st.booleans())
            joined = world.join(
                name, rack=rack if racks else "", capacity=capacity if capacities else 1, follows=follows
            )
            if what == "come back" and follows:
                joined.lags.update(gone.get(name, {}))
        elif len(world.workers) > 1 and what in ("leave", "die"):
            left = world.leave(name)
            lag = draw(st.sampled_from([0, ACCEPTABLE, 5 * ACCEPTABLE]))
            gone[name] = {**left.lags, **dict.fromkeys(left.active & world.stateful, lag)}
        for _ in range(draw(st.integers(0, 3))):
            world.round()
    return world


def bound(world: World) -> int:
    """Rounds after which nothing moves any more: every state may have to be copied, some at a time.

    Beside them: one round in which a task is with nobody, and one to start with and one to end with. Tasks without
    state that are with nobody come to somebody a round after the first copies were begun: some were in vain then.
    """
    copies = len(world.stateful) * (1 + world.replicas)
    in_vain = len(world.tasks) > len(world.stateful)
    return math.ceil(copies / world.warm_ups) + 3 + in_vain
