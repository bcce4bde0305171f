"""How an app's work is cut into tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from streamflow.log.api import TopicDescription
from streamflow.model.record import TopicPartition
from streamflow.processing.topology import SubTopology, Topology


@dataclass(frozen=True, slots=True)
class Layout:
    """An app's topology over the partitions that its source topics have in the log.

    Attributes:
        topology: What is processed together.
        counts: Partition count per source topic; empty for an app without agents.
        ids: Topic id by topic, changelogs with them: two logs never have the same one.
    """

    topology: Topology
    counts: Mapping[str, int]
    ids: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, topology: Topology, descriptions: Mapping[str, TopicDescription]) -> Layout:
        """The layout of a topology in a log.

        Args:
            topology: The app's.
            descriptions: Its topics in the log, every source topic among them.
        """
        sources = [topic for sub in topology.sub_topologies for topic in sub.topics]
        ids = {name: description.topic_id for name, description in descriptions.items()}
        return cls(topology, {topic: descriptions[topic].partitions for topic in sources}, ids)

    @property
    def sub_topologies(self) -> tuple[SubTopology, ...]:
        """What is processed together, in order of name."""
        return self.topology.sub_topologies

    @property
    def leading(self) -> str:
        """Name of the sub-topology whose partition 0 is the leader task; empty without agents."""
        return self.sub_topologies[0].name if self.sub_topologies else ""

    def partitions(self) -> int:
        """How many source partitions there are."""
        return sum(self.counts.values())

    def of_task(self, sub: SubTopology, partition: int) -> list[TopicPartition]:
        """The source partitions of one task: a shorter topic has none for the last tasks."""
        return [TopicPartition(topic, partition) for topic in sub.topics if partition < self.counts[topic]]
