"""The ledger of a task with records in several hands: what keeps a commit from passing a record in flight.

Each record that is taken gets an entry. An entry is done when every agent is done with its record; entries leave the
ledger strictly from its head, and only then do their stages join the outputs and does the position move. So a commit
never passes a record in flight, whatever order the hands finish in.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition
from streamflow.runtime.outputs import Staged, write


class Entry:
    """One record in the ledger.

    Args:
        tp: Its partition.
        record: The record.
        agents: How many agents have to finish it.
    """

    __slots__ = ("number", "pending", "record", "stages", "tp", "until")

    def __init__(self, tp: TopicPartition, record: LogRecord, agents: int) -> None:
        self.tp = tp
        self.record = record
        self.pending = agents
        self.stages: list[list[Staged]] = []
        # Its place in the ledger, and inside a unit of take() that of the last one: they leave together.
        self.number = self.until = -1


class Ledger:
    """The records of one task that were taken and are not yet merged, in the order they were taken.

    Args:
        positions: Next offset per partition at the start.
        drained: Told when nothing is in flight.
    """

    def __init__(self, positions: dict[TopicPartition, int], drained: Callable[[], None]) -> None:
        self._positions = positions
        self._drained = drained
        self._entries: deque[Entry] = deque()
        # Done, but held by a unit whose last record is not.
        self._held: deque[Entry] = deque()
        self._until = -1
        self._opened = 0
        # Number of the latest entry that an agent has had in its hands.
        self.taken = -1
        self._moved = asyncio.Event()
        # Whether the dispatcher waits for input since a unit does, so that lanes which run dry have to say so.
        self.unit_waits = False

    def __len__(self) -> int:
        return len(self._held) + len(self._entries)

    def open(self, entry: Entry) -> None:
        """Add the record taken last."""
        entry.number = entry.until = self._opened
        self._opened += 1
        self._entries.append(entry)

    def finish(self, entries: Sequence[Entry], stage: list[Staged]) -> None:
        """One agent is done with a record, or with the records of a unit."""
        last = entries[-1]
        if stage:
            last.stages.append(stage)
        for entry in entries:
            entry.pending -= 1
            entry.until = max(entry.until, last.number)
        while self._entries and self._entries[0].pending == 0:
            entry = self._entries.popleft()
            self._held.append(entry)
            self._until = max(self._until, entry.until)
            if entry.number >= self._until:
                while self._held:
                    self._leave(self._held.popleft())
        if not self._entries:
            self._drained()
        self._moved.set()

    def _leave(self, entry: Entry) -> None:
        for stage in entry.stages:
            write(stage)
        self._positions[entry.tp] = entry.record.offset + 1

    def positions(self) -> Mapping[TopicPartition, int]:
        """Next offset per partition: the oldest unfinished record of it, or what comes after the last."""
        positions = dict(self._positions)
        for entry in chain(reversed(self._entries), reversed(self._held)):
            positions[entry.tp] = entry.record.offset
        return positions

    def jump(self, tp: TopicPartition, position: int) -> None:
        """Move over a hole in the offsets, or back where a topic was made anew; only while nothing is in flight."""
        if not len(self):
            self._positions[tp] = position

    def ran_dry(self, lacking: int) -> None:
        """A lane has nothing left; for a unit that waits, `lacking` is how many records it still wants."""
        if lacking:
            self._moved.set()
        if self.unit_waits:
            self._drained()

    async def wait_moved(self) -> None:
        """Wait until an agent is done with an entry, or a unit begins to wait."""
        self._moved.clear()
        await self._moved.wait()
