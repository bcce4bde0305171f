"""How far a bounded run is: where it began, where it ends and what is committed, all of it read from the log.

It is the group's account and no worker's, so whoever noted the beginning before the first record was processed can say
in the end what the run did: a worker on its own, or the supervisor of several.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamflow.config import Settings
from streamflow.log.api import Admin
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.processing.topology import Topology
from streamflow.runtime.beginnings import beginnings
from streamflow.runtime.layout import Layout
from streamflow.runtime.status import Outcome, Progress, TopicOutcome


class Extent:
    """The extent of one bounded run of a group.

    Args:
        layout: What reads and writes what, and the partitions of the source topics.
        group_id: The app's group.

    Attributes:
        upstream: Per source topic those from which its own records come; empty for an external one.
        partitions: The partitions of each source topic.
        written: The source topics that the app itself writes.
        limits: Where the external partitions ended at the start.
        committed: The group's offsets at the last look.
        written_ends: Where the written partitions ended at the last look.
    """

    def __init__(self, layout: Layout, group_id: str) -> None:
        self._group_id = group_id
        self.upstream = upstream_topics(layout.topology)
        self.partitions = {
            topic: [TopicPartition(topic, number) for number in range(count)] for topic, count in layout.counts.items()
        }
        self.written = [topic for topic in layout.counts if self.upstream[topic]]
        self.limits: dict[TopicPartition, int] = {}
        self.committed: dict[TopicPartition, int] = {}
        self.written_ends: Mapping[TopicPartition, int] = {}
        self._starts: dict[TopicPartition, int] = {}

    async def find(self, admin: Admin, app: Declarations, settings: Settings) -> None:
        """Note where the run begins and where the external topics end now; before anybody of it joins the group.

        Args:
            admin: For offsets.
            app: The app.
            settings: Its settings: they say where partitions begin that have no committed offset.

        Raises:
            RetriableError: The log does not answer.
        """
        every = [tp for tps in self.partitions.values() for tp in tps]
        external = [tp for tp in every if not self.upstream[tp.topic]]
        committed = await admin.group_offsets(self._group_id)
        starts, ends = await admin.start_offsets(every), await admin.end_offsets(every)
        self.limits = {tp: ends[tp] for tp in external}
        begins = await beginnings(admin, app, settings, [tp for tp in every if tp not in committed])
        for tp in every:
            self._starts[tp] = max(committed[tp].offset, starts[tp]) if tp in committed else min(begins[tp], ends[tp])

    async def look(self, admin: Admin) -> None:
        """See how far the group is: first what is committed, then where the written topics end.

        Args:
            admin: For offsets.

        Raises:
            RetriableError: The log does not answer.
        """
        written = [tp for topic in self.written for tp in self.partitions[topic]]
        committed = await admin.group_offsets(self._group_id)
        self.written_ends = await admin.end_offsets(written) if written else {}
        self.committed = {tp: mark.offset for tp, mark in committed.items()}

    def drained(self) -> set[TopicPartition]:
        """The partitions that were done at the last look."""
        ends = {**self.limits, **self.written_ends}
        return {tp for tp, end in ends.items() if self.committed.get(tp, -1) >= end}

    @property
    def is_done(self) -> bool:
        """Whether all of them were."""
        return len(self.drained()) == len(self.limits) + len(self.written_ends)

    def progress(self) -> Progress:
        """How many records of the external topics are done."""
        done = sum(
            min(max(self.committed.get(tp, 0), self._starts[tp]), limit) - self._starts[tp]
            for tp, limit in self.limits.items()
        )
        return Progress(done, sum(limit - self._starts[tp] for tp, limit in self.limits.items()))

    def outcome(self, *, finished: bool) -> Outcome:
        """How far the group was at the last look.

        Args:
            finished: Whether the run came to its end.
        """
        topics: list[TopicOutcome] = []
        for topic, partitions in self.partitions.items():
            processed = left = 0
            for tp in partitions:
                start = self._starts[tp]
                end = max(start, self.limits.get(tp, 0), self.written_ends.get(tp, 0))
                reached = min(max(start, self.committed.get(tp, 0)), end)
                processed += reached - start
                left += end - reached
            topics.append(TopicOutcome(topic, processed, left))
        return Outcome(finished, tuple(topics))


def upstream_topics(topology: Topology) -> dict[str, set[str]]:
    """Per source topic of the app: the source topics from which its own records come; empty for an external one."""
    reads: dict[str, set[str]] = {}
    writers: dict[str, set[str]] = {}
    for edge in topology.edges:
        if edge.kind == "reads":
            reads.setdefault(edge.target, set()).add(edge.source.removeprefix("topic:"))
        else:
            writers.setdefault(edge.target.removeprefix("topic:"), set()).add(edge.source)
    sources = {topic for sub in topology.sub_topologies for topic in sub.topics}
    return {
        topic: {source for writer in writers.get(topic, ()) for source in reads.get(writer, ())} for topic in sources
    }
