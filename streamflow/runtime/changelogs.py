"""Changelogs at start: made with the partition count of their task's sources, and held against it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from streamflow.errors import TopologyError
from streamflow.log.api import NewTopic, TopicDescription
from streamflow.processing.declarations import Declarations
from streamflow.processing.topic import Topic
from streamflow.processing.topology import SubTopology, Topology

_DAY_MS = 24 * 3_600_000
_DELETE_RETENTION_MS = 7 * _DAY_MS
_DEFAULT_DELETE_RETENTION_MS = _DAY_MS  # of Kafka, where a topic says nothing else
MIN_COMPACTION_LAG_MS = _DAY_MS
"""How long a changelog keeps the older values of a key at least.

At least once, the committed value of a key is looked up behind newer ones that are not committed."""
_CONFIG = {
    "cleanup.policy": "compact",
    "delete.retention.ms": str(_DELETE_RETENTION_MS),
    "min.compaction.lag.ms": str(MIN_COMPACTION_LAG_MS),
    # A value that expires is written with its event time, which a restore counts from; it may lie in the future.
    "message.timestamp.type": "CreateTime",
    "message.timestamp.after.max.ms": str(2**63 - 1),
}


def is_made_as_changelog(found: TopicDescription) -> bool:
    """Whether a topic has what only changelogs are made with."""
    return all(found.config.get(name) == _CONFIG[name] for name in ("cleanup.policy", "min.compaction.lag.ms"))


def new_changelogs(
    app: Declarations,
    topology: Topology,
    counts: dict[str, int],
    existing: Mapping[str, TopicDescription],
    replication: int,
) -> list[NewTopic]:
    """The changelogs that are missing; those that exist are checked.

    Args:
        app: The app.
        topology: Its topology.
        counts: Partition count of every topic known so far; the new ones are added.
        existing: What the log has.
        replication: Copies of each partition.

    Raises:
        TopologyError: Sources that share tables are not partitioned alike, or a changelog is not as it has to be.
    """
    new: list[NewTopic] = []
    for sub in topology.sub_topologies:
        if not sub.tables:
            continue
        _check_sources(app, sub, counts)
        partitions = counts[sub.topics[0]]
        for name in sub.tables:
            table = app.tables[name]
            if table.source is not None:
                continue  # it is restored from its source, which is among those checked
            changelog = table.changelog.name
            if changelog in existing:
                _check_changelog(existing[changelog], name, sub, partitions)
            else:
                new.append(NewTopic(changelog, partitions, replication, _CONFIG))
            counts[changelog] = partitions
    return new


def _check_sources(app: Declarations, sub: SubTopology, counts: Mapping[str, int]) -> None:
    topics = app.every_topic()
    first, *others = (topics[name] for name in sub.topics)
    for other in others:
        for what, mine, theirs in _partitioning(first, other, counts):
            if mine != theirs:
                raise TopologyError(
                    f"topics {first.name!r} and {other.name!r} share the tables {', '.join(sub.tables)}, so a key must "
                    f"be in the same partition of both, but their {what} differ ({mine} and {theirs}): make them "
                    "alike, or let one be read by way of `group_by`"
                )


def _partitioning(
    one: Topic[object, object], other: Topic[object, object], counts: Mapping[str, int]
) -> list[tuple[str, object, object]]:
    return [
        ("partition counts", counts[one.name], counts[other.name]),
        ("key serializers", one.key_serializer, other.key_serializer),
        ("partitioners", one.partitioner or "murmur2", other.partitioner or "murmur2"),
    ]


def _check_changelog(found: TopicDescription, table: str, sub: SubTopology, partitions: int) -> None:
    if found.partitions != partitions:
        raise TopologyError(
            f"changelog {found.name!r} of table {table!r} has {found.partitions} partitions, and its source "
            f"{sub.topics[0]!r} has {partitions}: keys would no longer be found where they were kept. Give the source "
            "its old count back, or start the table over: stop all workers, `streamflow reset APP`, and process again"
        )
    policy = found.config.get("cleanup.policy", "delete")
    if policy != "compact":
        raise TopologyError(
            f"changelog {found.name!r} of table {table!r} has cleanup.policy={policy}: old values would be deleted "
            "with time. Set it to compact"
        )


def stale_after_ms(changelog: TopicDescription) -> int:
    """How long a store may be away from its changelog, milliseconds, before it may have missed a deletion.

    Half of how long the changelog keeps deletions; the other half is for clocks that differ and slow restores. A topic
    that is not compacted keeps them for ever.
    """
    if "compact" not in changelog.config.get("cleanup.policy", "delete"):
        return sys.maxsize
    return int(changelog.config.get("delete.retention.ms", _DEFAULT_DELETE_RETENTION_MS)) // 2
