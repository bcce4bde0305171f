"""Which partition a table's key belongs to, and what becomes of a write in another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from streamflow.errors import ProductionError
from streamflow.model.partitioner import partition_for
from streamflow.model.schema import part_example
from streamflow.processing.table import Table
from streamflow.processing.topic import Partitioner, Topic
from streamflow.processing.topology import SubTopology
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.tables")

_SAMPLED = 64
"""So many new keys of a table are looked at first, and one in so many afterwards."""


class Homes:
    """The partitions of table keys: those that the sources' partitioner gives them.

    Args:
        topics: All topics of the app.
        counts: Partition count per source topic.
        sensors: Told of keys that were written elsewhere.
        is_strict: Whether such a write raises; else the first 64 new keys of each table and one in 64 after them are
            looked at, and those found are counted and warned of once.
    """

    def __init__(
        self,
        topics: Mapping[str, Topic[object, object]],
        counts: Mapping[str, int],
        sensors: Sensors,
        *,
        is_strict: bool,
    ) -> None:
        self._topics = topics
        self._counts = counts
        self._sensors = sensors
        self._is_strict = is_strict
        self._seen: dict[str, int] = {}
        self._told: set[str] = set()

    def of(self, sub: SubTopology, table: Table[Any, Any], key: Any) -> int:
        """The partition of a key.

        Args:
            sub: What the table is processed with.
            table: The table.
            key: Its key.

        Raises:
            ProductionError: It is not of the table's key type, or `partition_by=` gives no key of the source.
        """
        source = sub.topics[0]
        return self._of_record(source, table.home_bytes(key, self._topics[source].key_codec))

    def _of_record(self, source: str, data: bytes) -> int:
        partitioner: Partitioner = self._topics[source].partitioner or partition_for
        return partitioner(data, self._counts[source])

    def check(self, sub: SubTopology, partition: int, table: Table[Any, Any], key: Any, data: bytes) -> None:
        """Look at a key that is new in a partition.

        Args:
            sub: What the table is processed with.
            partition: The partition.
            table: The table.
            key: Its key.
            data: The same as the changelog has it.

        Raises:
            ProductionError: It belongs to another one, and that is not only counted; or `partition_by=` gives no key
                of the source.
        """
        is_looked_at = self._is_strict or self._is_sample(table.name)
        if table.partition_by is None and not is_looked_at:
            return
        source = sub.topics[0]
        is_plain = table.partition_by is None and table.home_codec is table.key_codec
        sent = data if is_plain else table.home_bytes(key, self._topics[source].key_codec)
        if not is_looked_at or (home := self._of_record(source, sent)) == partition:
            return
        text = _foreign(table, key, home, partition)
        if self._is_strict:
            raise ProductionError(text)
        self._sensors.foreign_key(table.name)
        if table.name not in self._told:
            self._told.add(table.name)
            logger.warning("%s (counted from here on)", text)

    def _is_sample(self, table: str) -> bool:
        seen = self._seen[table] = self._seen.get(table, 0) + 1
        return seen <= _SAMPLED or seen % _SAMPLED == 0


def _foreign(table: Table[Any, Any], key: Any, home: int, partition: int) -> str:
    text = (
        f"table {table.name!r}: the key {key!r} belongs to partition {home}, and this record came from partition "
        f"{partition}, so another task would not find what is written here. Let the agent read records that are "
        "keyed like the table: `@app.agent(topic.group_by(...))`"
    )
    if table.partition_by is not None:
        made = table.partition_by(table.home_part(key))
        return f"{text}; its partition_by= says that this key belongs to records with the key {made!r}"
    part = part_example(table.home_codec.type)
    if not part:
        return text
    return f"{text}; or, where the record's key is a part of this one, say which: `partition_by=lambda key: {part}`"
