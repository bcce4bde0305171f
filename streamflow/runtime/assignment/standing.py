"""A cluster put in order: who may have a task, who owns it, and who has how much of its state."""

from __future__ import annotations

from collections.abc import Mapping

from streamflow.runtime.assignment.cluster import AssignedTask, Cluster, ClusterMember, TaskId


class Standing:
    """What placement looks up, by task and by member, in an order that does not depend on the cluster's.

    Args:
        cluster: What is known.

    Attributes:
        members: By id, in order.
        tasks: By id, in order.
        able: By task: the members that read all its topics and do not refuse it, in order. If all do, all of them.
        owner: By task that an able member owns: that member.
        lags: By task with state: how far behind the able members are that have some of it. An owner is not behind
            unless it says so.
        acceptable_lag: Records that a member may be behind to count as caught up.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.members: dict[str, ClusterMember] = {
            member.member_id: member for member in sorted(cluster.members, key=lambda member: member.member_id)
        }
        self.tasks: dict[TaskId, AssignedTask] = {
            task.id: task for task in sorted(cluster.tasks, key=lambda task: task.id)
        }
        self.able: dict[TaskId, tuple[str, ...]] = self._find_able()
        self.owner: dict[TaskId, str] = {}
        self.lags: dict[TaskId, dict[str, int]] = {task.id: {} for task in self.tasks.values() if task.stateful}
        self.acceptable_lag = cluster.acceptable_lag_records
        for member in self.members.values():
            self._read(member)

    def is_ready(self, task: TaskId, member_id: str) -> bool:
        """Whether a member can go on with a task at once: it has no state, or the member is caught up with it."""
        lags = self.lags.get(task)
        return lags is None or lags.get(member_id, self.acceptable_lag + 1) <= self.acceptable_lag

    def ready(self, task: TaskId) -> list[str]:
        """The members that are caught up with a task that has state, in order."""
        return [member_id for member_id, lag in self.lags[task].items() if lag <= self.acceptable_lag]

    def follows(self, member_id: str) -> bool:
        """Whether a member takes standbys and warm-ups."""
        return self.members[member_id].follows

    def _find_able(self) -> dict[TaskId, tuple[str, ...]]:
        by_topics: dict[frozenset[str], tuple[str, ...]] = {}
        able: dict[TaskId, tuple[str, ...]] = {}
        for task in self.tasks.values():
            topics = frozenset(tp.topic for tp in task.partitions)
            if topics not in by_topics:
                by_topics[topics] = tuple(name for name, member in self.members.items() if topics <= member.topics)
            able[task.id] = by_topics[topics]
        for task_id, refusing in self._refusing().items():
            able[task_id] = tuple(one for one in able[task_id] if one not in refusing) or able[task_id]
        return able

    def _refusing(self) -> dict[TaskId, set[str]]:
        refusing: dict[TaskId, set[str]] = {}
        for name, member in self.members.items():
            for task_id in member.refused - member.active:
                if task_id in self.tasks:
                    refusing.setdefault(task_id, set()).add(name)
        return refusing

    def _read(self, member: ClusterMember) -> None:
        for task, lag in self._lags_of(member).items():
            if task in self.lags and member.member_id in self.able[task]:
                self.lags[task][member.member_id] = lag
        for task in member.active:
            if task in self.tasks and member.member_id in self.able[task]:
                self.owner.setdefault(task, member.member_id)

    @staticmethod
    def _lags_of(member: ClusterMember) -> Mapping[TaskId, int]:
        return {**dict.fromkeys(member.active, 0), **member.lags}
