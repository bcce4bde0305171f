"""A bounded run: everything that is there at the start, and everything that follows from it.

External topics are processed up to the end they had at the start. Topics the app itself writes are processed until
they are drained: their sources are done, and what was committed is their end. Both are read from the log, so the
answer is the same whichever worker has a partition. A worker also waits for what only it knows: that its tasks are open
and restored, and that the visits it has begun are over.

Why the drain test holds: committed offsets are read before end offsets. When every offset committed then equals the end
found afterwards, everything had been processed, and its outputs written, before the ends were looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from streamflow.clock import Clock
from streamflow.errors import RetriableError
from streamflow.log.api import Admin
from streamflow.runtime.extent import Extent
from streamflow.runtime.status import Outcome, Progress
from streamflow.runtime.task_manager import TaskManager

_POLL_S = 0.05
_STILL_POLLS = 20


class UntilEnd:
    """Watches a bounded run and says when it is over.

    Args:
        extent: Where the run begins and ends, found already.
        admin: For offsets.
        clock: For the polls.
        on_progress: Told how far the run is.
    """

    def __init__(self, extent: Extent, admin: Admin, clock: Clock, on_progress: Callable[[Progress], None]) -> None:
        self._extent = extent
        self._admin = admin
        self._clock = clock
        self._on_progress = on_progress
        self.limits = extent.limits
        self._state: object = None
        self._still_polls = 0
        self._finished = False

    async def wait(self, manager: TaskManager, may_end: Callable[[], bool]) -> None:
        """Return when the run is over; tells tasks where written topics end as it learns it.

        Args:
            manager: The worker's tasks.
            may_end: Whether nothing else than records keeps the run.
        """
        while True:
            try:
                if await self._step(manager) and may_end():
                    self._finished = True
                    return
            except RetriableError:
                pass  # the log is away: it is waited for
            await self._clock.sleep(_POLL_S)

    async def _step(self, manager: TaskManager) -> bool:
        extent = self._extent
        await extent.look(self._admin)
        self._on_progress(extent.progress())
        if extent.is_done:
            return True
        stood_still = self._stood_still((extent.committed, extent.written_ends))
        drained = extent.drained()
        done_topics = {topic for topic, tps in extent.partitions.items() if drained.issuperset(tps)}
        for topic in extent.written if stood_still else self._ended(done_topics):
            for task in manager.running():
                task.flush_inputs_at({tp: extent.written_ends[tp] for tp in extent.partitions[topic]})
        return False

    async def look(self) -> None:
        """See how far the group is; not after the end."""
        if not self._finished:
            await self._extent.look(self._admin)

    def outcome(self) -> Outcome:
        """How far the group was at the last look."""
        return self._extent.outcome(finished=self._finished)

    def _stood_still(self, state: object) -> bool:
        """Whether nothing has been committed or written for a while, so that units wait for records of one another."""
        self._still_polls = self._still_polls + 1 if state == self._state else 0
        self._state = state
        return self._still_polls >= _STILL_POLLS

    def _ended(self, done: set[str]) -> Iterable[str]:
        """Written topics whose end is known: nothing upstream is still being processed (or they feed themselves)."""
        upstream = self._extent.upstream
        ready = [topic for topic, above in upstream.items() if above and above - {topic} <= done]
        if ready:
            return ready
        external_done = all(topic in done for topic, above in upstream.items() if not above)
        return [topic for topic, above in upstream.items() if above] if external_done else []
