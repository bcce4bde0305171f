"""The topics that the world writes: made, fed, and given more partitions while workers read them."""

import asyncio
import sqlite3
from typing import TYPE_CHECKING, Any

from streamflow.log.api import Log, NewTopic
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import COMPRESSIONS
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition
from tests.simulation.apps import key_of

if TYPE_CHECKING:
    from tests.simulation.world import World


class Sources:
    """The sources of one run."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._plan = world.plan
        self.counts = dict.fromkeys(self._plan.sources(), self._plan.partitions)
        """How many partitions each has."""

    def partitions(self) -> list[TopicPartition]:
        """All of them, and those of the topics that the app groups anew."""
        grouped = [work.input for work in self._plan.works if work.kind == "distinct"]
        counts = {**self.counts, **dict.fromkeys(grouped, self._plan.partitions)}
        return [TopicPartition(topic, number) for topic, count in counts.items() for number in range(count)]

    async def make(self, log: Log) -> None:
        """Create them."""
        await log.admin.create([NewTopic(name, count) for name, count in self.counts.items()])

    async def feed(self, log: Log) -> None:
        """Write the input, a few records at a time, over three quarters of the horizon."""
        draw, plan = self._world.draw, self._plan
        async with log.producer() as producer:
            for source in self.counts:
                number = 0
                while number < plan.records:
                    count = min(draw.randrange(1, 6), plan.records - number)
                    await self._write(producer, source, range(number, number + count))
                    number += count
                    await asyncio.sleep(draw.uniform(0, 1.5 * plan.horizon_s * count / plan.records))

    async def _write(self, producer: Any, source: str, numbers: range) -> None:
        by_partition: dict[int, BatchBuilder] = {}
        for number in numbers:
            key = key_of(number, self._plan.keys).to_bytes(8, "big")
            value = b"?" if self._world.draw.random() < self._plan.poison else number.to_bytes(8, "big")
            builder = by_partition.setdefault(
                partition_for(key, self.counts[source]), BatchBuilder(COMPRESSIONS["none"], 1 << 20)
            )
            builder.append(self._world.clock.now_ms(), key, value, [])
        for partition, builder in sorted(by_partition.items()):
            await (await producer.enqueue(TopicPartition(source, partition), builder.seal()))

    async def grow(self, log: Log) -> None:
        """Give a source more partitions at some moment, where nothing is kept by key of what it has."""
        names, count = self._plan.may_grow(), self._plan.crowd.grows
        if not names or not count:
            return
        await asyncio.sleep(self._world.draw.uniform(0.3, 0.7) * self._plan.horizon_s)
        await self._grouped_are_made(log)
        name = self._world.draw.choice(names)
        await _add_partitions(log, name, self.counts[name] + count)
        self.counts[name] += count
        self._world.trace(f"{name} has {self.counts[name]} partitions from now on")

    async def _grouped_are_made(self, log: Log) -> None:
        """They get as many partitions as their source has when they are made."""
        names = {tp.topic for tp in self.partitions()} - self.counts.keys()
        while True:
            if len(await log.admin.describe(sorted(names))) == len(names):
                return
            await asyncio.sleep(0.1)


async def _add_partitions(log: Log, topic: str, count: int) -> None:
    """What Kafka's `create_partitions` does."""
    assert isinstance(log, SqliteLog)

    def work(sql: sqlite3.Connection) -> None:
        number, before = sql.execute("SELECT id, partitions FROM topics WHERE name = ?", (topic,)).fetchone()
        sql.execute("UPDATE topics SET partitions = ? WHERE id = ?", (count, number))
        sql.executemany(
            "INSERT INTO partitions (topic_id, partition) VALUES (?, ?)",
            [(number, each) for each in range(before, count)],
        )

    await log._database.writer.write(work)
