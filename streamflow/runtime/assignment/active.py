"""Who processes what: balanced, even, sticky, and no task with state goes where its state is not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.spread import Counts, Spread
from streamflow.runtime.assignment.standing import Standing


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
        # What counts is how they compare: all of 4 are as all of 1.
        unit = math.gcd(*(member.capacity for member in standing.members.values()))
        self._capacity = {name: member.capacity // unit for name, member in standing.members.items()}
        # What is placed already, by sub-topology and member.
        self._placed: Counts = {}
        self._holder = self._find_holders()
        self.target: dict[TaskId, str] = {}
        groups: dict[tuple[str, ...], list[TaskId]] = {}
        following = {able: tuple(filter(standing.follows, able)) for able in set(standing.able.values())}
        for task, able in standing.able.items():
            groups.setdefault(following[able] if self._only_by_warm_up(task) else able, []).append(task)
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
        loose: list[tuple[int, int, TaskId, list[str]]] = []
        for task, lags in standing.lags.items():
            owner = standing.owner.get(task)
            if owner is not None and standing.is_ready(task, owner):
                continue
            ready = standing.ready(task)
            if ready:
                loose.append((min(map(lags.__getitem__, ready)), len(ready), task, ready))
                if owner is not None:
                    loads[owner] -= 1
            elif owner is None and lags:
                holder = min(lags, key=lambda one: (lags[one], loads[one] / self._capacity[one], one))
                holders[task] = holder
                loads[holder] += 1
        holders.update(self._hand_out(loose, loads))
        return holders

    def _hand_out(self, loose: list[tuple[int, int, TaskId, list[str]]], loads: Counter[str]) -> dict[TaskId, str]:
        """Tasks to members that are caught up: to the nearest until it has its share, then to who has least.

        All of them can go on at once; the nearest has least to read before, and a standby nothing.
        """
        holders: dict[TaskId, str] = {}
        share = len(self._standing.tasks) / max(1, sum(self._capacity.values()))
        later: list[tuple[int, TaskId, list[str]]] = []
        for least, choice, task, ready in sorted(loose):
            lags = self._standing.lags[task]
            near = [one for one in ready if lags[one] == least and loads[one] < share * self._capacity[one]]
            if near:
                holders[task] = min(near, key=lambda one: (loads[one] / self._capacity[one], one))
                loads[holders[task]] += 1
            else:
                later.append((choice, task, ready))
        for _, task, ready in sorted(later):
            lags = self._standing.lags[task]
            holders[task] = min(ready, key=lambda one: (loads[one] / self._capacity[one], lags[one], one))
            loads[holders[task]] += 1
        return holders

    def _only_by_warm_up(self, task: TaskId) -> bool:
        """Whether a task goes only to who follows changelogs: one that does, too, has its state."""
        holder = self._holder.get(task)
        return holder is not None and task in self._standing.lags and self._standing.follows(holder)

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
        """Give tasks to the members that may have them: how many of each sub-topology comes first, then which."""
        kinds: dict[str, list[TaskId]] = {}
        for task in tasks:
            kinds.setdefault(task.sub_topology, []).append(task)
        held: Counts = {kind: dict.fromkeys(able, 0) for kind in kinds}
        owned: Counts = {kind: dict.fromkeys(able, 0) for kind in kinds}
        for task in tasks:
            holder = self._holder.get(task)
            if holder is not None:
                held[task.sub_topology][holder] += 1
                owned[task.sub_topology][holder] += self._standing.owner.get(task) == holder
        spread = Spread(
            {kind: len(of_kind) for kind, of_kind in kinds.items()},
            {one: self._capacity[one] for one in able},
            self._placed,
        )
        for kind, share in spread.counts(held, owned).items():
            self._place_kind(kinds[kind], share)

    def _place_kind(self, tasks: Sequence[TaskId], share: Mapping[str, int]) -> None:
        """Give the tasks of one sub-topology: each member keeps its share, the rest goes to who lacks some."""
        held: dict[str, list[TaskId]] = {one: [] for one in share}
        for task in tasks:
            if task in self._holder:
                held[self._holder[task]].append(task)
        room = {one: share[one] - len(mine) for one, mine in held.items() if len(mine) < share[one]}
        left = [task for task in tasks if task not in self._holder]
        for one, mine in held.items():
            if len(mine) > share[one]:
                mine = sorted(mine, key=lambda task: self._keep_first(task, room))
                left += mine[share[one] :]
            for task in mine[: share[one]]:
                self._give(task, one)
        rest = self._place_near(left, room)
        seats = sorted((number, one) for one, free in room.items() for number in range(free))
        for task, (_, one) in zip(rest, seats, strict=True):
            self._give(task, one)

    def _keep_first(self, task: TaskId, room: Mapping[str, int]) -> tuple[float, bool, TaskId]:
        """The order of keeping: last what could go on at once where there is room, before that what it does not own."""
        nearest = self._nearest(task, room)
        is_ready = nearest <= self._standing.acceptable_lag
        return 1 if is_ready else -nearest, self._standing.owner.get(task) != self._holder[task], task

    def _nearest(self, task: TaskId, room: Mapping[str, int]) -> float:
        """How far behind the best of the members with room is."""
        lags = self._standing.lags.get(task)
        return min((lag for one, lag in lags.items() if one in room), default=math.inf) if lags else math.inf

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
                one = min(near, key=lambda one: (standing.lags[task][one], -room[one], one))
                self._give(task, one)
                room[one] -= 1
                if not room[one]:
                    del room[one]
            else:
                rest.append(task)
        return sorted(rest)

    def _give(self, task: TaskId, one: str) -> None:
        self.target[task] = one
        row = self._placed.setdefault(task.sub_topology, {})
        row[one] = row.get(one, 0) + 1
