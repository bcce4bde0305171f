"""The commit's failure scenarios, one by one, in one process on the log in memory: the faults come where they hurt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import streamflow as sf
from streamflow.errors import IndeterminateCommitError
from streamflow.log.api import AtomicCommit, Membership, OffsetMark
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import NONE
from streamflow.model.partitioner import partition_for
from streamflow.runtime.commit_mark import CommitMark
from tests.oracle.reading import number_in, records
from tests.runtime.machine import Machine, Running
from tests.runtime.waiting import until

Store = Callable[[AtomicCommit], Awaitable[Any]]
KEYS = [next(key for key in "abcdefgh" if partition_for(key.encode(), 2) == number) for number in (0, 1)]
"""One of each of two partitions."""


class Summing:
    """An app that keeps a sum per key; each record passes `gate` after it has written."""

    def __init__(self, *, concurrency: int = 1, partitions: int = 1) -> None:
        app = self.app = sf.App("summing", partitions=partitions)
        numbers = self.numbers = app.topic("numbers", key_type=str, value_type=int, partitions=partitions)
        totals = self.totals = app.topic("totals", key_type=str, value_type=int, partitions=partitions)
        sums = self.sums = app.table("sums", key_type=str, value_type=int, default=int)
        self.gates: dict[int, asyncio.Event] = {}
        self.written: list[int] = []

        @app.agent(numbers, sink=totals, concurrency=concurrency)
        async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
            async for key, number in stream.items():
                sums[key] += number
                self.written.append(number)
                if number in self.gates:
                    await self.gates[number].wait()
                yield sums[key]

    async def committed(self, machine: Machine, partition: int = 0) -> dict[str, int]:
        """The table as the changelog has it, for readers of what is committed."""
        found: dict[str, int] = {}
        changelog = sf.TopicPartition(self.sums.changelog.name, partition)
        async for record in records(machine.log, changelog):
            assert record.key is not None
            found[record.key.decode()] = number_in(record.value)
        return found

    async def outputs(self, machine: Machine) -> list[int]:
        await machine.look()
        return machine.values(self.totals)


def on_store(running: Running, around: Callable[[Store, AtomicCommit], Awaitable[Any]]) -> None:
    """Stand between a worker's commits and the log."""
    delivery: Any = running.worker._delivery
    store = delivery._store
    delivery._store = lambda commit: around(store, commit)


@pytest.mark.parametrize("was_stored", [True, False])
async def test_a_commit_of_unknown_outcome_with_later_records_on_top(was_stored: bool) -> None:
    at = Summing()
    async with Machine(at.app) as machine:
        running = await machine.start()
        answers = 0

        async def lose_the_first(store: Store, commit: AtomicCommit) -> Any:
            nonlocal answers
            answers += 1
            if answers > 1:
                return await store(commit)
            if was_stored:
                await store(commit)
            await machine.send(at.numbers, 2, key="a")  # the work goes on, upon what may have been committed
            await until(lambda: at.written == [1, 2])
            raise IndeterminateCommitError("no answer")

        on_store(running, lose_the_first)
        await machine.send(at.numbers, 1, key="a")
        await until(lambda: at.written == [1])
        await machine.commit(running)
        assert await at.committed(machine) == {"a": 1}  # the unknown one, without what came later
        await machine.settle()
        assert await at.outputs(machine) == [1, 3]
        assert await at.committed(machine) == {"a": 3}
        await machine.crash(running)
        again = await machine.start()
        await machine.send(at.numbers, 4, key="a")
        await machine.settle()
        assert await at.outputs(machine) == [1, 3, 7]
        await machine.stop(again)


async def test_a_partition_that_left_and_came_back_with_another_worker_in_between_starts_anew() -> None:
    """This worker heard of nothing; the commit id in the log tells, and what stands on old positions is dropped."""
    at = Summing(partitions=2)
    async with Machine(at.app) as machine:
        running, other = await machine.start(), await machine.start()
        await machine.until(lambda: _has(other, 1))
        await until(lambda: len(running.tasks) == 1)
        ((name, before),) = running.tasks.items()
        key = KEYS[before.partition]
        await machine.send(at.numbers, 1, key=key)
        await machine.settle()

        # Another one takes the 20 and commits; ours has taken it, too, and has not committed it yet.
        await machine.send(at.numbers, 20, key=key)
        await until(lambda: at.written == [1, 20])
        group = running.worker.group
        assert group is not None
        membership = group.membership
        await commit_as_another(machine, at, before.partition, membership)
        await machine.stop(other)  # a new generation
        await until(lambda: group.membership != membership)
        await machine.commit(running)
        await until(lambda: running.tasks.get(name) not in (None, before))
        await machine.send(at.numbers, 300, key=key)
        await machine.settle()
        assert await at.committed(machine, before.partition) == {key: 321}
        assert await at.outputs(machine) == [1, 21, 321]


async def commit_as_another(machine: Machine, at: Summing, partition: int, membership: Membership | None) -> None:
    outputs = []
    for topic in (at.sums.changelog.name, "totals"):
        builder = BatchBuilder(NONE, 1000)
        builder.append(0, KEYS[partition].encode(), (21).to_bytes(8, "big"), [])
        outputs.append((sf.TopicPartition(topic, partition), builder.seal()))
    mark = OffsetMark(2, CommitMark("of another").metadata())
    async with machine.log.transactional_producer("another") as producer:
        await producer.commit(AtomicCommit(outputs, {sf.TopicPartition("numbers", partition): mark}, membership))


async def _has(running: Running, count: int) -> bool:
    return len(running.tasks) == count


async def test_a_commit_while_the_first_of_two_concurrent_records_is_slow() -> None:
    at = Summing(concurrency=2)
    at.gates[1] = asyncio.Event()
    async with Machine(at.app) as machine:
        running = await machine.start()
        await machine.send(at.numbers, 1, key="a")
        await machine.send(at.numbers, 1000, key="d")
        await until(lambda: sorted(at.written) == [1, 1000])
        await asyncio.sleep(0.01)
        await machine.commit(running)
        assert await at.committed(machine) == {}  # the second is done, and waits for the first
        assert (await machine.committed()).get(sf.TopicPartition("numbers", 0), 0) == 0
        await machine.crash(running)

        at.gates.clear()
        await machine.start()
        await machine.settle()
        assert await at.committed(machine) == {"a": 1, "d": 1000}
        assert sorted(await at.outputs(machine)) == [1, 1000]


async def test_a_commit_while_a_record_awaits_has_nothing_of_it() -> None:
    at = Summing()
    at.gates[20] = asyncio.Event()
    async with Machine(at.app) as machine:
        running = await machine.start()
        await machine.send(at.numbers, 1, key="a")
        await machine.send(at.numbers, 20, key="a")
        await until(lambda: at.written == [1, 20])
        await machine.commit(running)
        assert await at.committed(machine) == {"a": 1}
        assert (await machine.committed())[sf.TopicPartition("numbers", 0)] == 1
        await machine.crash(running)
        at.gates.clear()
        await machine.start()
        await machine.settle()
        assert await at.committed(machine) == {"a": 21}
        assert await at.outputs(machine) == [1, 21]


async def test_a_rebalance_during_a_commit() -> None:
    at = Summing(partitions=2)
    async with Machine(at.app) as machine:
        running = await machine.start()
        gate, waits = asyncio.Event(), asyncio.Event()

        async def hold(store: Store, commit: AtomicCommit) -> Any:
            waits.set()
            await gate.wait()
            return await store(commit)

        for key in KEYS:
            await machine.send(at.numbers, 1, key=key)
        await until(lambda: at.written == [1, 1])
        on_store(running, hold)
        committing = asyncio.ensure_future(machine.commit(running))
        await waits.wait()
        starting = asyncio.ensure_future(machine.start())
        for key in KEYS:
            await machine.send(at.numbers, 20, key=key)
        manager = running.worker.manager
        assert manager is not None
        await until(lambda: manager.changing)  # it has to give one up, and its commit is under way
        gate.set()
        await committing
        other = await starting
        await machine.until(lambda: _has(other, 1))
        await machine.settle()
        assert sorted(await at.outputs(machine)) == [1, 1, 21, 21]
        assert [await at.committed(machine, number) for number in (0, 1)] == [{key: 21} for key in KEYS]


async def test_dead_letters_and_repartitioned_records_are_in_the_commit_of_their_record() -> None:
    app = sf.App("letters", partitions=1)
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    dead = app.topic("dead", partitions=1)
    sums = app.table("sums", key_type=str, value_type=int, default=int)
    counted = app.table("counted", key_type=str, value_type=int, default=int)

    @app.agent(numbers, on_error=sf.DeadLetter(dead), tables=[sums])
    async def add(number: int) -> None:
        sums["all"] += number
        if number < 0:
            raise ValueError(number)

    @app.agent(numbers.group_by(lambda number: str(number % 2), name="by-rest", key_type=str), tables=[counted])
    async def count(number: int) -> None:
        counted[str(number % 2)] += 1

    async with Machine(app) as machine:
        running = await machine.start()
        commits: list[dict[str, int]] = []
        holding = True

        async def note(store: Store, commit: AtomicCommit) -> Any:
            found: dict[str, int] = {}
            for tp, batch in commit.outputs:
                found[tp.topic] = found.get(tp.topic, 0) + batch.num_records
            if holding:
                raise asyncio.CancelledError
            commits.append(found)
            return await store(commit)

        on_store(running, note)
        for number in (1, -2, 3):
            await machine.send(numbers, number, key="a")
        await asyncio.sleep(0.05)
        with pytest.raises(asyncio.CancelledError):
            await machine.commit(running)
        await machine.look()
        assert machine.records(dead) == []
        holding = False
        await machine.commit(running)
        assert commits[0] == {
            "dead": 1,
            "letters-by-rest-repartition": 3,
            "letters-sums-changelog": 1,
        }
        await machine.settle()
        await machine.look()
        assert len(machine.records(dead)) == 1
        changelog = sf.TopicPartition(counted.changelog.name, 0)
        found = {record.key: number_in(record.value) async for record in records(machine.log, changelog)}
        assert found == {b"0": 1, b"1": 2}
