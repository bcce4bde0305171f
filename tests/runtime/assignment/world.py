"""A group of workers without a log: plans are carried out as a log would, and states follow their changelogs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.cluster import AssignedTask, Cluster, ClusterMember, Plan, TaskId
from streamflow.runtime.assignment.plan import plan

ACCEPTABLE = 100
GROWTH = 60
"""Records a round that a state falls behind which nobody follows: stale after two."""


def tasks_of(kinds: dict[str, int], stateful: Iterable[str] = ()) -> list[AssignedTask]:
    """Tasks of sub-topologies with one topic each: name and number of partitions."""
    return [
        AssignedTask(TaskId(name, number), frozenset({TopicPartition(name, number)}), name in frozenset(stateful))
        for name, count in kinds.items()
        for number in range(count)
    ]


@dataclass
class Worker:
    """One worker: what it owns, what it follows, and how far behind each state is that lies in it."""

    topics: frozenset[str]
    rack: str = ""
    capacity: int = 1
    follows: bool = True
    active: set[TaskId] = field(default_factory=set)
    standby: frozenset[TaskId] = frozenset()
    warm_up: frozenset[TaskId] = frozenset()
    lags: dict[TaskId, int] = field(default_factory=dict)
    refused: set[TaskId] = field(default_factory=set)


@dataclass
class World:
    tasks: list[AssignedTask]
    replicas: int = 0
    warm_ups: int = 2
    workers: dict[str, Worker] = field(default_factory=dict)
    moves: int = 0
    """Tasks that have been assigned to a worker that did not own them."""

    @property
    def stateful(self) -> set[TaskId]:
        return {task.id for task in self.tasks if task.stateful}

    def join(self, name: str, *, rack: str = "", capacity: int = 1, follows: bool = True) -> Worker:
        topics = frozenset(tp.topic for task in self.tasks for tp in task.partitions)
        self.workers[name] = Worker(topics, rack, capacity, follows)
        return self.workers[name]

    def leave(self, name: str) -> Worker:
        return self.workers.pop(name)

    def cluster(self) -> Cluster:
        members = [
            ClusterMember(
                name,
                worker.topics,
                frozenset(worker.active),
                worker.standby if worker.follows else frozenset(),
                {task: lag for task, lag in worker.lags.items() if task not in worker.active} if worker.follows else {},
                worker.follows,
                worker.rack,
                worker.capacity,
                frozenset(worker.refused),
            )
            for name, worker in self.workers.items()
        ]
        return Cluster(members, self.tasks, self.replicas, ACCEPTABLE, self.warm_ups)

    def plan(self) -> Plan:
        return plan(self.cluster())

    def owners(self) -> dict[TaskId, str]:
        return {task: name for name, worker in self.workers.items() for task in worker.active}

    def apply(self, planned: Plan) -> bool:
        """Carry out a plan as the log does: what moves goes to nobody first. Returns whether anything moved."""
        owners = self.owners()
        moved = False
        for name, worker in self.workers.items():
            leaving = worker.active - planned.active[name]
            free = {task for task in planned.active[name] if task not in owners}
            told = planned.standby[name], planned.warm_up[name]
            moved = moved or bool(leaving or free) or told != (worker.standby, worker.warm_up)
            worker.active = (worker.active - leaving) | free
            self.moves += len(free)
            if worker.follows:
                worker.standby, worker.warm_up = told
            for task in leaving & self.stateful:
                worker.lags[task] = 0
        return moved

    def catch_up(self) -> None:
        """What is followed or processed comes to its end; what lies about falls behind."""
        for worker in self.workers.values():
            for task in worker.lags:
                worker.lags[task] += GROWTH
            for task in (worker.standby | worker.warm_up | worker.active) & self.stateful:
                worker.lags[task] = 0

    def round(self) -> bool:
        """One rebalance; returns whether anything moved."""
        moved = self.apply(self.plan())
        self.catch_up()
        return moved

    def settle(self, most: int) -> int:
        """Rebalance until nothing moves; returns after how many rounds.

        Raises:
            AssertionError: It did not come to rest within `most` rounds.
        """
        for number in range(most + 1):
            if not self.round():
                return number
        raise AssertionError(f"still moving after {most} rounds")
