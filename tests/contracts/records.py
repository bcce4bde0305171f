"""Batches to write and answers to read: what every test of a log needs."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from streamflow.log.api import Assigned, Fetched, Given, Group, GroupEvent, Lost, Member, Reader, Revoked
from streamflow.log.batch import BatchBuilder, LogRecord, SealedBatch
from streamflow.log.codec import NONE
from streamflow.model.record import TopicPartition

DEADLINE_S = 20.0
"""No test waits longer for something that has to come."""


def batch(
    *values: bytes | None, key: bytes | None = None, compression: int = NONE, timestamp_ms: int = 1
) -> SealedBatch:
    builder = BatchBuilder(compression, 16 * 1024 * 1024)
    for value in values:
        if not builder.append(timestamp_ms, key, value, []):
            raise AssertionError("the batch is full")
    return builder.seal()


def numbered(numbers: Iterable[int], *, timestamp_ms: int = 1) -> SealedBatch:
    return batch(*(b"%d" % number for number in numbers), timestamp_ms=timestamp_ms)


def records(fetched: Fetched) -> list[LogRecord]:
    return [record for one in fetched.batches for record in one.open()]


async def receive(reader: Reader) -> list[Fetched]:
    async with asyncio.timeout(DEADLINE_S):
        return await reader.receive()


async def read_to(reader: Reader, tp: TopicPartition, end: int) -> list[LogRecord]:
    """Reads an added partition until its position is `end`."""
    found: list[LogRecord] = []
    position = -1
    while position < end:
        reader.ask(tp)
        for fetched in await receive(reader):
            if fetched.error is not None:
                raise fetched.error
            if fetched.tp == tp:
                found += records(fetched)
                position = fetched.next_offset
    return found


def values(found: Iterable[LogRecord]) -> list[bytes | None]:
    return [record.value for record in found]


def spread(members: Sequence[Member], counts: Mapping[str, int]) -> dict[str, Given]:
    """A sticky assignor: nobody has more than a fair share, and what is kept stays where it is."""
    partitions = {TopicPartition(topic, n) for topic, count in counts.items() for n in range(count)}
    share = -(-len(partitions) // len(members)) if members else 0
    target: dict[str, set[TopicPartition]] = {}
    for member in members:
        target[member.member_id] = set(sorted(member.owned & partitions)[:share])
    for tp in sorted(partitions - set().union(*target.values())):
        target[min(target, key=lambda member_id: (len(target[member_id]), member_id))].add(tp)
    return {member_id: Given(frozenset(mine)) for member_id, mine in target.items()}


class Watched:
    """A group member whose events are answered as they come, in a task of its own."""

    def __init__(self, group: Group, *, revoke: bool = True) -> None:
        self.group = group
        self.revoke = revoke
        self.events: list[GroupEvent] = []
        self.owned: set[TopicPartition] = set()
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            event = await self.group.next_event()
            self.events.append(event)
            if isinstance(event, Assigned):
                assert not self.owned & event.partitions, "assigned twice"
                self.owned |= event.partitions
            elif isinstance(event, Lost):
                self.owned -= event.partitions
            elif isinstance(event, Revoked) and self.revoke:
                self.answer(event)

    def answer(self, event: Revoked) -> None:
        assert event.partitions <= self.owned, "asked for what it does not own"
        self.owned -= event.partitions
        self.group.revoked(event.partitions)

    async def __aenter__(self) -> "Watched":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error


async def until(condition, *, within_s: float = DEADLINE_S, doing=lambda: None) -> None:
    """Waits for a condition, calling `doing` (such as `report_progress`) meanwhile."""
    async with asyncio.timeout(within_s):
        while not condition():
            doing()
            await asyncio.sleep(0.005)
