"""How much at least once may repeat, and whether it was more.

A task sends its outputs as they are made. Every commit interval it seals (positions, and what has changed in its
tables), waits until all it has sent is acknowledged, and commits the offsets. The next seal comes one interval after
that commit was answered, and none before. Whoever has the task after a fault begins at the offsets of the last commit.

So what a fault repeats lies between what was committed and what was sent when it happened, once; and it was made since
the last commit's seal: in the one interval that no commit holds, and while one commit was under way. Seconds are no
measure of that on a machine that is busy elsewhere. Both ends are looked at in the log instead when the fault has
happened and nobody has taken over yet, and behind the end of a changelog that the last commit says there is at most
one seal: records of one timestamp.

A worker that was stopped and wakes up sends, once more, what it had handed over and not sent. Its successor may notice
that in a changelog when it commits the next time, and begins at its own last commit again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streamflow.log.api import Log
from streamflow.model.record import TopicPartition
from tests.oracle.reading import records


@dataclass
class Rewind:
    """A place where an output begins again.

    Attributes:
        topic: Which output.
        partition: Which partition.
        back_to: The input's record that it went back to.
        until: Where it has caught up with what was there, or went on there.
    """

    topic: str
    partition: int
    back_to: int
    until: int

    @property
    def records(self) -> int:
        """How many are there once more."""
        return self.until - self.back_to


@dataclass
class Window:
    """What a fault may repeat; of each partition, in records of the input.

    Attributes:
        why: What happened.
        committed: Where it begins: what was committed.
        made: Where it ends, by output and partition.
        times: How often each record may be there once more.
    """

    why: str
    committed: Mapping[int, int]
    made: Mapping[tuple[str, int], int]
    times: int = 1
    _used: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def repeated(self) -> int:
        """How many records it explains."""
        return sum(self._used.values())

    def takes(self, rewind: Rewind) -> bool:
        """Whether it explains a rewind; then there is that much less room for others."""
        place = rewind.topic, rewind.partition
        begin, end = self.committed.get(rewind.partition, 0), self.made[place]
        used = self._used.get(place, 0) + rewind.records
        if not begin <= rewind.back_to <= rewind.until <= end or used > self.times * (end - begin):
            return False
        self._used[place] = used
        return True


def check_repeats(rewinds: Sequence[Rewind], windows: Sequence[Window]) -> None:
    """Every rewind is some fault's; raises AssertionError with the first that is none's."""
    for rewind in rewinds:
        assert any(window.takes(rewind) for window in windows), f"{rewind}, and the windows are {windows}"


@dataclass(frozen=True)
class Tail:
    """A changelog behind what is committed of it, when a fault has happened.

    Attributes:
        tp: The changelog's partition.
        start: Where the last commit says that it is committed to.
        stop: Its end.
        seals: How many commits may have written there: the one that was under way, and one of a worker that woke up.
    """

    tp: TopicPartition
    start: int
    stop: int
    seals: int


async def check_tail(log: Log, tail: Tail) -> None:
    """The fault came in one interval: no second commit was begun before the offsets of the one before were there."""
    behind = records(log, tail.tp, stop=tail.stop)
    times_ms = {record.timestamp async for record in behind if record.offset >= tail.start}
    assert len(times_ms) <= tail.seals, f"{tail}: written by commits of {sorted(times_ms)}"
