"""Which partition a table's key belongs to, and what becomes of a write in another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from streamflow.errors import ProductionError
from streamflow.model.partitioner import partition_for
from streamflow.processing.topic import Partitioner, Topic
from streamflow.processing.topology import SubTopology
from streamflow.sensors import Sensors

logger = logging.getLogger("streamflow.tables")

_SAMPLED = 64


class Homes:
    """The partitions of table keys: those that the sources' partitioner gives them.

    Args:
        topics: All topics of the app.
        counts: Partition count per source topic.
        sensors: Told of keys that were written elsewhere.
        is_strict: Whether such a write raises; else one in 64 new keys is looked at, counted and warned of once.
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
        self._seen = 0
        self._told: set[str] = set()

    def of(self, sub: SubTopology, key: bytes) -> int:
        """The partition of a key, given as the changelog has it."""
        source = sub.topics[0]
        partitioner: Partitioner = self._topics[source].partitioner or partition_for
        return partitioner(key, self._counts[source])

    def check(self, sub: SubTopology, partition: int, table: str, key: bytes, shown: object) -> None:
        """Look at a key that is new in a partition.

        Raises:
            ProductionError: It belongs to another one, and that is not only counted.
        """
        if not self._is_strict:
            self._seen += 1
            if self._seen % _SAMPLED:
                return
        home = self.of(sub, key)
        if home == partition:
            return
        text = (
            f"table {table!r}: the key {shown!r} belongs to partition {home}, and this record came from partition "
            f"{partition}, so another task would not find what is written here. Let the agent read records that are "
            "keyed like the table: `@app.agent(topic.group_by(...))`"
        )
        if self._is_strict:
            raise ProductionError(text)
        self._sensors.foreign_key(table)
        if table not in self._told:
            self._told.add(table)
            logger.warning("%s (counted from here on)", text)
