"""How long the assignor takes: the leader of a group calls it once a rebalance, in its control thread.

    .venv/bin/python -m benchmarks.assignment             TASKS=1000 MEMBERS=50 ROUNDS=5, from the environment

A group of workers in three racks goes through what groups go through, with tables in every task and so many standbys.
Each row is the longest of the plans on the way to rest, and the best of its rounds, in processor time: a plan computes
and waits for nothing.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace

from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.cluster import AssignedTask, Cluster, ClusterMember, Plan, TaskId
from streamflow.runtime.assignment.plan import plan

SUB_TOPOLOGIES = 10
RACKS = 3


class Group:
    """Members that do at once what they are told."""

    def __init__(self, tasks: int, standbys: int) -> None:
        names = [f"topic-{number}" for number in range(SUB_TOPOLOGIES)]
        self.topics = frozenset(names)
        self.cluster = Cluster(
            [],
            [
                AssignedTask(TaskId(names[number % SUB_TOPOLOGIES], place), partitions, stateful=True)
                for number in range(tasks)
                for place in [number // SUB_TOPOLOGIES]
                for partitions in [frozenset({TopicPartition(names[number % SUB_TOPOLOGIES], place)})]
            ],
            standby_replicas=standbys,
            max_warmup_replicas=tasks,
        )

    def change(self, numbers: range) -> None:
        """Let exactly these members be there."""
        known = {member.member_id: member for member in self.cluster.members}
        names = [f"worker-{number:03}" for number in numbers]
        fresh = {
            name: ClusterMember(name, self.topics, follows=True, rack=f"rack-{number % RACKS}")
            for name, number in zip(names, numbers, strict=True)
        }
        self.cluster = replace(self.cluster, members=[known.get(name, fresh[name]) for name in names])

    def follow(self, planned: Plan) -> bool:
        """Carry a plan out; says whether it changed anything."""
        owner = {task: member.member_id for member in self.cluster.members for task in member.active}
        after = [
            replace(
                member,
                active=frozenset(
                    task for task in planned.active[name] if owner.get(task, name) == name
                ),  # what another one owns comes in the next round
                standby=planned.standby[name],
                lags=dict.fromkeys(planned.standby[name] | planned.warm_up[name] | member.active, 0),
            )
            for member in self.cluster.members
            for name in [member.member_id]
        ]
        changed = after != list(self.cluster.members)
        self.cluster = replace(self.cluster, members=after)
        return changed

    def settle(self, rounds: int) -> float:
        """Plan until nothing changes; the longest plan's seconds."""
        longest = 0.0
        while True:
            planned, seconds = measured(lambda: plan(self.cluster), rounds)
            longest = max(longest, seconds)
            if not self.follow(planned):
                return longest


def measured(work: Callable[[], Plan], rounds: int) -> tuple[Plan, float]:
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return result, best


def main() -> None:
    tasks, members, rounds = (
        int(os.environ.get(*each)) for each in (("TASKS", "1000"), ("MEMBERS", "50"), ("ROUNDS", "5"))
    )
    print(f"{tasks} tasks with tables, {members} members, load {os.getloadavg()[0]:.1f}\n")
    print("| longest plan, ms | no standbys | 1 standby | 2 standbys |\n|---|---:|---:|---:|")
    changes = {
        "all start": range(members),
        "one leaves": range(members - 1),
        "it comes back": range(members),
        "all but two leave": range(2),
        "they come back": range(members),
    }
    groups = [Group(tasks, standbys) for standbys in range(3)]
    for what, numbers in changes.items():
        row = []
        for group in groups:
            group.change(numbers)
            row.append(f"{group.settle(rounds) * 1000:.0f}")
        print(f"| {what} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
