"""The words of assignment: what is known of a cluster of workers, and what a plan for it says. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamflow.model.record import TopicPartition

UNKNOWN_LAG = 1 << 53
"""Of a state that is here, but nobody knows how far behind: better than none, and never caught up."""


class TaskId(NamedTuple):
    """A task's name among the workers of one app.

    Attributes:
        sub_topology: Name of its sub-topology.
        partition: Its partition.
    """

    sub_topology: str
    partition: int

    def __str__(self) -> str:
        return f"{self.sub_topology}-{self.partition}"


@dataclass(frozen=True, slots=True)
class AssignedTask:
    """A task as it is assigned: it is never split.

    Attributes:
        id: Its name.
        partitions: Its source partitions.
        stateful: Whether it has tables, which a worker has to have before it can go on with them.
    """

    id: TaskId
    partitions: frozenset[TopicPartition]
    stateful: bool = False


@dataclass(frozen=True, slots=True)
class ClusterMember:
    """One worker as the assignor sees it.

    Attributes:
        member_id: Its id in the group.
        topics: What it subscribes to: it is given only tasks that read nothing else.
        active: Tasks that it owns now.
        standby: Tasks whose changelogs it follows as a standby, as it was told last.
        lags: By task whose state it has: how many records its state is behind, >= 0. A task that it owns is taken for
            caught up unless it stands here.
        follows: Whether it follows changelogs, as standby or warm-up, where it is told to. An older version does not.
        rack: Where it runs; empty where that is not said.
        capacity: Its share of the work beside the others', >= 1.
        refused: Tasks whose state it cannot follow: it gets them only if it owns them, or if all others refuse, too.
    """

    member_id: str
    topics: frozenset[str]
    active: frozenset[TaskId] = frozenset()
    standby: frozenset[TaskId] = frozenset()
    lags: Mapping[TaskId, int] = field(default_factory=dict[TaskId, int])
    follows: bool = False
    rack: str = ""
    capacity: int = 1
    refused: frozenset[TaskId] = frozenset()


@dataclass(frozen=True, slots=True)
class Cluster:
    """All that a plan depends on.

    Attributes:
        members: The workers, with different ids, in any order.
        tasks: All tasks, with different ids, in any order.
        standby_replicas: Copies of each task's state that are wanted beside the active one, >= 0.
        acceptable_lag_records: Records that a state may be behind and still count as caught up, >= 0.
        max_warmup_replicas: Warm-ups at a time in the whole cluster, >= 1.
    """

    members: Sequence[ClusterMember]
    tasks: Sequence[AssignedTask]
    standby_replicas: int = 0
    acceptable_lag_records: int = 10_000
    max_warmup_replicas: int = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """Who shall have what; every member has its entry in each of the three, be it empty.

    Attributes:
        active: Tasks that each member shall process. What another member has owned until now goes there once that
            member has given it up.
        standby: Tasks whose state each member shall keep a copy of. Never beside the active one.
        warm_up: Tasks whose state each member shall catch up with, because it is to have them (as active or standby) as
            soon as it has done so. Also those among its active ones that it follows, until their owner has given
            them up.
    """

    active: Mapping[str, frozenset[TaskId]]
    standby: Mapping[str, frozenset[TaskId]]
    warm_up: Mapping[str, frozenset[TaskId]]
