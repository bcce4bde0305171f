"""How many tasks of each sub-topology each member is to have. Which ones they are, placement decides."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeAlias

Counts: TypeAlias = dict[str, dict[str, int]]
"""Numbers of tasks, by sub-topology and by member."""


class Spread:
    """Shares tasks out among members each of which may have any: evenly in all, and evenly of each sub-topology.

    Each sub-topology by itself is dealt out evenly; where that leaves a choice, who has a task keeps it. Then who has
    most in all hands one task over to who has least, of the sub-topology of which it has most more, until they are even
    in all, too. With equal capacities no sub-topology becomes uneven by that: who has more in all has more of one.

    Args:
        totals: How many tasks there are, by sub-topology.
        capacity: By member, in the order in which they are served.
        placed: What each member has besides, which others may not have, of any sub-topology: it stays, and counts.
    """

    def __init__(self, totals: Mapping[str, int], capacity: Mapping[str, int], placed: Counts) -> None:
        self._totals = totals
        self._capacity = capacity
        self._load = {one: sum(row.get(one, 0) for row in placed.values()) for one in capacity}
        # Of the sub-topologies that are shared out.
        self._placed: Counts = {kind: {one: placed.get(kind, {}).get(one, 0) for one in capacity} for kind in totals}

    def counts(self, held: Counts, owned: Counts) -> Counts:
        """Decide how many each member is to have.

        What is even already stays as it is. Where capacities or what else they have stand in the way of that, it is
        dealt out again as long as that makes it more even: so what comes of a plan is the next plan, too.

        Args:
            held: How many each member could go on with; all members have their entries, none has more than there are.
            owned: Of those, how many each one owns.
        """
        best = held if self._is_settled(held) else self._deal(held, owned)
        while uneven := self._unevenness(best):
            again = self._deal(best, best)
            if self._unevenness(again) >= uneven:
                break
            best = again
        return best

    def _is_settled(self, counts: Counts) -> bool:
        """Whether all tasks are somewhere, in balance."""
        if any(sum(counts[kind].values()) < total for kind, total in self._totals.items()):
            return False
        load = {one: number + sum(row[one] for row in counts.values()) for one, number in self._load.items()}
        return self._out_of_balance(counts, load) is None

    def _unevenness(self, counts: Counts) -> Fraction:
        """By how much the sub-topologies exceed one task per capacity between who has most and who has least."""
        exceeding = Fraction(0)
        for kind, share in counts.items():
            row = {one: number + self._placed[kind][one] for one, number in share.items()}
            most = max(row, key=lambda one: row[one] / self._capacity[one])
            least = min(row, key=lambda one: row[one] / self._capacity[one])
            apart = Fraction(row[most], self._capacity[most]) - Fraction(row[least], self._capacity[least])
            exceeding += max(apart - 1, Fraction(0))
        return exceeding

    # --- dealing out ---------------------------------------------------------------------------------------------

    def _deal(self, held: Counts, owned: Counts) -> Counts:
        load = dict(self._load)
        counts: Counts = {}
        for kind, total in self._totals.items():
            counts[kind] = self._deal_one(total, load, held[kind], owned[kind], self._placed[kind])
            for one, share in counts[kind].items():
                load[one] += share
        while pair := self._out_of_balance(counts, load):
            heavy, light = pair
            row = counts[self._to_hand_over(heavy, light, counts, held)]
            for numbers in (row, load):
                numbers[heavy] -= 1
                numbers[light] += 1
        return counts

    def _deal_one(
        self,
        total: int,
        load: Mapping[str, int],
        held: Mapping[str, int],
        owned: Mapping[str, int],
        placed: Mapping[str, int],
    ) -> dict[str, int]:
        """Deal out the tasks of one sub-topology: in proportion to capacity, rounded to the nearest.

        One after the other goes to who has least per capacity with half of it (Webster's method). So no two differ by
        more than one task per unit of capacity, and where several are as good, who has one keeps it, else who has least
        in all gets it, else who is smallest.
        """
        share = dict.fromkeys(self._capacity, 0)

        def turn(one: str) -> tuple[float, bool, bool, float, int, str]:
            has, capacity = share[one], self._capacity[one]
            in_all = (load[one] + has) / capacity
            return (has + placed[one] + 0.5) / capacity, owned[one] <= has, held[one] <= has, in_all, capacity, one

        turns = [turn(one) for one in share]
        heapq.heapify(turns)
        for _ in range(total):
            one = turns[0][-1]
            share[one] += 1
            heapq.heapreplace(turns, turn(one))
        return share

    def _out_of_balance(self, counts: Counts, load: Mapping[str, int]) -> tuple[str, str] | None:
        """Who has most in all and could hand one over, and who has least, unless that would only turn them round."""
        capacity = self._capacity
        givers = [one for one in capacity if any(row[one] for row in counts.values())]
        without, heavy = max((((load[one] - 0.5) / capacity[one], one) for one in givers), default=(0.0, ""))
        with_it, light = min(((load[one] + 0.5) / capacity[one], one) for one in capacity)
        return (heavy, light) if without > with_it else None

    def _to_hand_over(self, heavy: str, light: str, counts: Counts, held: Counts) -> str:
        """The sub-topology of which one has most more than the other; where several are as good, what moves least."""

        def worth(kind: str) -> tuple[int, int, str]:
            row, before, placed = counts[kind], held[kind], self._placed[kind]
            heavys, lights = row[heavy] + placed[heavy], row[light] + placed[light]
            apart = heavys * self._capacity[light] - lights * self._capacity[heavy]
            return apart, (row[light] < before[light]) - (row[heavy] <= before[heavy]), kind

        return max((kind for kind, row in counts.items() if row[heavy]), key=worth)
