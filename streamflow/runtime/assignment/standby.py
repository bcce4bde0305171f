"""Where copies of state lie: never beside their task, apart from one another, and where they are already."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.standing import Standing


class WarmUps:
    """The warm-ups of a plan: few at a time, since each reads a whole changelog beside the work of its worker.

    Args:
        standing: The cluster.
        limit: How many there may be.

    Attributes:
        by_task: Who warms a task up.
    """

    def __init__(self, standing: Standing, limit: int) -> None:
        self._lags = standing.lags
        self._left = limit
        self.by_task: dict[TaskId, list[str]] = {}

    def grant(self, wishes: Iterable[tuple[TaskId, str]]) -> None:
        """Start with those that are nearest to their end, which are mostly those that are under way.

        Args:
            wishes: Tasks, and who is to catch up with them.
        """
        nearest = sorted(wishes, key=lambda wish: (self._lags[wish[0]].get(wish[1], math.inf), wish))
        for task, one in nearest[: self._left]:
            self.by_task.setdefault(task, []).append(one)
            self._left -= 1


class StandbyPlacement:
    """Decides on the standbys of a cluster.

    Args:
        standing: The cluster.
        active: By task: who is to process it.
        replicas: Copies wanted of each task with state.
        warm_ups: The warm-ups of active tasks; standbys that are to move get what is left of them.

    Attributes:
        copies: By task with state: the members that are to be its standbys.
    """

    def __init__(self, standing: Standing, active: Mapping[TaskId, str], replicas: int, warm_ups: WarmUps) -> None:
        self._standing = standing
        self._active = active
        self._warming = {task: frozenset(members) for task, members in warm_ups.by_task.items()}
        self._replicas = replicas
        self._load: Counter[str] = Counter()
        # By who processes tasks: how many copies of those each member has.
        self._copied: dict[str, Counter[str]] = {one: Counter() for one in standing.members}
        self._racks = {name: member.rack for name, member in standing.members.items()}
        self._capacity = {name: member.capacity for name, member in standing.members.items()}
        self._able = {task: self._candidates(task) for task in active if replicas and task in standing.lags}
        self._most = self._fair_shares()
        self.copies: dict[TaskId, list[str]] = {task: [] for task in self._able}
        for task in self._in_turn():
            self._keep(task)
        for task in self._able:
            self._fill(task)
        self._level()
        warm_ups.grant(self._stay_until_caught_up())

    def _candidates(self, task: TaskId) -> dict[str, None]:
        """Who may have a copy, in order, and quickly looked up."""
        taken = self._warming.get(task, frozenset()) | {self._active[task]}
        able = self._standing.able[task]
        return dict.fromkeys(one for one in able if self._standing.follows(one) and one not in taken)

    def _fair_shares(self) -> dict[str, int]:
        """How many copies of all each member should have at most."""
        members = [one for one in self._standing.members if self._standing.follows(one)]
        wanted = sum(min(self._replicas, len(able)) for able in self._able.values())
        total = sum(self._capacity[one] for one in members)
        return {one: math.ceil(wanted * self._capacity[one] / total) for one in members}

    # --- where they are to be in the end -----------------------------------------------------------------------

    def _in_turn(self) -> list[TaskId]:
        """Tasks, those first that fewest members have something of: their copies had better stay where they are."""
        return sorted(self._able, key=lambda task: (len(self._standing.lags[task]), task))

    def _keep(self, task: TaskId) -> None:
        """Leave copies where they are, unless their member has too many or another one is in a better rack."""
        lags = self._standing.lags[task]
        present = [one for one in self._able[task] if task in self._standing.members[one].standby and one in lags]
        for one in sorted(present, key=lambda one: (not self._standing.is_ready(task, one), one)):
            if len(self.copies[task]) == self._replicas:
                return
            if self._load[one] < self._most[one] and not (self._is_close(task, one) and self._has_better(task)):
                self._give(task, one)

    def _has_better(self, task: TaskId) -> bool:
        copies = self.copies[task]
        return any(one not in copies and not self._is_close(task, one) for one in self._able[task])

    def _fill(self, task: TaskId) -> None:
        left = [one for one in self._able[task] if one not in self.copies[task]]
        while left and len(self.copies[task]) < self._replicas:
            one = min(left, key=lambda one: self._rank(task, one))
            left.remove(one)
            self._give(task, one)

    def _level(self) -> None:
        """Even out what the order of tasks has left: who has most gives to who has least, as long as that helps."""
        mine: dict[str, set[TaskId]] = {one: set() for one in self._most}
        for task, copies in self.copies.items():
            for one in copies:
                mine[one].add(task)
        while self._level_once(mine):
            pass

    def _level_once(self, mine: Mapping[str, set[TaskId]]) -> bool:
        """Look at each two members once; whether that changed anything."""
        changed = False
        order = sorted(mine, key=lambda one: (self._load[one] / self._capacity[one], one))
        for heavy in reversed(order):
            for light in order:
                while self._is_uneven(heavy, light):
                    movable = [task for task in mine[heavy] if self._may_move(task, heavy, light)]
                    if not movable:
                        break
                    task = min(
                        movable, key=lambda task: (self._distance(task, light), self._lump(task, heavy, light), task)
                    )
                    self._move(task, heavy, light)
                    mine[heavy].remove(task)
                    mine[light].add(task)
                    changed = True
        return changed

    def _is_uneven(self, heavy: str, light: str) -> bool:
        """Whether one has more per capacity than the other would have with one more."""
        return self._load[heavy] / self._capacity[heavy] > (self._load[light] + 1) / self._capacity[light]

    def _move(self, task: TaskId, heavy: str, light: str) -> None:
        self.copies[task][self.copies[task].index(heavy)] = light
        for counts in (self._load, self._copied[self._active[task]]):
            counts[heavy] -= 1
            counts[light] += 1

    def _may_move(self, task: TaskId, heavy: str, light: str) -> bool:
        copies = self.copies[task]
        if light in copies or light not in self._able[task]:
            return False
        if self._racks[light] == self._racks[heavy]:
            return True
        return not self._is_close(task, light, but=heavy) or self._is_close(task, heavy, but=heavy)

    def _distance(self, task: TaskId, one: str) -> float:
        """How far behind a member is; -1 where it is caught up."""
        return -1.0 if self._standing.is_ready(task, one) else self._standing.lags[task].get(one, math.inf)

    def _lump(self, task: TaskId, heavy: str, light: str) -> float:
        """How little it would spread out the copies of what its worker does, to move one."""
        copied = self._copied[self._active[task]]
        return copied[light] / self._capacity[light] - copied[heavy] / self._capacity[heavy]

    def _rank(self, task: TaskId, one: str) -> tuple[bool, bool, float, bool, float, float, str]:
        return (
            self._is_close(task, one),
            self._load[one] >= self._most[one],
            self._distance(task, one),
            task not in self._standing.members[one].standby,
            self._copied[self._active[task]][one] / self._capacity[one],
            self._load[one] / self._capacity[one],
            one,
        )

    def _is_close(self, task: TaskId, one: str, *, but: str = "") -> bool:
        """Whether a member is in the rack of the task or of one of its copies, except the one of `but`."""
        rack = self._racks[one]
        if not rack:
            return False
        if self._racks[self._active[task]] == rack:
            return True
        return any(self._racks[other] == rack and other != but for other in self.copies[task])

    def _give(self, task: TaskId, one: str) -> None:
        self.copies[task].append(one)
        self._load[one] += 1
        self._copied[self._active[task]][one] += 1

    # --- until then ----------------------------------------------------------------------------------------------

    def _stay_until_caught_up(self) -> list[tuple[TaskId, str]]:
        """Leave copies that are caught up where they are, as long as those that take their places are not.

        Returns:
            The places that have to catch up first.
        """
        waiting: list[tuple[TaskId, str]] = []
        for task, copies in self.copies.items():
            before = self._leaving(task, copies)
            for number, one in enumerate(copies):
                if before and not self._standing.is_ready(task, one):
                    copies[number] = before.pop()
                    waiting.append((task, one))
        return waiting

    def _leaving(self, task: TaskId, copies: Collection[str]) -> list[str]:
        standing = self._standing
        return [
            one
            for one in reversed(self._able[task])
            if task in standing.members[one].standby and one not in copies and standing.is_ready(task, one)
        ]
