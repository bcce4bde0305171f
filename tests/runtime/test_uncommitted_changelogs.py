"""At least once, a changelog may end in records of updates whose offsets were never committed: they count once."""

import asyncio
from typing import Any

import anyio
import pytest

import streamflow as sf
from streamflow.errors import RetriableError, TaskMigratedError
from streamflow.log.api import Membership, OffsetMark
from streamflow.log.batch import BatchBuilder, SealedBatch
from streamflow.log.codec import NONE
from streamflow.model.record import TopicPartition
from streamflow.runtime.at_least_once import AtLeastOnce
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.restore import Restorer
from tests.runtime.machine import Machine, Running
from tests.runtime.waiting import until

AT_LEAST_ONCE = "at_least_once"
EXACTLY_ONCE = "exactly_once"
NUMBERS = TopicPartition("numbers", 0)


class Counts:
    """An app that counts by key."""

    def __init__(self, **more: Any) -> None:
        app = self.app = sf.App("counts")
        # Offset of the record that the agent does not get done.
        self.held = -1
        self.numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
        self.totals = totals = app.table("totals", key_type=str, value_type=int, default=int)
        self.second = second = app.table("second", key_type=str, value_type=int, default=int) if more else None

        @app.agent(self.numbers, tables=[totals] if second is None else [totals, second])
        async def add(stream: sf.Stream[int]) -> None:
            async for event in stream.events():
                if event.offset == self.held:
                    await anyio.Event().wait()
                key, number = event.key, event.value
                totals[key] += number
                if second is not None:
                    second[key] += number


async def send(machine: Machine, counts: Counts, *keys: str) -> None:
    for key in keys:
        await machine.send(counts.numbers, 1, key=key)


def with_guarantee(machine: Machine, guarantee: str) -> None:
    machine.settings = machine.app.settings(
        {
            "broker": machine.settings.broker,
            "processing_guarantee": guarantee,
            "commit_interval_ms": machine.settings.commit_interval_ms,
            "heartbeat_interval_ms": machine.settings.heartbeat_interval_ms,
            "session_timeout_ms": machine.settings.session_timeout_ms,
        }
    )


async def processed(running: Running, offset: int) -> None:
    task = running.tasks["numbers-0"]
    await until(lambda: task.positions()[NUMBERS] >= offset)


async def restored(running: Running) -> None:
    await until(lambda: running.tasks["numbers-0"].state == "running")


async def refuse_offsets(machine: Machine, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the group answer no commit that moves an offset; one that only says where changelogs stand moves none."""
    group = running.worker.group
    assert group is not None
    commit, committed = group.commit, (await machine.committed()).get(NUMBERS, 0)

    async def refuse(offsets: dict[TopicPartition, OffsetMark], membership: Membership) -> None:
        if offsets[NUMBERS].offset > committed:
            raise RetriableError("the coordinator has moved")
        await commit(offsets, membership)

    monkeypatch.setattr(group, "commit", refuse)


async def crash_before_offsets(machine: Machine, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit until the changelog is acknowledged and the offsets are refused, then die."""
    ends = machine.log.admin.high_watermarks
    changelog = TopicPartition("counts-totals-changelog", 0)
    before = (await ends([changelog]))[changelog]
    await refuse_offsets(machine, running, monkeypatch)
    async with anyio.create_task_group() as group:
        group.start_soon(machine.commit, running)
        with anyio.fail_after(5):
            while (await ends([changelog]))[changelog] == before:
                await machine.log.changed()
        group.cancel_scope.cancel()
    await machine.crash(running)


@pytest.mark.parametrize("is_first", [True, False], ids=["first commit", "a later one"])
async def test_a_crash_between_changelog_and_offsets_counts_no_update_twice(
    is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        done = 0
        if not is_first:
            await send(machine, counts, "a", "b")
            await machine.settle()
            done = 2
        await send(machine, counts, "a", "a", "c")
        await processed(running, done + 3)
        await crash_before_offsets(machine, running, monkeypatch)
        await machine.start()
        await machine.settle()
        assert dict(counts.totals) == ({"a": 2, "c": 1} if is_first else {"a": 3, "b": 1, "c": 1})


async def test_what_a_cancelled_commit_had_sent_belongs_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the offsets would pass updates that the mark, or the local store, knows nothing of."""
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        await send(machine, counts, "a")
        await processed(running, 3)
        with monkeypatch.context() as patch:
            await refuse_offsets(machine, running, patch)
            with anyio.move_on_after(0.2):
                await machine.commit(running)
        await send(machine, counts, "c")
        await machine.settle()
        assert dict(counts.totals) == {"a": 2, "b": 1, "c": 1}
        await machine.stop(running)
        await machine.start()
        await machine.settle()
        assert dict(counts.totals) == {"a": 2, "b": 1, "c": 1}


async def test_a_crash_after_the_table_was_restored_and_before_it_was_committed_counts_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is to be taken back stays to be taken back until a commit has done it, however often the worker dies."""
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        for _ in range(3):
            await send(machine, counts, "a", "c")
            await processed(running, (await machine.log.admin.end_offsets([NUMBERS]))[NUMBERS])
            await crash_before_offsets(machine, running, monkeypatch)
            running = await machine.start()
            await restored(running)
            await machine.crash(running)
            running = await machine.start()
        await machine.settle()
        assert dict(counts.totals) == {"a": 4, "b": 1, "c": 3}
        await machine.crash(running)
        await machine.start()
        await machine.settle()
        assert dict(counts.totals) == {"a": 4, "b": 1, "c": 3}


@pytest.mark.parametrize("guarantee", [AT_LEAST_ONCE, EXACTLY_ONCE])
async def test_what_is_taken_back_is_in_the_first_commit_that_follows(
    guarantee: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold a part of the records that came again; who restores then must not see the rest."""
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        await send(machine, counts, "a", "c")
        await processed(running, 4)
        await crash_before_offsets(machine, running, monkeypatch)
        with_guarantee(machine, guarantee)
        counts.held = 3
        running = await machine.start()
        await processed(running, 3)
        await machine.commit(running)
        assert (await machine.committed())[NUMBERS] == 3
        await machine.crash(running)
        counts.held = -1
        await machine.start()
        await machine.settle()
        assert dict(counts.totals) == {"a": 2, "b": 1, "c": 1}


@pytest.mark.parametrize("order", [(EXACTLY_ONCE, AT_LEAST_ONCE), (AT_LEAST_ONCE, EXACTLY_ONCE)], ids=" to ".join)
async def test_the_guarantee_may_be_switched_between_runs(
    order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=order[0]) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        await machine.stop(running)
        with_guarantee(machine, order[1])
        running = await machine.start()
        await send(machine, counts, "a", "c")
        await processed(running, 4)
        if order[1] == AT_LEAST_ONCE:
            await crash_before_offsets(machine, running, monkeypatch)
        else:
            await machine.crash(running)
        running = await machine.start()
        await machine.settle()
        assert dict(counts.totals) == {"a": 2, "b": 1, "c": 1}


async def test_a_table_that_is_new_is_pinned_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        await machine.stop(running)
        more = Counts(second=True)
        running = await machine.start(app=more.app)
        await send(machine, more, "a", "c")
        await processed(running, 4)
        await crash_before_offsets(machine, running, monkeypatch)
        await machine.start(app=more.app)
        await machine.settle()
        assert dict(more.totals) == {"a": 2, "b": 1, "c": 1}
        assert more.second is not None
        assert dict(more.second) == {"a": 1, "c": 1}


async def test_the_first_commit_says_where_changelogs_stand_and_keeps_stream_time() -> None:
    app = sf.App("counts")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    totals = app.table("totals", key_type=str, value_type=int, default=int, ttl_s=100)

    @app.agent(numbers, tables=[totals])
    async def add(stream: sf.Stream[int]) -> None:
        async for key, number in stream.items():
            totals[key] += number

    async with Machine(app, processing_guarantee=EXACTLY_ONCE) as machine:
        running = await machine.start()
        await machine.send(numbers, 1, key="a", timestamp_ms=5_000)
        await machine.settle()
        await machine.stop(running)
        with_guarantee(machine, AT_LEAST_ONCE)
        running = await machine.start()
        await machine.send(numbers, 1, key="b", timestamp_ms=6_000)
        await processed(running, 2)
        delivery = running.worker._delivery
        assert isinstance(delivery, AtLeastOnce)
        await delivery._pin(running.tasks.values())
        marks = await machine.log.admin.group_offsets("counts")
        mark = CommitMark.of(marks[NUMBERS])
        assert marks[NUMBERS].offset == 1
        assert mark.changelogs == {"totals": 1}
        assert mark.times == {"totals": 5_000}


async def test_a_commit_while_tables_are_restored_says_nothing_of_where_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One table has updates to take back already, the other was not looked at yet."""
    counts = Counts(second=True)
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        await send(machine, counts, "a", "c")
        await processed(running, 4)
        await crash_before_offsets(machine, running, monkeypatch)
        read, waits, goes_on = Restorer._read, anyio.Event(), anyio.Event()

        async def slowly(self: Restorer, task: str, tables: Any, span: Any, *, is_new: bool) -> None:
            if tables.dirty_entries:
                waits.set()
                await goes_on.wait()
            await read(self, task, tables, span, is_new=is_new)

        monkeypatch.setattr(Restorer, "_read", slowly)
        counts.held = 2
        running = machine.launch()
        with anyio.fail_after(5):
            await waits.wait()
        await machine.commit(running)
        goes_on.set()
        await restored(running)
        await machine.crash(running)
        monkeypatch.undo()
        counts.held = -1
        await machine.start()
        await machine.settle()
        assert dict(counts.totals) == {"a": 2, "b": 1, "c": 1}
        assert counts.second is not None
        assert dict(counts.second) == {"a": 2, "b": 1, "c": 1}


async def test_a_partition_that_is_back_before_its_loss_was_told_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commit in between had sealed is in no later one: the offsets would pass updates that no mark counts."""
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        await send(machine, counts, "a", "c")
        await processed(running, 4)
        group = running.worker.group
        assert group is not None
        owned = group.assignment
        told = [frozenset[TopicPartition]()]
        with monkeypatch.context() as patch:

            async def refuse(*_: Any) -> None:
                # It is back at the next look: who opens the task anew finds it there.
                patch.setattr(type(group), "assignment", property(lambda _: told.pop() if told else owned))
                raise TaskMigratedError("the session is over")

            patch.setattr(group, "commit", refuse)
            committing = asyncio.ensure_future(machine.commit(running))

            def is_over() -> bool:
                machine.clock.advance(0.05)
                return committing.done()

            await until(is_over)
        assert not told
        await machine.settle()
        assert dict(counts.totals) == {"a": 2, "b": 1, "c": 1}
        await machine.crash(running)
        await machine.start()
        await machine.settle()
        assert dict(counts.totals) == {"a": 2, "b": 1, "c": 1}


CHANGELOG = TopicPartition("counts-totals-changelog", 0)


async def write_as_who_woke_up(machine: Machine, **values: int) -> None:
    """What a process had handed to its connection when it was stopped arrives when it wakes up."""
    builder = BatchBuilder(NONE, 10_000)
    for key, value in values.items():
        assert builder.append(machine.clock.now_ms(), key.encode(), value.to_bytes(8, "big", signed=True), [])
    async with machine.log.producer() as producer:
        await producer.enqueue(CHANGELOG, builder.seal())
        await producer.flush()


@pytest.mark.parametrize("when", ["before any", "between commits", "in a commit", "after the last"])
async def test_what_a_process_that_woke_up_writes_to_a_changelog_is_taken_back(
    when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever restores the table then finds what the owner had; nothing else would write the key again."""
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await restored(running)
        if when == "before any":
            await write_as_who_woke_up(machine, stale=99)
        await send(machine, counts, "a", "b", "b")
        await machine.settle()
        if when == "between commits":
            await write_as_who_woke_up(machine, a=77, stale=99)
        await send(machine, counts, "b")
        await processed(running, 4)
        if when == "in a commit":
            delivery: Any = running.worker._delivery
            enqueue = delivery._producer.enqueue

            async def late(tp: TopicPartition, batch: SealedBatch) -> Any:
                monkeypatch.undo()
                await write_as_who_woke_up(machine, a=77, stale=99)
                return await enqueue(tp, batch)

            monkeypatch.setattr(delivery._producer, "enqueue", late)
        await machine.settle()
        await send(machine, counts, "b")
        await machine.settle()
        if when == "after the last":
            await write_as_who_woke_up(machine, a=77, stale=99)
        assert dict(counts.totals) == {"a": 1, "b": 4}
        await machine.crash(running)
        await machine.start()  # what is in memory is gone: all of it is restored
        await machine.settle()
        assert dict(counts.totals) == {"a": 1, "b": 4}
        assert ("another process has written there" in caplog.text) == (when != "after the last")


async def test_a_commit_that_was_cancelled_counts_its_own_records_as_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts = Counts()
    async with Machine(counts.app, processing_guarantee=AT_LEAST_ONCE) as machine:
        running = await machine.start()
        await send(machine, counts, "a", "b")
        await machine.settle()
        for _ in range(2):
            await send(machine, counts, "a")
            with monkeypatch.context() as patch:
                await refuse_offsets(machine, running, patch)
                with anyio.move_on_after(0.2):
                    await machine.commit(running)
        await machine.settle()
        assert dict(counts.totals) == {"a": 3, "b": 1}
        assert "another process" not in caplog.text
