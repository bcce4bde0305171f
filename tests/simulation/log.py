"""The log as an unreliable network shows it: every part of `log/api.py` with faults, within its contract."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

from streamflow.errors import ClosedError, IndeterminateCommitError, RetriableError, TaskMigratedError
from streamflow.log.api import (
    Admin,
    Assigned,
    Assignor,
    AtomicCommit,
    Fetched,
    Group,
    GroupEvent,
    GroupSettings,
    GroupStatistics,
    Isolation,
    Log,
    Lost,
    Membership,
    NewTopic,
    OffsetMark,
    Producer,
    Reader,
    Revoked,
    Told,
    TopicDescription,
    TransactionalProducer,
    Unheard,
)
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from tests.simulation.faults import Wire


class FaultyLog(Log):
    """One process's connection."""

    def __init__(self, inner: Log, wire: Wire) -> None:
        self.inner = inner
        self._wire = wire
        self._admin = FaultyAdmin(inner.admin, wire)

    @property
    def address(self) -> str:
        return self.inner.address

    @property
    def atomic_commits(self) -> bool:
        return True

    @property
    def admin(self) -> Admin:
        return self._admin

    async def __aenter__(self) -> Log:
        await self._wire.hop("connect")
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.inner.__aexit__(*exc_info)

    @asynccontextmanager
    async def reader(self, lane: str, *, isolation: Isolation = "read_committed") -> AsyncGenerator[Reader]:
        async with self.inner.reader(lane, isolation=isolation) as inner:
            yield FaultyReader(inner, self._wire, lane)

    @asynccontextmanager
    async def producer(self, *, delivery_timeout_s: float = 120.0) -> AsyncGenerator[Producer]:
        async with self.inner.producer(delivery_timeout_s=delivery_timeout_s) as inner:
            yield FaultyProducer(inner, self._wire)

    @asynccontextmanager
    async def transactional_producer(self, transactional_id: str) -> AsyncGenerator[TransactionalProducer]:
        await self._wire.hop("take id over")
        await self._wire.world.settle_late(transactional_id)
        async with self.inner.transactional_producer(transactional_id) as inner:
            yield FaultyTransactionalProducer(inner, self._wire, transactional_id)

    @asynccontextmanager
    async def group(
        self,
        group_id: str,
        topics: frozenset[str],
        assignor: Assignor,
        settings: GroupSettings,
        says: bytes = b"",
    ) -> AsyncGenerator[Group]:
        await self._wire.hop("join")
        async with self.inner.group(group_id, topics, assignor, settings, says) as inner:
            yield FaultyGroup(inner, self._wire)
            self._wire.strike("leave", commit=True)

    async def changed(self) -> None:
        await self.inner.changed()


class FaultyReader(Reader):
    """Answers come late, and in parts."""

    def __init__(self, inner: Reader, wire: Wire, lane: str) -> None:
        self._inner = inner
        self._wire = wire
        self._lane = lane
        self._added: dict[TopicPartition, object] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._held: list[tuple[object, Fetched]] = []

    def add(self, tp: TopicPartition, offset: int) -> None:
        self._added[tp] = object()
        self._inner.add(tp, offset)

    def remove(self, tp: TopicPartition) -> None:
        self._added.pop(tp, None)
        self._inner.remove(tp)

    def ask(self, tp: TopicPartition) -> None:
        self._inner.ask(tp)

    async def receive(self) -> list[Fetched]:
        while True:
            if not self._held:
                self._held = [(self._added.get(each.tp), each) for each in await self._inner.receive()]
            await self._wire.hop(f"fetch {self._lane}")
            held, self._held = self._held, []
            answers = [self._shortened(each) for token, each in held if self._added.get(each.tp) is token]
            if answers:
                return answers

    def _shortened(self, fetched: Fetched) -> Fetched:
        self._ends[fetched.tp] = fetched.end_offset
        if len(fetched.batches) < 2 or not self._wire.chance("short_fetch"):
            return fetched
        kept = fetched.batches[: self._wire.world.draw.randrange(1, len(fetched.batches))]
        position = kept[-1].next_offset
        self._inner.remove(fetched.tp)
        self._inner.add(fetched.tp, position)
        size = sum(batch.size_bytes for batch in kept)
        return Fetched(fetched.tp, kept, position, fetched.end_offset, size)

    def end_offset(self, tp: TopicPartition) -> int | None:
        known = self._inner.end_offset(tp)
        return self._ends.get(tp) if known is None else known


class FaultyProducer(Producer):
    """Batches arrive late, those of a process that is stopped when it goes on; acknowledgements come late, too."""

    def __init__(self, inner: Producer, wire: Wire) -> None:
        self._inner = inner
        self._wire = wire

    async def enqueue(self, tp: TopicPartition, batch: SealedBatch) -> "asyncio.Future[int]":
        await self._wire.hop(f"produce {tp}", commit=True)
        stored = await self._inner.enqueue(tp, batch)
        loop = asyncio.get_running_loop()
        told: asyncio.Future[int] = loop.create_future()
        told.add_done_callback(lambda done: done.cancelled() or done.exception())

        def tell(_: object) -> None:
            if told.done() or stored.cancelled():
                return
            if (error := stored.exception()) is not None:
                told.set_exception(error)
            else:
                self._wire.strike(f"produced {tp} {stored.result()}", commit=True)
                told.set_result(stored.result())

        stored.add_done_callback(lambda _: loop.call_later(self._wire.delay_s(), tell, None))
        return told

    async def flush(self) -> None:
        await self._inner.flush()

    def reset(self, tp: TopicPartition) -> None:
        self._inner.reset(tp)


class FaultyTransactionalProducer(TransactionalProducer):
    """Commits are refused, and answers lost."""

    def __init__(self, inner: TransactionalProducer, wire: Wire, transactional_id: str) -> None:
        self._inner = inner
        self._wire = wire
        self._id = transactional_id
        self._is_over = False

    async def commit(self, commit: AtomicCommit) -> Mapping[TopicPartition, int]:
        if self._is_over:
            raise ClosedError("the outcome of an earlier commit is unknown")
        wire, world = self._wire, self._wire.world
        sent_s = world.loop.time()  # by the worker: it may have lost the task when this arrives
        await wire.hop("commit", commit=True)
        if wire.chance("refused"):
            raise RetriableError("simulated: the coordinator is busy")
        if wire.chance("migrated"):
            raise TaskMigratedError("simulated: a rebalance is under way")
        if wire.chance("lost_request"):
            raise self._unknown()
        if wire.chance("late_request"):
            world.late.setdefault(self._id, []).append(lambda: self._store(commit, sent_s))
            raise self._unknown()
        ends = await wire.decided_there("commit", lambda: self._store(commit, sent_s))
        if wire.chance("lost_reply"):
            raise self._unknown()
        return ends

    async def _store(self, commit: AtomicCommit, sent_s: float) -> Mapping[TopicPartition, int]:
        ends = await self._inner.commit(commit)
        if commit.membership is not None:
            self._wire.world.committed(self._wire.process, commit.offsets, commit.membership, sent_s)
        return ends

    def _unknown(self) -> IndeterminateCommitError:
        self._is_over = True
        self._wire.world.trace(f"{self._wire.process.name} does not learn what became of its commit")
        return IndeterminateCommitError("simulated: the connection broke")


_LATE: dict[type[GroupEvent], tuple[str, tuple[float, float]]] = {
    Lost: ("late_loss", (1.0, 6.0)),
    Revoked: ("late_revocation", (0.5, 6.0)),
    Assigned: ("late_assignment", (0.5, 3.0)),
    Told: ("late_told", (0.5, 3.0)),
}
"""Which rate says that an event is heard of late, and by how many seconds then."""


class FaultyGroup(Group):
    """Events come late; commits of offsets are refused, and answers lost."""

    def __init__(self, inner: Group, wire: Wire) -> None:
        self._inner = inner
        self._wire = wire
        self._event: GroupEvent | None = None

    async def next_event(self) -> GroupEvent:
        if self._event is None:
            self._event = await self._inner.next_event()
            if isinstance(self._event, Assigned):
                self._wire.world.owners.assigned(self._wire.process, self._event)
        await self._wire.hop(f"group says {type(self._event).__name__}")
        late = _LATE.get(type(self._event))
        if late is not None and self._wire.chance(late[0]):
            hear_late = self._wire.world.population.hear_late
            hear_late.add(self._wire.process)
            await asyncio.sleep(self._wire.world.draw.uniform(*late[1]))
            hear_late.discard(self._wire.process)
        event, self._event = self._event, None
        return event

    def say(self, words: bytes) -> None:
        self._inner.say(words)

    def rejoin(self, why: str) -> None:
        self._inner.rejoin(why)

    def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        self._wire.strike("gives back", commit=True)
        self._inner.revoked(partitions)

    @property
    def membership(self) -> Membership | None:
        return self._inner.membership

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        return self._inner.assignment

    async def committed(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, OffsetMark | None]:
        await self._wire.hop("ask for offsets")
        if self._wire.chance("refused"):
            raise RetriableError("simulated: the coordinator moves")
        marks = await self._inner.committed(partitions)
        await self._wire.hop("offsets")
        return marks

    async def commit(self, offsets: Mapping[TopicPartition, OffsetMark], membership: Membership) -> None:
        wire = self._wire
        await wire.hop("commit offsets", commit=True)
        if wire.chance("refused"):
            raise RetriableError("simulated: the coordinator moves")
        if wire.chance("migrated"):
            raise TaskMigratedError("simulated: a rebalance is under way")

        sent_s = wire.world.loop.time()

        async def store() -> None:
            await self._inner.commit(offsets, membership)
            wire.world.committed(wire.process, offsets, membership, sent_s)

        await wire.decided_there("commit offsets", store)
        if wire.chance("lost_reply"):
            raise RetriableError("simulated: the connection broke")

    def report_progress(self) -> None:
        self._inner.report_progress()

    def unheard(self) -> Sequence[Unheard]:
        return self._inner.unheard()

    def statistics(self) -> GroupStatistics:
        return self._inner.statistics()


class FaultyAdmin(Admin):
    """Answers come late, and offsets are refused at times."""

    def __init__(self, inner: Admin, wire: Wire) -> None:
        self._inner = inner
        self._wire = wire

    async def describe(self, topics: Sequence[str]) -> Mapping[str, TopicDescription]:
        await self._wire.hop("describe")
        return await self._inner.describe(topics)

    async def topics(self) -> Sequence[str]:
        await self._wire.hop("topics")
        return await self._inner.topics()

    async def create(self, topics: Sequence[NewTopic]) -> None:
        await self._wire.hop("create")
        await self._inner.create(topics)

    async def delete(self, topics: Sequence[str]) -> None:
        await self._inner.delete(topics)

    async def start_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        await self._may_refuse("start offsets")
        return await self._inner.start_offsets(partitions)

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        await self._may_refuse("end offsets")
        return await self._inner.end_offsets(partitions)

    async def high_watermarks(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        await self._may_refuse("high watermarks")
        found = await self._inner.high_watermarks(partitions)
        await self._wire.hop("high watermarks <")
        return found

    async def _may_refuse(self, what: str) -> None:
        await self._wire.hop(what)
        if self._wire.chance("refused"):
            raise RetriableError("simulated: the leader moves")

    async def delete_records(self, before: Mapping[TopicPartition, int]) -> None:
        """Only looked at: the checks want to read everything."""
        await self._wire.hop("purge")
        self._wire.world.may_be_purged(before)

    async def groups(self) -> Sequence[str]:
        return await self._inner.groups()

    async def group_offsets(self, group_id: str, *, stable: bool = False) -> Mapping[TopicPartition, OffsetMark]:
        await self._wire.hop("group offsets")
        return await self._inner.group_offsets(group_id, stable=stable)

    async def group_members(self, group_id: str) -> Sequence[str]:
        return await self._inner.group_members(group_id)

    async def delete_group(self, group_id: str) -> None:
        await self._inner.delete_group(group_id)

    async def fence_producer(self, transactional_id: str) -> bool:
        await self._may_refuse("fence")
        await self._wire.world.settle_late(transactional_id)
        was_open = await self._inner.fence_producer(transactional_id)
        await self._may_refuse("fenced")
        return was_open
