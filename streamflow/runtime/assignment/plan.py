"""The assignor: a cluster in, a plan out. A pure function, whatever the order of what it is given."""

from __future__ import annotations

from collections.abc import Iterable

from streamflow.runtime.assignment.active import ActivePlacement
from streamflow.runtime.assignment.cluster import Cluster, Plan, TaskId
from streamflow.runtime.assignment.standby import StandbyPlacement, WarmUps
from streamflow.runtime.assignment.standing import Standing


def plan(cluster: Cluster) -> Plan:
    """Decide who processes what, who keeps copies of which state, and who is to catch up with what.

    docs/assignment.md states the rules. In short: every task has one member that reads all its topics; who has one
    keeps it while that is balanced to within one task per unit of capacity, in all and of each sub-topology; a task
    with state goes to who is caught up, or stays while its target warms up; copies lie in other members than their
    task, and in other racks where they can.

    Args:
        cluster: All that is known.

    Returns:
        The plan. A task whose topics no member reads is in nobody's.
    """
    standing = Standing(cluster)
    placement = ActivePlacement(standing)
    active = placement.now
    warm_ups = WarmUps(standing, cluster.max_warmup_replicas)
    warm_ups.grant(
        (task, target)
        for task, target in placement.target.items()
        if target != active[task] and standing.follows(target)
    )
    standbys = StandbyPlacement(standing, active, cluster.standby_replicas, warm_ups)
    return Plan(
        active=_by_member(standing, active.items()),
        standby=_by_member(standing, ((task, one) for task, copies in standbys.copies.items() for one in copies)),
        warm_up=_by_member(
            standing,
            [
                *((task, one) for task, members in warm_ups.by_task.items() for one in members),
                *_on_their_way(standing, active.items()),
            ],
        ),
    )


def _on_their_way(standing: Standing, active: Iterable[tuple[TaskId, str]]) -> Iterable[tuple[TaskId, str]]:
    """Tasks whose owner has yet to give them up, with those that follow them until they get them."""
    for task, one in active:
        if standing.owner.get(task, one) != one and standing.follows(one) and one in standing.lags.get(task, ()):
            yield task, one


def _by_member(standing: Standing, pairs: Iterable[tuple[TaskId, str]]) -> dict[str, frozenset[TaskId]]:
    tasks: dict[str, list[TaskId]] = {one: [] for one in standing.members}
    for task, one in pairs:
        tasks[one].append(task)
    return {one: frozenset(mine) for one, mine in tasks.items()}
