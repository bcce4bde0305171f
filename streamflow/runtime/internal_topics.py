"""Topics at start: what is missing is created, what does not fit is refused, before the group is joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

from streamflow.config import Settings
from streamflow.errors import TopologyError
from streamflow.log.api import Admin, NewTopic, TopicDescription
from streamflow.processing.declarations import Declarations, leader_topic_name
from streamflow.processing.topic import Topic
from streamflow.processing.topology import Topology
from streamflow.runtime.changelogs import is_made_as_changelog, new_changelogs
from streamflow.runtime.table_sources import check_table_sources

_BRIEF_CONFIG = {"retention.ms": "3600000", "cleanup.policy": "delete"}
_REPARTITION_CONFIG = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    # What the source took is passed on, whatever time it has.
    "message.timestamp.type": "CreateTime",
    "message.timestamp.after.max.ms": str(2**63 - 1),
}

_REPLIES = "-replies"

Kind: TypeAlias = Literal["changelog", "repartition", "replies", "leader"]
"""What an internal topic is for."""


def reply_topic_name(app_id: str) -> str:
    """Where answers to `ask` of an app arrive."""
    return f"{app_id}{_REPLIES}"


def repartition_topics(app: Declarations) -> list[str]:
    """Names of the topics that only the app's own `group_by` steps write and read."""
    return [derived.topic.name for derived in app.derived.values() if derived.topic.internal]


async def left_topics(app: Declarations, admin: Admin) -> dict[str, Kind]:
    """Internal topics that earlier versions of an app have left in the log, which it does not declare any more.

    They are told by name and configuration. An app whose name begins like this one's has topics that do so, too: it is
    known by its reply topic, which every app has that ever ran.

    Args:
        app: The app.
        admin: The log's administration.
    """
    names = await admin.topics()
    apps = {app.id, *(name.removesuffix(_REPLIES) for name in names if name.endswith(_REPLIES))}
    declared = app.every_topic().keys() | {table.changelog.name for table in app.tables.values()}
    kinds: dict[str, Kind] = {}
    for name in names:
        kind = name.rpartition("-")[2]
        if name in declared or kind not in ("changelog", "repartition", "leader"):
            continue
        if kind == "leader" and name != leader_topic_name(app.id):
            continue
        if max((each for each in apps if name.startswith(f"{each}-")), key=len, default="") == app.id:
            kinds[name] = cast("Kind", kind)
    described = await admin.describe(list(kinds)) if kinds else {}
    made_so = {"changelog": is_made_as_changelog, "repartition": _is_made_as_repartition, "leader": _is_made_as_leader}
    return {name: kinds[name] for name, found in described.items() if made_so[kinds[name]](found)}


def _is_made_as_repartition(found: TopicDescription) -> bool:
    return _is_kept_by(_REPARTITION_CONFIG, found)


def _is_made_as_leader(found: TopicDescription) -> bool:
    return found.partitions == 1 and _is_kept_by(_BRIEF_CONFIG, found)


def _is_kept_by(config: Mapping[str, str], found: TopicDescription) -> bool:
    return all(found.config.get(name) == config[name] for name in ("cleanup.policy", "retention.ms"))


async def prepare_topics(
    app: Declarations, topology: Topology, settings: Settings, admin: Admin
) -> Mapping[str, TopicDescription]:
    """Make sure that all declared topics exist with the right number of partitions.

    Args:
        app: The app.
        topology: Its topology.
        settings: Defaults for topics that are created.
        admin: The log's administration.

    Returns:
        Every topic's description by name, the reply topic included.

    Raises:
        TopologyError: One is missing with `create=False`, or has another partition count than `partitions=` says; the
            message has both numbers.
    """
    topics = app.every_topic()
    names = [*topics, reply_topic_name(app.id)]
    existing = dict(await admin.describe(names))
    for topic in topics.values():
        if not topic.internal:
            _check(topic, existing.get(topic.name))
    check_table_sources(app, existing)
    counts = {name: description.partitions for name, description in existing.items()}
    new = _new_external(topics, settings, counts)
    new += _new_internal(app, counts)
    new += new_changelogs(app, topology, counts, existing, settings.replication)
    brief = {reply_topic_name(app.id): settings.partitions}
    if app.leader_topic is not None:
        brief[app.leader_topic.name] = 1
    new += [
        NewTopic(name, partitions, settings.replication, _BRIEF_CONFIG)
        for name, partitions in brief.items()
        if name not in existing
    ]
    if new:
        await admin.create(new)
        existing.update(await admin.describe([topic.name for topic in new]))
    return existing


def _check(topic: Topic[Any, Any], description: TopicDescription | None) -> None:
    if description is None:
        if not topic.create:
            raise TopologyError(
                f"topic {topic.name!r} does not exist, and create=False forbids creating it ({topic.place})"
            )
    elif topic.partitions is not None and topic.partitions != description.partitions:
        raise TopologyError(
            f"topic {topic.name!r} has {description.partitions} partitions, but partitions={topic.partitions} was "
            f"declared ({topic.place}): leave partitions= out to take the topic as it is, or declare "
            f"{description.partitions}"
        )


def _new_external(topics: Mapping[str, Topic[Any, Any]], settings: Settings, counts: dict[str, int]) -> list[NewTopic]:
    new: list[NewTopic] = []
    for topic in topics.values():
        if topic.internal or topic.name in counts:
            continue
        partitions = settings.partitions if topic.partitions is None else topic.partitions
        replication = settings.replication if topic.replication is None else topic.replication
        counts[topic.name] = partitions
        new.append(NewTopic(topic.name, partitions, replication, topic.topic_config()))
    return new


def _new_internal(app: Declarations, counts: dict[str, int]) -> list[NewTopic]:
    """Repartition topics get their source's partition count, and keep it; a derivation may stand on another one."""
    new: list[NewTopic] = []
    left = [derived for derived in app.derived.values() if derived.topic.internal]
    while left:
        known = [derived for derived in left if derived.source_topic.name in counts]
        if not known:
            raise TopologyError(f"the sources of {', '.join(each.topic.name for each in left)} are unknown")
        for derived in known:
            left.remove(derived)
            name, partitions = derived.topic.name, counts[derived.source_topic.name]
            if name not in counts:
                counts[name] = partitions
                new.append(NewTopic(name, partitions, -1, _REPARTITION_CONFIG))
    return new
