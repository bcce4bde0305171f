"""Who gets which task: sticky, balanced to within one task, whole tasks only.

A pure function of the members and the partition counts. A member keeps what it owns as long as the balance allows;
what is left goes to whoever has least, spread over the sub-topologies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from streamflow.log.api import Given, Member
from streamflow.model.record import TopicPartition


class AssignedTask(NamedTuple):
    """A task as the assignor moves it: it is never split.

    Attributes:
        sub_topology: Name of its sub-topology.
        partition: Its partition.
        partitions: Its source partitions.
    """

    sub_topology: str
    partition: int
    partitions: frozenset[TopicPartition]


def tasks_of(sub_topologies: Mapping[str, Sequence[str]], counts: Mapping[str, int]) -> list[AssignedTask]:
    """All tasks: partition p of a sub-topology owns partition p of each of its topics that has one.

    Args:
        sub_topologies: Source topics per sub-topology.
        counts: Partition count per topic; a topic that is missing has none.
    """
    tasks: list[AssignedTask] = []
    for name in sorted(sub_topologies):
        topics = sub_topologies[name]
        for partition in range(max((counts.get(topic, 0) for topic in topics), default=0)):
            owned = frozenset(TopicPartition(topic, partition) for topic in topics if partition < counts.get(topic, 0))
            tasks.append(AssignedTask(name, partition, owned))
    return tasks


class TaskAssignor:
    """The assignor of one app.

    Args:
        sub_topologies: Source topics per sub-topology.
    """

    def __init__(self, sub_topologies: Mapping[str, Sequence[str]]) -> None:
        self._sub_topologies = sub_topologies

    def __call__(self, members: Sequence[Member], counts: Mapping[str, int]) -> Mapping[str, Given]:
        """See `log.api.Assignor`."""
        tasks = tasks_of(self._sub_topologies, counts)
        chosen = assign(members, tasks)
        return {
            member_id: Given(frozenset(tp for task in owned for tp in task.partitions))
            for member_id, owned in chosen.items()
        }


def assign(members: Sequence[Member], tasks: Sequence[AssignedTask]) -> dict[str, list[AssignedTask]]:
    """Give every task to one member that subscribes to its topics.

    Args:
        members: Sorted by id.
        tasks: All tasks.

    Returns:
        Tasks per member id, members without tasks included.
    """
    assignment: dict[str, list[AssignedTask]] = {member.member_id: [] for member in members}
    if not members:
        return assignment
    left = _keep_owned(members, tasks, assignment)
    by_id = {member.member_id: member for member in members}
    for task in left:
        topics = {tp.topic for tp in task.partitions}
        able = [member_id for member_id, member in by_id.items() if topics <= member.topics]
        if able:
            least = min(able, key=lambda member_id: (_load(assignment[member_id], task), member_id))
            assignment[least].append(task)
    return assignment


def _keep_owned(
    members: Sequence[Member], tasks: Sequence[AssignedTask], assignment: dict[str, list[AssignedTask]]
) -> list[AssignedTask]:
    """Leave with each member what it owns, up to its share; returns the rest."""
    owned = {member.member_id: [task for task in tasks if task.partitions <= member.owned] for member in members}
    low, extra = divmod(len(tasks), len(members))
    taken: set[AssignedTask] = set()
    for member in sorted(members, key=lambda each: (-len(owned[each.member_id]), each.member_id)):
        mine = _in_turn(task for task in owned[member.member_id] if task not in taken)
        share = low
        if len(mine) > low and extra > 0:
            share, extra = low + 1, extra - 1
        kept = mine[:share]
        assignment[member.member_id].extend(kept)
        taken.update(kept)
    return [task for task in tasks if task not in taken]


def _in_turn(tasks: Iterable[AssignedTask]) -> list[AssignedTask]:
    """One of each sub-topology, then the next of each: whose first ones are kept is left with some of all kinds.

    They differ in the work they are; a member that kept those of one kind would have the light ones for ever.
    """
    seen: Counter[str] = Counter()
    ranked = []
    for task in tasks:
        ranked.append((seen[task.sub_topology], task))
        seen[task.sub_topology] += 1
    return [task for _, task in sorted(ranked, key=lambda each: each[0])]


def _load(owned: Sequence[AssignedTask], task: AssignedTask) -> tuple[int, int]:
    return len(owned), sum(1 for each in owned if each.sub_topology == task.sub_topology)
