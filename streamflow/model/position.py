"""Positions as text, for reads that must not be older than something: `topic:partition:offset`, with commas between.

Each says that everything of the partition below the offset is to be in what is read. A topic's name has no colon.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamflow.errors import ConfigurationError
from streamflow.model.record import TopicPartition

Positions = Mapping[TopicPartition, int]


def positions_of(text: str) -> dict[TopicPartition, int]:
    """Read positions; the further one where a partition stands there twice.

    Args:
        text: As `text_of` writes it.

    Raises:
        ConfigurationError: It is something else.
    """
    found: dict[TopicPartition, int] = {}
    for part in filter(None, text.split(",")):
        try:
            topic, partition, offset = part.strip().rsplit(":", 2)
            tp, at = TopicPartition(topic, int(partition)), int(offset)
            if not topic or tp.partition < 0 or at < 0:
                raise ValueError
        except ValueError:
            raise ConfigurationError(
                f"{part.strip()!r} is no position: give what `RecordMetadata.position`, `table.position(key)` or the "
                "header StreamFlow-Position says, such as orders:3:1042"
            ) from None
        found[tp] = max(at, found.get(tp, 0))
    return found


def text_of(positions: Positions) -> str:
    """Write positions as text."""
    return ",".join(f"{tp.topic}:{tp.partition}:{offset}" for tp, offset in sorted(positions.items()))
