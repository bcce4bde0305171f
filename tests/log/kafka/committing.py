"""A worker in small: numbered commits, made exactly once by what `streamflow/log/api.py` says about each outcome."""

import asyncio
import contextlib
from collections import Counter

from streamflow.errors import IndeterminateCommitError, RetriableError, TaskMigratedError
from streamflow.log.api import AtomicCommit, Group, GroupSettings, Log, NewTopic, OffsetMark
from streamflow.log.kafka.transaction import KafkaTransactionalProducer
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, batch, read_to, spread, until, values

SETTINGS = GroupSettings(session_timeout_ms=6000, heartbeat_interval_ms=200)


class Committer:
    """A member of a group that owns one source partition, and the producer of its commits.

    Commit `n` writes `n` to each output and sets the source's offset to `n + 1`, with `n` as its commit id.
    """

    def __init__(self, log: Log, name, *, outputs: int = 3) -> None:
        self.log = log
        self.source = TopicPartition(name("source"), 0)
        self.outputs = [TopicPartition(name("out"), number) for number in range(outputs)]
        self.group_id = name("group")
        self.transactional_id = name("worker")
        self.met: Counter[str] = Counter()
        self.producer: KafkaTransactionalProducer
        self.group: Group

    async def create(self, *, replication: int = -1) -> None:
        topics = ((self.source.topic, 1), (self.outputs[0].topic, len(self.outputs)))
        await self.log.admin.create([NewTopic(topic, count, replication) for topic, count in topics])

    @contextlib.asynccontextmanager
    async def joined(self):
        group = self.log.group(self.group_id, frozenset({self.source.topic}), spread, SETTINGS)
        async with group as self.group, Watched(self.group) as member:
            await until(lambda: member.owned)
            self.producer = await self.open()
            try:
                yield self
            finally:
                await self.producer.__aexit__(None, None, None)

    async def open(self, log: Log | None = None) -> KafkaTransactionalProducer:
        """One more producer of the transactional id."""
        return await (log or self.log).transactional_producer(self.transactional_id).__aenter__()

    def numbered(self, number: int) -> AtomicCommit:
        outputs = [(tp, batch(b"%d" % number)) for tp in self.outputs]
        return AtomicCommit(outputs, {self.source: OffsetMark(number + 1, str(number))}, self.group.membership)

    async def commit(self, number: int) -> None:
        """Until it is stored."""
        while True:
            try:
                await self.producer.commit(self.numbered(number))
                return
            except IndeterminateCommitError:
                self.met["indeterminate"] += 1
                await self.reopen()
                if await self.commit_id() == str(number):
                    self.met["it was stored"] += 1
                    return
            except RetriableError:
                self.met["retriable"] += 1
                await asyncio.sleep(0.02)
            except TaskMigratedError:
                self.met["migrated"] += 1
                await asyncio.sleep(0.05)

    async def reopen(self) -> None:
        await self.producer.__aexit__(None, None, None)
        while True:
            try:
                self.producer = await self.open()
                return
            except RetriableError:
                await asyncio.sleep(0.1)

    async def commit_id(self) -> str | None:
        mark = (await self.group.committed([self.source]))[self.source]
        return None if mark is None else mark.metadata

    async def read(self, log: Log | None = None) -> list[list[bytes | None]]:
        """What a read_committed reader sees of each output, up to the high watermark."""
        log = log or self.log
        ends = await log.admin.high_watermarks(self.outputs)
        async with log.reader("check") as reader, asyncio.timeout(20):
            for tp in self.outputs:
                reader.add(tp, 0)
            return [values(await read_to(reader, tp, ends[tp])) if ends[tp] else [] for tp in self.outputs]

    async def check(self, numbers) -> None:
        """These commits and no others are stored, once and in order, and no transaction is open."""
        numbers = list(numbers)
        assert await self.read() == [[b"%d" % number for number in numbers]] * len(self.outputs)
        assert await self.commit_id() == (str(numbers[-1]) if numbers else None)
        assert await self.log.admin.end_offsets(self.outputs) == await self.log.admin.high_watermarks(self.outputs)
