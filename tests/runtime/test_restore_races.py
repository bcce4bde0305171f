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
from streamflow.runtime.task_tables import TaskTables
from streamflow.sensors import Sensors
from streamflow.state.store import StoreBatch
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
    app, numbers, sums = adding()
    begun, goes_on = delayed_restore(monkeypatch)
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


async def test_a_new_task_does_not_take_what_another_worker_has_written_since_and_not_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its store had reached further than what is committed then: it was taken for damaged, and rebuilt."""
    app, numbers, sums = adding()
    begun, goes_on = delayed_restore(monkeypatch)
    reached: list[int] = []
    write = Restorer._write

    async def watched(restorer: Restorer, tables: TaskTables, batch: StoreBatch) -> None:
        assert batch.checkpoint is not None
        reached.append(batch.checkpoint.changelogs.get("totals", 0))
        await write(restorer, tables, batch)

    monkeypatch.setattr(Restorer, "_write", watched)
    async with Machine(app, processing_guarantee="at_least_once") as machine:
        starting = asyncio.create_task(machine.start())
        await begun.wait()
        await machine.send(numbers, 5, key=1)
        await as_another_worker(machine, committed=0)
        goes_on.set()
        await starting
        await machine.send(numbers, 2, key=1)
        await machine.settle()
        assert machine.values(sums) == [5, 7]
        assert set(reached) == {0}


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_records_that_another_worker_was_done_with_and_purged_are_no_loss(guarantee: str) -> None:
    """A worker that was cut off asks for records that the owner since has processed and deleted."""
    app, numbers, sums = adding()
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


def adding() -> tuple[sf.App, sf.Topic[int, int], sf.Topic[int, int]]:
    """An app that adds numbers up by key, its input and its output."""
    app = sf.App("overtaken")
    numbers = app.topic("numbers", key_type=int, value_type=int, partitions=1)
    sums = app.topic("sums", key_type=int, value_type=int, partitions=1)
    totals = app.table("totals", key_type=int, value_type=int, default=int)

    @app.agent(numbers, sink=sums, tables=[totals])
    async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for event in stream.events():
            totals[event.key] += event.value
            yield totals[event.key]

    return app, numbers, sums


def delayed_restore(monkeypatch: pytest.MonkeyPatch) -> tuple[anyio.Event, anyio.Event]:
    """Restores wait when they begin: the process is stopped there, and goes on when another one has had its task.

    Returns:
        Set when one has begun; set it so that they go on.
    """
    begun, goes_on = anyio.Event(), anyio.Event()
    restore = Restorer.restore

    async def late(restorer: Restorer, *args: Any, **options: Any) -> None:
        begun.set()
        await goes_on.wait()
        await restore(restorer, *args, **options)

    monkeypatch.setattr(Restorer, "restore", late)
    return begun, goes_on


async def as_another_worker(machine: Machine, *, committed: int = 1) -> None:
    """Do the first record, commit it or but where the task begins, and give the task back, unheard by its holder."""
    (running,) = machine.workers
    group = running.worker.group
    assert group is not None
    builder = BatchBuilder(COMPRESSIONS["none"], 1 << 20)
    builder.append(machine.clock.now_ms(), (1).to_bytes(8, "big"), (5).to_bytes(8, "big"), [])
    changelog = TopicPartition("overtaken-totals-changelog", 0)
    mark = CommitMark("another", {"totals": committed} if running.worker.guarantee == "at_least_once" else None)
    async with machine.log.transactional_producer("another") as producer:
        await producer.commit(
            AtomicCommit(
                [(changelog, builder.seal())],
                {TopicPartition("numbers", 0): OffsetMark(committed, mark.metadata())},
                group.membership,
            )
        )
