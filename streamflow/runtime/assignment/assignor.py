"""The assignor that a log's group calls: members and partitions as the log has them, in; partitions and words, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from streamflow.config import Settings
from streamflow.log.api import Given, Member
from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.cluster import UNKNOWN_LAG, AssignedTask, Cluster, ClusterMember, Plan, TaskId
from streamflow.runtime.assignment.plan import plan
from streamflow.runtime.assignment.words import Route, Says, Teller
from streamflow.runtime.layout import Layout


def tasks_of(
    sub_topologies: Mapping[str, Sequence[str]], counts: Mapping[str, int], stateful: Collection[str] = ()
) -> list[AssignedTask]:
    """All tasks: partition p of a sub-topology owns partition p of each of its topics that has one.

    Args:
        sub_topologies: Source topics per sub-topology.
        counts: Partition count per topic; a topic that is missing has none.
        stateful: Names of the sub-topologies that have tables.
    """
    tasks: list[AssignedTask] = []
    for name in sorted(sub_topologies):
        topics = sub_topologies[name]
        for partition in range(max((counts.get(topic, 0) for topic in topics), default=0)):
            owned = frozenset(TopicPartition(topic, partition) for topic in topics if partition < counts.get(topic, 0))
            tasks.append(AssignedTask(TaskId(name, partition), owned, name in stateful))
    return tasks


class TaskAssignor:
    """The assignor of one app.

    Args:
        sub_topologies: Source topics per sub-topology.
        stateful: Names of the sub-topologies that have tables.
        standby_replicas: See `cluster.Cluster`.
        acceptable_lag_records: See `cluster.Cluster`.
        max_warmup_replicas: See `cluster.Cluster`.
    """

    def __init__(
        self,
        sub_topologies: Mapping[str, Sequence[str]],
        stateful: Collection[str] = (),
        *,
        standby_replicas: int = 0,
        acceptable_lag_records: int = 10_000,
        max_warmup_replicas: int = 2,
    ) -> None:
        self._sub_topologies = sub_topologies
        self._stateful = frozenset(stateful)
        self._standby_replicas = standby_replicas
        self._acceptable_lag_records = acceptable_lag_records
        self._max_warmup_replicas = max_warmup_replicas

    @classmethod
    def of(cls, layout: Layout, settings: Settings) -> TaskAssignor:
        """The assignor of an app as it is laid out here.

        Args:
            layout: Its tasks.
            settings: Its settings.
        """
        return cls(
            {sub.name: sub.topics for sub in layout.sub_topologies},
            [sub.name for sub in layout.sub_topologies if sub.tables],
            standby_replicas=settings.standby_replicas,
            acceptable_lag_records=settings.acceptable_lag_records,
            max_warmup_replicas=settings.max_warmup_replicas,
        )

    def __call__(self, members: Sequence[Member], counts: Mapping[str, int]) -> Mapping[str, Given]:
        """See `log.api.Assignor`."""
        tasks = {task.id: task for task in tasks_of(self._sub_topologies, counts, self._stateful)}
        said = {member.member_id: Says.decode(member.says, member.member_id) for member in members}
        cluster = Cluster(
            _cluster_members(members, said, tasks, self._acceptable_lag_records),
            list(tasks.values()),
            self._standby_replicas,
            self._acceptable_lag_records,
            self._max_warmup_replicas,
        )
        planned = plan(cluster)
        teller = Teller(
            {
                name: Route(says.url, planned.active[name], planned.standby[name], says.transactional_id)
                for name, says in said.items()
            },
            self._acceptable_lag_records,
            _behind(cluster, planned),
        )
        given: dict[str, Given] = {}
        for member in members:
            name = member.member_id
            partitions = frozenset(tp for task in planned.active[name] for tp in tasks[task].partitions)
            if member.says:  # who says nothing would not understand what it is told
                told = teller.tell(name, said[name], planned.standby[name], planned.warm_up[name])
                given[name] = Given(partitions, *told)
            else:
                given[name] = Given(partitions)
        return given


def _behind(cluster: Cluster, planned: Plan) -> list[TaskId]:
    """Tasks with state that go to who is not caught up with it."""
    stateful = {task.id for task in cluster.tasks if task.stateful}
    return [
        task
        for member in cluster.members
        for task in planned.active[member.member_id] & stateful
        if member.lags.get(task, 0 if task in member.active else UNKNOWN_LAG) > cluster.acceptable_lag_records
    ]


def _cluster_members(
    members: Sequence[Member], said: Mapping[str, Says], tasks: Mapping[TaskId, AssignedTask], acceptable: int
) -> list[ClusterMember]:
    active = _active(members, tasks, said)
    owners = {task: name for name, mine in active.items() for task in mine}
    return [
        ClusterMember(
            member.member_id,
            member.topics,
            active[member.member_id],
            says.standby,
            _lags(member.member_id, said, owners, active[member.member_id], acceptable),
            says.follows,
            says.rack,
            says.capacity,
            says.refused,
        )
        for member in members
        for says in [said[member.member_id]]
    ]


def _lags(
    name: str, said: Mapping[str, Says], owners: Mapping[TaskId, str], active: Iterable[TaskId], acceptable: int
) -> dict[TaskId, int]:
    """How far behind the states are that a member has.

    What it ran, it has, unless the task goes on elsewhere: then it is not known how far. What it owns and says nothing
    of, it has not opened yet.
    """
    says = said[name]
    lags = dict(says.lags)
    if says.ran is None:
        return lags
    for task in says.ran:
        owner = owners.get(task, name)
        is_ahead = owner != name and _has(said[owner], task, acceptable)
        lags.setdefault(task, acceptable + 1 if is_ahead else 0)
    for task in active:
        lags.setdefault(task, UNKNOWN_LAG)
    return lags


def _has(says: Says, task: TaskId, acceptable: int) -> bool:
    """Whether the owner of a task is caught up with it."""
    if says.ran is None:
        return says.lags.get(task, 0) <= acceptable
    return task in says.ran or says.lags.get(task, UNKNOWN_LAG) <= acceptable


def _active(
    members: Sequence[Member], tasks: Mapping[TaskId, AssignedTask], said: Mapping[str, Says]
) -> dict[str, frozenset[TaskId]]:
    """Who owns which task: whoever has most of its partitions; of what is nobody's, who ran it when it was lost.

    A task has got one that is nobody's when a topic has grown; when agents have come to share a table, its partitions
    were those of two tasks, with two owners.
    """
    owners = {tp: member.member_id for member in members for tp in member.owned}
    active: dict[str, list[TaskId]] = {member.member_id: [] for member in members}
    for task in tasks.values():
        parts = Counter(owners[tp] for tp in task.partitions if tp in owners)
        if not parts:
            parts = Counter(name for name, says in said.items() if says.ran is not None and task.id in says.ran)
        if parts:
            active[min(parts, key=lambda name: (-parts[name], name))].append(task.id)
    return {name: frozenset(mine) for name, mine in active.items()}
