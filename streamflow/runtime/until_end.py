"""A bounded run: everything that is there at the start, and everything that follows from it.

External topics are processed up to the end they had at the start. Topics the app itself writes are processed until
they are drained: their sources are done, and what was committed is their end. Both are read from the log, so the
answer is the same whichever worker has a partition. A worker also waits for what only it knows: that its tasks are open
and restored, and that the visits it has begun are over.

Why the drain test holds: committed offsets are read before end offsets. When every offset committed then equals the end
found afterwards, everything had been processed, and its outputs written, before the ends were looked at.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from streamflow.clock import Clock
from streamflow.errors import RetriableError
from streamflow.log.api import Log
from streamflow.model.record import TopicPartition
from streamflow.processing.topology import Topology
from streamflow.runtime.layout import Layout
from streamflow.runtime.status import Outcome, Progress, TopicOutcome
from streamflow.runtime.task_manager import TaskManager

_POLL_S = 0.05
_STILL_POLLS = 20


class UntilEnd:
    """Watches a bounded run and says when it is over.

    Args:
        layout: What reads and writes what, and the partitions of the source topics.
        log: The log.
        group_id: The app's group.
        clock: For the polls.
        on_progress: Told how far the run is.
        begin: Where partitions begin that have no committed offset.
    """

    def __init__(
        self,
        layout: Layout,
        log: Log,
        group_id: str,
        clock: Clock,
        on_progress: Callable[[Progress], None],
        begin: Callable[[Sequence[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]],
    ) -> None:
        self._log = log
        self._group_id = group_id
        self._clock = clock
        self._on_progress = on_progress
        self._begin = begin
        self._upstream = upstream_topics(layout.topology)
        self._partitions = {
            topic: [TopicPartition(topic, number) for number in range(count)] for topic, count in layout.counts.items()
        }
        self._written = [topic for topic in layout.counts if self._upstream[topic]]
        self._state: object = None
        self._still_polls = 0
        self._starts: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._written_ends: Mapping[TopicPartition, int] = {}
        self._finished = False
        self.limits: dict[TopicPartition, int] = {}

    async def find_ends(self) -> None:
        """Note where the external topics end now; called before the group is joined."""
        every = [tp for tps in self._partitions.values() for tp in tps]
        external = [tp for tp in every if not self._upstream[tp.topic]]
        committed = await self._log.admin.group_offsets(self._group_id)
        starts, ends = await self._log.admin.start_offsets(every), await self._log.admin.end_offsets(every)
        self.limits = {tp: ends[tp] for tp in external}
        begin = await self._begin([tp for tp in every if tp not in committed])
        for tp in every:
            self._starts[tp] = max(committed[tp].offset, starts[tp]) if tp in committed else min(begin[tp], ends[tp])

    async def wait(self, manager: TaskManager, may_end: Callable[[], bool]) -> None:
        """Return when the run is over; tells tasks where written topics end as it learns it.

        Args:
            manager: The worker's tasks.
            may_end: Whether nothing else than records keeps the run.
        """
        external = list(self.limits)
        while True:
            try:
                if await self._step(manager, external) and may_end():
                    self._finished = True
                    return
            except RetriableError:
                pass  # the log is away: it is waited for
            await self._clock.sleep(_POLL_S)

    async def _step(self, manager: TaskManager, external: Sequence[TopicPartition]) -> bool:
        await self.look()
        committed, ends = self._committed, self._written_ends
        written = list(ends)
        self._tell(committed, external)
        drained = {tp for tp in external if committed.get(tp, -1) >= self.limits[tp]}
        drained |= {tp for tp in written if committed.get(tp, -1) >= ends[tp]}
        if len(drained) == len(external) + len(written):
            return True
        stood_still = self._stood_still((committed, ends))
        done_topics = {topic for topic, tps in self._partitions.items() if drained.issuperset(tps)}
        for topic in self._written if stood_still else self._ended(done_topics):
            for task in manager.running():
                task.flush_inputs_at({tp: ends[tp] for tp in self._partitions[topic]})
        return False

    async def look(self) -> None:
        """See how far the group is: first what is committed, then where the written topics end; not after the end."""
        if self._finished:
            return
        written = [tp for topic in self._written for tp in self._partitions[topic]]
        committed = await self._log.admin.group_offsets(self._group_id)
        self._written_ends = await self._log.admin.end_offsets(written) if written else {}
        self._committed = {tp: mark.offset for tp, mark in committed.items()}

    def outcome(self) -> Outcome:
        """How far the group was at the last look."""
        topics: list[TopicOutcome] = []
        for topic, partitions in self._partitions.items():
            processed = left = 0
            for tp in partitions:
                start = self._starts[tp]
                end = max(start, self.limits.get(tp, 0), self._written_ends.get(tp, 0))
                reached = min(max(start, self._committed.get(tp, 0)), end)
                processed += reached - start
                left += end - reached
            topics.append(TopicOutcome(topic, processed, left))
        return Outcome(self._finished, tuple(topics))

    def _stood_still(self, state: object) -> bool:
        """Whether nothing has been committed or written for a while, so that units wait for records of one another."""
        self._still_polls = self._still_polls + 1 if state == self._state else 0
        self._state = state
        return self._still_polls >= _STILL_POLLS

    def _ended(self, done: set[str]) -> Iterable[str]:
        """Written topics whose end is known: nothing upstream is still being processed (or they feed themselves)."""
        ready = [topic for topic, above in self._upstream.items() if above and above - {topic} <= done]
        if ready:
            return ready
        external_done = all(topic in done for topic, above in self._upstream.items() if not above)
        return [topic for topic, above in self._upstream.items() if above] if external_done else []

    def _tell(self, committed: Mapping[TopicPartition, int], external: Sequence[TopicPartition]) -> None:
        total = sum(self.limits[tp] - self._starts[tp] for tp in external)
        done = sum(
            min(max(committed.get(tp, 0), self._starts[tp]), self.limits[tp]) - self._starts[tp] for tp in external
        )
        self._on_progress(Progress(done, total))


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
