"""Restores that are overtaken by what happens to their task meanwhile; each was found by a simulation."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import streamflow as sf
from streamflow.clock import VirtualClock
from streamflow.log.api import AtomicCommit, Fetched, OffsetMark, Reader
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import COMPRESSIONS
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.restore import Restorer
from streamflow.sensors import Sensors
from tests.runtime.machine import Machine
from tests.runtime.waiting import until


class OneFetch(Reader):
    """Answers once, when it is told to; then never."""

    def __init__(self, tp: TopicPartition) -> None:
        self._tp = tp
        self.answers = anyio.Event()
        self._answered = False

    def add(self, tp: TopicPartition, offset: int) -> None:
        pass

    def remove(self, tp: TopicPartition) -> None:
        pass

    def ask(self, tp: TopicPartition) -> None:
        pass

    async def receive(self) -> list[Fetched]:
        await self.answers.wait()
        if self._answered:
            await anyio.sleep_forever()
        self._answered = True
        return [Fetched(self._tp, [], 0, 0)]

    def end_offset(self, tp: TopicPartition) -> int | None:
        return None


@pytest.mark.parametrize("turns", range(6))
async def test_a_restore_that_is_cancelled_as_its_fetch_arrives_takes_nobody_along(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    async def take(*_: Any) -> None:
        pass

    monkeypatch.setattr(Restorer, "_take", take)
    tp = TopicPartition("changelog", 0)
    reader = OneFetch(tp)
    restorer = Restorer(reader, None, VirtualClock(), Sensors())  # type: ignore[arg-type]
    span: Any = type("Span", (), {"tp": tp, "position": 0, "target": 9, "records": 0})
    async with anyio.create_task_group() as group:
        group.start_soon(restorer.run)
        async with anyio.create_task_group() as restoring:
            restoring.start_soon(lambda: restorer._read("task", None, span, is_new=False))  # type: ignore[arg-type]
            await until(lambda: tp in restorer._arrived)
            reader.answers.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            restoring.cancel_scope.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        group.cancel_scope.cancel()  # what `run` raised would come out here
    assert tp not in restorer._arrived


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_new_task_that_another_worker_has_had_before_it_was_restored_starts_anew(
    monkeypatch: pytest.MonkeyPatch, guarantee: str
) -> None:
    app = sf.App("overtaken")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=1)
    sums = app.topic("sums", key_type=int, value_type=int, partitions=1)
    totals = app.table("totals", key_type=int, value_type=int, default=int)

    @app.agent(numbers, sink=sums, tables=[totals])
    async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for event in stream.events():
            totals[event.key] += event.value
            yield totals[event.key]

    begun, goes_on = anyio.Event(), anyio.Event()
    restore = Restorer.restore

    async def late(restorer: Restorer, *args: Any, **options: Any) -> None:
        begun.set()
        await goes_on.wait()  # the process is stopped here, and goes on when another one has had its task
        await restore(restorer, *args, **options)

    monkeypatch.setattr(Restorer, "restore", late)
    async with Machine(app, processing_guarantee=guarantee) as machine:
        starting = asyncio.create_task(machine.start())
        await begun.wait()
        await machine.send(numbers, 5, key=1)
        await as_another_worker(machine)
        goes_on.set()
        await starting
        await machine.send(numbers, 2, key=1)
        await machine.settle()
        assert machine.values(sums) == [7]


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_records_that_another_worker_was_done_with_and_purged_are_no_loss(guarantee: str) -> None:
    """A worker that was cut off asks for records that the owner since has processed and deleted."""
    app = sf.App("overtaken")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=1)
    sums = app.topic("sums", key_type=int, value_type=int, partitions=1)
    totals = app.table("totals", key_type=int, value_type=int, default=int)

    @app.agent(numbers, sink=sums, tables=[totals])
    async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for event in stream.events():
            totals[event.key] += event.value
            yield totals[event.key]

    tp = TopicPartition("numbers", 0)
    async with Machine(app, processing_guarantee=guarantee) as machine:
        running = await machine.start()
        manager = running.worker.manager
        assert manager is not None
        takes, missed = manager.fetched, anyio.Event()
        manager.fetched = lambda fetched, resets: missed.set() if fetched.batches else takes(fetched, resets)
        await machine.send(numbers, 5, key=1)
        await missed.wait()
        await as_another_worker(machine)
        await machine.log.admin.delete_records({tp: 1})
        manager.fetched = takes
        manager._reader.add(tp, 0)
        manager._reader.ask(tp)
        await machine.send(numbers, 2, key=1)
        await machine.settle()
        assert running.error is None
        assert machine.values(sums) == [7]


async def as_another_worker(machine: Machine) -> None:
    """Commit the first record, and give the task back, unheard by the one that holds it."""
    (running,) = machine.workers
    group = running.worker.group
    assert group is not None
    builder = BatchBuilder(COMPRESSIONS["none"], 1 << 20)
    builder.append(machine.clock.now_ms(), (1).to_bytes(8, "big"), (5).to_bytes(8, "big"), [])
    changelog = TopicPartition("overtaken-totals-changelog", 0)
    mark = CommitMark("another", {"totals": 1} if running.worker.guarantee == "at_least_once" else None)
    async with machine.log.transactional_producer("another") as producer:
        await producer.commit(
            AtomicCommit(
                [(changelog, builder.seal())],
                {TopicPartition("numbers", 0): OffsetMark(1, mark.metadata())},
                group.membership,
            )
        )
