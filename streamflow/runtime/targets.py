"""Topics that are written to: described once, at start or when a client first uses one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamflow.errors import UnknownTopicError
from streamflow.log.api import Admin, TopicDescription
from streamflow.log.batch import DEFAULT_MAX_BATCH_BYTES
from streamflow.processing.declarations import Declarations
from streamflow.processing.topic import Topic
from streamflow.runtime.internal_topics import reply_topic_name
from streamflow.runtime.outputs import Target, Targets

_NO_LIMIT_MS = 2**63 - 1


class KnownTargets:
    """The targets of one app in this process.

    Args:
        admin: For topics that are not known yet.
        compression: Codec number for what is written.
    """

    def __init__(self, admin: Admin, compression: int) -> None:
        self._admin = admin
        self._compression = compression
        self.targets = Targets()

    def add(self, topic: Topic[Any, Any], description: TopicDescription) -> Target:
        """Make a described topic known."""
        max_bytes = int(description.config.get("max.message.bytes", DEFAULT_MAX_BATCH_BYTES))
        target = Target(
            topic,
            description.partitions,
            max_bytes,
            self._compression,
            ahead_ms=_limit_ms(description, "message.timestamp.after.max.ms"),
            behind_ms=_limit_ms(description, "message.timestamp.before.max.ms"),
        )
        self.targets.add(target)
        return target

    def add_all(self, app: Declarations, descriptions: Mapping[str, TopicDescription]) -> None:
        """Make all topics of an app known that exist: those declared, those of its steps, its reply topic."""
        for topic in (*app.every_topic().values(), Topic[Any, Any](app, reply_topic_name(app.id), internal=True)):
            if topic.name in descriptions:
                self.add(topic, descriptions[topic.name])

    async def of(self, topic: Topic[Any, Any]) -> Target:
        """The target of a topic, described now if it is not known.

        Raises:
            UnknownTopicError: It does not exist.
        """
        if topic.name in self.targets:
            return self.targets[topic.name]
        described = await self._admin.describe([topic.name])
        if topic.name not in described:
            raise UnknownTopicError(
                f"topic {topic.name!r} does not exist: start a worker of the app once, which creates its topics, or "
                "create it"
            )
        return self.add(topic, described[topic.name])


def _limit_ms(description: TopicDescription, option: str) -> int | None:
    """How far from the clock a record's time may be; None where the log takes any, or sets it itself."""
    config = description.config
    limit_ms = int(config.get(option, _NO_LIMIT_MS))
    is_set_by_log = config.get("message.timestamp.type") == "LogAppendTime"
    return None if is_set_by_log or limit_ms == _NO_LIMIT_MS else limit_ms
