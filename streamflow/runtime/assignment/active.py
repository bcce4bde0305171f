"""Who processes what: balanced, sticky, and no task with state goes where its state is not."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.standing import Standing


def shares(
    able: Sequence[str],
    count: int,
    capacity: Mapping[str, int],
    before: Mapping[str, int],
    owned: Mapping[str, int],
    held: Mapping[str, int],
) -> dict[str, int]:
    """How many of `count` tasks each member is to have: in proportion to its capacity, rounded to the nearest.

    One after the other goes to who has least per capacity with half of it (Webster's method). So no two differ by more
    than one task per unit of capacity, nobody gets more because another one joins, and where several are as good, who
    has one keeps it, else who is smallest gets it.

    Args:
        able: The members.
        count: Tasks to share.
        capacity: By member.
        before: Tasks that they have besides.
        owned: Of those tasks, how many each one owns.
        held: Of those tasks, how many each one could go on with.
    """
    share = dict.fromkeys(able, 0)
    order = [((before[one] + 0.5) / capacity[one], owned[one] <= 0, held[one] <= 0, capacity[one], one) for one in able]
    heapq.heapify(order)
    for _ in range(count):
        one = order[0][-1]
        has = share[one] = share[one] + 1
        load = (before[one] + has + 0.5) / capacity[one]
        heapq.heapreplace(order, (load, owned[one] <= has, held[one] <= has, capacity[one], one))
    return share


class ActivePlacement:
    """Decides on the active tasks of a cluster.

    Args:
        standing: The cluster.

    Attributes:
        target: By task: who is to have it in the end. A task that no member reads has nobody.
        now: By task: who is to have it as long as its target is not caught up.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._capacity = {name: member.capacity for name, member in standing.members.items()}
        self._load = dict.fromkeys(standing.members, 0)
        self._kinds: dict[str, Counter[str]] = {name: Counter() for name in standing.members}
        self._holder = self._find_holders()
        self.target: dict[TaskId, str] = {}
        groups: dict[tuple[str, ...], list[TaskId]] = {}
        for task, able in standing.able.items():
            groups.setdefault(able, []).append(task)
        # Those with the least choice first: the others even out what they leave.
        for able, tasks in sorted(groups.items(), key=lambda group: (len(group[0]), group[0])):
            if able:
                self._place(able, tasks)
        self.now = {task: self._now(task, target) for task, target in self.target.items()}

    # --- who could go on with it -------------------------------------------------------------------------------

    def _find_holders(self) -> dict[TaskId, str]:
        """Who should have each task if balance did not count; a task that all are as good for has nobody."""
        standing = self._standing
        holders = dict(standing.owner)
        loads = Counter(holders.values())
        loose: list[tuple[int, TaskId, list[str]]] = []
        for task, lags in standing.lags.items():
            owner = standing.owner.get(task)
            if owner is not None and standing.is_ready(task, owner):
                continue
            ready = standing.ready(task)
            if ready:
                loose.append((len(ready), task, ready))
            elif owner is None and lags:
                holder = min(lags, key=lambda one: (lags[one], loads[one] / self._capacity[one], one))
                holders[task] = holder
                loads[holder] += 1
        for _, task, ready in sorted(loose):
            if task in holders:
                loads[holders[task]] -= 1
            holders[task] = min(ready, key=lambda one: (loads[one] / self._capacity[one], one))
            loads[holders[task]] += 1
        return holders

    def _now(self, task: TaskId, target: str) -> str:
        standing, holder = self._standing, self._holder.get(task)
        if holder is None or standing.is_ready(task, target):
            return target
        # Neither knows of warm-ups, so this would never come about: they do as they did in their version.
        if not standing.follows(holder) and not standing.follows(target):
            return target
        return holder

    # --- balance -----------------------------------------------------------------------------------------------

    def _place(self, able: Sequence[str], tasks: Sequence[TaskId]) -> None:
        """Give tasks to the members that may have them: each keeps its share, the rest goes to who lacks some."""
        held: dict[str, list[TaskId]] = {one: [] for one in able}
        owned: Counter[str] = Counter()
        for task in tasks:
            if task in self._holder:
                held[self._holder[task]].append(task)
                owned[self._holder[task]] += self._standing.owner.get(task) == self._holder[task]
        counts = {one: len(mine) for one, mine in held.items()}
        share = shares(able, len(tasks), self._capacity, self._load, owned, counts)
        room = {one: share[one] - counts[one] for one in able if counts[one] < share[one]}
        totals = Counter(task.sub_topology for task in tasks)
        placed: set[TaskId] = set()
        for one, mine in held.items():
            kept = mine if len(mine) <= share[one] else self._keep(mine, totals, room)[: share[one]]
            for task in kept:
                self._give(task, one)
            placed.update(kept)
        left = [task for task in tasks if task not in placed]
        self._place_spread(self._place_near(left, room), room)

    def _keep(self, mine: Iterable[TaskId], totals: Mapping[str, int], room: Mapping[str, int]) -> list[TaskId]:
        """Tasks of one member, those it should keep first.

        Of each sub-topology as large a part as of the others: they differ in the work they are. Among its tasks those
        are given away first whose state lies where there is room, then those that were not this member's.
        """
        owner, holder = self._standing.owner, self._holder

        def keep_first(task: TaskId) -> tuple[float, bool, TaskId]:
            return -self._nearest(task, room), owner.get(task) != holder[task], task

        seen: Counter[str] = Counter()
        ranked: list[tuple[float, int, TaskId]] = []
        for order, task in enumerate(sorted(mine, key=keep_first)):
            seen[task.sub_topology] += 1
            ranked.append((seen[task.sub_topology] / totals[task.sub_topology], order, task))
        return [task for _, _, task in sorted(ranked)]

    def _nearest(self, task: TaskId, room: Mapping[str, int]) -> float:
        """How far behind the best of the members with room is; -1 for one that is caught up."""
        lags = self._standing.lags.get(task)
        if not lags:
            return math.inf
        return min((self._distance(task, one) for one in lags if one in room), default=math.inf)

    def _distance(self, task: TaskId, one: str) -> int:
        return -1 if self._standing.is_ready(task, one) else self._standing.lags[task][one]

    def _place_near(self, tasks: Iterable[TaskId], room: dict[str, int]) -> list[TaskId]:
        """Give tasks to members with room that have some of their state; returns the others."""
        standing = self._standing
        rest: list[TaskId] = []
        choices: list[tuple[int, float, TaskId]] = []
        for task in tasks:
            near = [one for one in standing.lags.get(task, ()) if one in room]
            if near:
                ready = sum(1 for one in near if standing.is_ready(task, one))
                choices.append((ready or len(standing.members), self._nearest(task, room), task))
            else:
                rest.append(task)
        for _, _, task in sorted(choices):
            near = [one for one in standing.lags[task] if one in room]
            if near:
                self._fill(task, min(near, key=lambda one: (self._distance(task, one), self._weight(task, one))), room)
            else:
                rest.append(task)
        return sorted(rest)

    def _place_spread(self, tasks: Iterable[TaskId], room: dict[str, int]) -> None:
        """Give tasks to members with room, those of each sub-topology to different ones as far as that goes."""
        order: list[tuple[float, float, str]] = []
        last: str | None = None
        for task in tasks:
            if task.sub_topology != last:
                last = task.sub_topology
                order = [self._weight(task, one) for one in room]
                heapq.heapify(order)
            one = heapq.heappop(order)[-1]
            self._fill(task, one, room)
            if one in room:
                heapq.heappush(order, self._weight(task, one))

    def _weight(self, task: TaskId, one: str) -> tuple[float, float, str]:
        capacity = self._capacity[one]
        return self._kinds[one][task.sub_topology] / capacity, self._load[one] / capacity, one

    def _fill(self, task: TaskId, one: str, room: dict[str, int]) -> None:
        self._give(task, one)
        room[one] -= 1
        if not room[one]:
            del room[one]

    def _give(self, task: TaskId, one: str) -> None:
        self.target[task] = one
        self._load[one] += 1
        self._kinds[one][task.sub_topology] += 1
