"""Tables whose local state turns out damaged, or cannot be written, while the app runs."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

import streamflow as sf
from streamflow.errors import (
    FatalError,
    ProcessingError,
    StateCorruptedError,
    StateError,
    StateFullError,
    TopologyError,
)
from streamflow.model.record import TopicPartition
from streamflow.runtime.restore import Restorer
from streamflow.state.memory import MemoryStore
from streamflow.state.store import StoreBatch
from tests.runtime.machine import Machine
from tests.runtime.waiting import until

GUARANTEES = ["exactly_once", "at_least_once"]


class Faults:
    """What the stores of this test make of reads and writes."""

    def __init__(self) -> None:
        self.damaged_reads = 0
        self.damaged_writes = 0
        self.full_writes = 0
        self.reads = 0

    def read(self) -> None:
        self.reads += 1
        if self.damaged_reads:
            self.damaged_reads -= 1
            raise StateCorruptedError("a block is damaged")

    def write(self, batch: StoreBatch) -> None:
        if self.damaged_writes and batch.changes:
            self.damaged_writes -= 1
            raise StateCorruptedError("a file is damaged")
        if self.full_writes and batch.changes:
            self.full_writes -= 1
            raise StateFullError("no room")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()
    getter, write = MemoryStore.getter, MemoryStore.write

    def faulty_getter(store: MemoryStore, table: str) -> Callable[[bytes], bytes | None]:
        get = getter(store, table)

        def faulty(key: bytes) -> bytes | None:
            faults.read()
            return get(key)

        return faulty

    def faulty_write(store: MemoryStore, batch: StoreBatch) -> None:
        faults.write(batch)
        write(store, batch)

    monkeypatch.setattr(MemoryStore, "getter", faulty_getter)
    monkeypatch.setattr(MemoryStore, "write", faulty_write)
    return faults


class Summing:
    """An app that sums by key, and may swallow what the table raises."""

    def __init__(self, *, swallows: bool = False, on_error: Any = None, **table: Any) -> None:
        app = self.app = sf.App("sums")
        numbers = self.numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
        sums = self.sums = app.topic("sums", key_type=str, value_type=int, partitions=1)
        self.totals = totals = app.table("totals", key_type=str, value_type=int, default=int, **table)
        options = {} if on_error is None else {"on_error": on_error}

        @app.agent(numbers, sink=sums, tables=[totals], **options)
        async def add(stream: sf.Stream[int]) -> Any:
            async for key, number in stream.items():
                try:
                    totals[key] += number
                except StateCorruptedError:
                    if not swallows:
                        raise
                    totals[key] = number
                yield totals[key]

    async def send(self, machine: Machine, count: int) -> None:
        for number in range(count):
            await machine.send(self.numbers, 1, key=f"k{number % 3}")


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("swallows", [False, True], ids=["raises", "swallowed"])
@pytest.mark.parametrize("policy", [None, sf.Skip()], ids=["stop", "skip"])
async def test_damage_found_by_an_agent_rebuilds_its_task_and_no_record_is_lost(
    faults: Faults, guarantee: str, swallows: bool, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    summing = Summing(swallows=swallows, on_error=policy)
    async with Machine(summing.app, processing_guarantee=guarantee) as machine:
        first = await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        await machine.stop(first)
        running = await machine.start()
        faults.damaged_reads = 1
        await summing.send(machine, 9)
        await machine.settle()
        assert faults.damaged_reads == 0
        assert dict(summing.totals) == {"k0": 6, "k1": 6, "k2": 6}
        assert [event.value for event in machine.records(summing.sums) if event.key == "k0"] == [1, 2, 3, 4, 5, 6]
        assert running.error is None
    assert "its local state is rebuilt from the log" in caplog.text
    assert "a block is damaged" in caplog.text


async def test_damage_found_by_a_reader_outside_rebuilds_the_task(faults: Faults) -> None:
    summing = Summing()
    async with Machine(summing.app) as machine:
        await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        await machine.stop(machine.workers[0])
        running = await machine.start()
        faults.damaged_reads = 1
        with pytest.raises(StateCorruptedError):
            summing.totals.get("k0")
        task = running.tasks["numbers-0"]
        await until(lambda: running.tasks.get("numbers-0") not in (None, task))
        await until(lambda: running.tasks["numbers-0"].state == "running")
        assert summing.totals["k0"] == 3


async def test_damage_found_while_writing_rebuilds_the_task(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.runtime.task_tables._STORE_FROM_ENTRIES", 1)
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        task = running.tasks["numbers-0"]
        faults.damaged_writes = 1
        await summing.send(machine, 9)
        await machine.settle()
        await until(lambda: running.tasks.get("numbers-0") not in (None, task))
        await summing.send(machine, 9)
        await machine.settle()
        assert dict(summing.totals) == {"k0": 6, "k1": 6, "k2": 6}


async def test_damage_found_while_restoring_rebuilds_the_task(faults: Faults) -> None:
    summing = Summing()
    async with Machine(summing.app) as machine:
        await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        await machine.stop(machine.workers[0])
        faults.damaged_writes = 2
        await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        assert faults.damaged_writes == 0
        assert dict(summing.totals) == {"k0": 6, "k1": 6, "k2": 6}


async def test_damage_found_by_on_recover_rebuilds_the_task(faults: Faults) -> None:
    told: list[int | None] = []

    def look(_: int) -> None:
        told.append(summing.totals.get("k0"))

    summing = Summing(on_recover=look)
    async with Machine(summing.app) as machine:
        await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        await machine.stop(machine.workers[0])
        faults.damaged_reads = 1
        running = await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        assert told == [None, 3]
        assert dict(summing.totals) == {"k0": 6, "k1": 6, "k2": 6}
        assert running.error is None


async def test_damage_found_as_the_worker_stops_sets_the_store_aside(
    faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        faults.damaged_writes = 1
        await machine.stop(running)
        assert "a file is damaged. It was dropped from memory" in caplog.text
        await machine.start()
        await summing.send(machine, 3)
        await machine.settle()
        assert dict(summing.totals) == {"k0": 4, "k1": 4, "k2": 4}


async def test_a_store_that_is_damaged_again_and_again_stops_the_worker(faults: Faults) -> None:
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        faults.damaged_reads = 100
        await summing.send(machine, 1)
        with anyio.fail_after(10):
            await running.ended.wait()
        assert isinstance(running.error, FatalError)
        assert "rebuilt 3 times within 10 minutes" in str(running.error)
        assert "Check the disk" in str(running.error)
        machine.workers.clear()


@pytest.mark.parametrize("when", ["commit", "closed", "starts"])
async def test_a_damaged_task_that_is_lost_before_it_is_open_again_stays_closed(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partitions are another worker's by then; the loss itself is acted on after this."""
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        await summing.send(machine, 3)
        await machine.settle()
        manager: Any = running.worker.manager
        task = running.tasks["numbers-0"]
        group, calls = manager._group, []

        def then_lost(name: str, owner: Any, method: str) -> None:
            call = getattr(owner, method)

            async def done(*arguments: Any) -> Any:
                found = await call(*arguments)
                if name == when:
                    calls.append(name)
                    manager._group = Lost(group)
                return found

            monkeypatch.setattr(owner, method, done)

        then_lost("commit", manager._delivery, "commit")
        then_lost("closed", manager, "_close")
        then_lost("starts", manager._starts, "of")
        task.tables.damage = StateCorruptedError("a block is damaged")
        await manager.rebuild(task)
        assert calls == [when]
        assert running.tasks == {}
        manager._group = group
        monkeypatch.undo()


class Lost:
    """A group whose partitions have gone."""

    assignment: frozenset[TopicPartition] = frozenset()

    def __init__(self, group: Any) -> None:
        self.committed = group.committed


def adding(name: str, partitions: int) -> tuple[sf.App, list[set[sf.TopicPartition]]]:
    """An app with a table, and what it was told that it lost."""
    app = sf.App(name)
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=partitions)
    totals = app.table("totals", key_type=str, value_type=int, default=int)
    revoked: list[set[sf.TopicPartition]] = []

    @app.agent(numbers, tables=[totals])
    async def add(number: int) -> None:
        totals["a"] += number

    @app.on_revoked
    async def note(partitions: set[sf.TopicPartition]) -> None:
        revoked.append(partitions)

    return app, revoked


async def test_a_store_that_cannot_be_closed_keeps_no_other_open_and_no_hook_from_being_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, revoked = adding("closing", partitions=3)
    closed: list[int] = []
    close = MemoryStore.close

    def refuses_once(store: MemoryStore) -> None:
        if store.identity.partition not in closed:
            closed.append(store.identity.partition)
            if len(closed) == 1:
                raise StateError("a file cannot be closed")
        close(store)

    monkeypatch.setattr(MemoryStore, "close", refuses_once)
    async with Machine(app) as machine:
        running = await machine.start()
        await until(lambda: len(running.tasks) == 3)
        manager: Any = running.worker.manager
        await manager._close(manager.running(), frozenset(manager._by_tp))
        assert sorted(closed) == [0, 1, 2]
        assert revoked == [{sf.TopicPartition("numbers", number) for number in range(3)}]
        with pytest.raises(StateError, match="a file cannot be closed"):
            await machine.ended(running)


async def test_a_stop_closes_all_stores_though_that_takes_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    app, revoked = adding("many", partitions=5)
    close = MemoryStore.close

    def takes_its_time(store: MemoryStore) -> None:
        time.sleep(0.3)
        close(store)

    async with Machine(app) as machine:
        running = await machine.start()
        tasks = list(running.tasks.values())
        assert len(tasks) == 5
        monkeypatch.setattr(MemoryStore, "close", takes_its_time)
        await machine.stop(running)
        assert all(task.tables.left_at is not None for task in tasks)
        assert revoked == [{sf.TopicPartition("numbers", number) for number in range(5)}]


async def test_a_disk_that_stays_full_holds_the_input_back_and_loses_nothing(
    faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamflow.runtime.task_tables._STORE_FROM_ENTRIES", 1)
    monkeypatch.setattr("streamflow.runtime.task_tables._MAX_UNSTORED", 5)
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        faults.full_writes = 1_000_000
        for number in range(40):
            await machine.send(summing.numbers, 1, key=f"k{number}")
        task = running.tasks["numbers-0"]

        async def is_backed_up() -> bool:
            return bool(task.tables.is_backed_up)

        await machine.until(is_backed_up)
        await until(lambda: "until there is room" in caplog.text)
        for number in range(40, 80):
            await machine.send(summing.numbers, 1, key=f"k{number}")
        await anyio.sleep(0.05)
        held = task.positions()[sf.TopicPartition("numbers", 0)]
        await anyio.sleep(0.1)
        assert task.positions()[sf.TopicPartition("numbers", 0)] == held < 80
        faults.full_writes = 0
        await machine.settle()
        assert dict(summing.totals) == {f"k{number}": 1 for number in range(80)}


# --- where a task starts ---------------------------------------------------------------------------------------------


async def test_input_that_was_deleted_unread_is_refused_where_tables_stand_for_it() -> None:
    summing = Summing()
    async with Machine(summing.app) as machine:
        running = await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        await machine.stop(running)
        await summing.send(machine, 9)
        await machine.log.admin.delete_records({sf.TopicPartition("numbers", 0): 12})
        running = await machine.start()
        with anyio.fail_after(10):
            await running.ended.wait()
        machine.workers.clear()
        assert isinstance(running.error, TopologyError)
        text = str(running.error)
        assert "numbers-0: offset 9 is outside the log, which holds 12..18: 3 records were deleted" in text
        assert "tables totals" in text
        assert "commit offset 12 to go on without them" in text
        assert "streamflow reset" in text


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_a_task_without_offsets_whose_table_has_values_is_refused(guarantee: str) -> None:
    summing = Summing()
    async with Machine(summing.app, processing_guarantee=guarantee) as machine:
        running = await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        await machine.stop(running)
        other = Summing()
        other.app.id = "renamed"  # its group is another one, its changelog the same
        async with Machine(other.app, processing_guarantee=guarantee) as renamed:
            renamed.settings = machine.settings
            running = await renamed.start()
            with anyio.fail_after(10):
                await running.ended.wait()
            renamed.workers.clear()
        assert isinstance(running.error, TopologyError)
        assert "no committed offset that says which input they stand for" in str(running.error)


# --- values of another type ------------------------------------------------------------------------------------------


class First(msgspec.Struct):
    name: str


class WithDefault(msgspec.Struct):
    name: str
    count: int = 7


class WithoutDefault(msgspec.Struct):
    name: str
    count: int


def things_app(value_type: Any, seen: list[Any], policy: Any = None) -> tuple[sf.App, Any, Any]:
    app = sf.App("typed")
    keys = app.topic("keys", key_type=str, value_type=str, partitions=1)
    things = app.table("things", key_type=str, value_type=value_type)

    @app.agent(keys, tables=[things], on_error=policy or sf.Stop())
    async def touch(stream: sf.Stream[str]) -> None:
        async for key in stream:
            if value_type is First:
                things[key] = First(key)
            else:
                seen.append(things[key])

    return app, keys, things


async def after_a_change_of_type(value_type: Any, policy: Any = None) -> tuple[list[Any], Exception | None]:
    """What an agent reads of a value that was written as `First`, and what stopped its worker."""
    seen: list[Any] = []
    app, keys, _ = things_app(First, seen)
    async with Machine(app) as machine:
        await machine.send(keys, "a", key="a")
        running = await machine.start()
        await machine.settle()
        await machine.stop(running)
        changed, _, things = things_app(value_type, seen, policy)
        running = await machine.start(app=changed)
        await machine.send(keys, "a", key="a")
        await until(lambda: running.ended.is_set() or seen or policy is not None)
        if not running.ended.is_set():
            await machine.settle()
            with pytest.raises(StateError, match="of the key 'a'") if policy else nullcontext():
                assert things["a"] == seen[0]
            with pytest.raises(StateError, match="of the key 'a'") if policy else nullcontext():
                assert list(things.values()) == seen
        else:
            machine.workers.clear()
    return seen, running.error


async def test_old_values_that_still_decode_are_read() -> None:
    assert await after_a_change_of_type(WithDefault) == ([WithDefault("a", 7)], None)


async def test_an_old_value_that_does_not_decode_names_table_key_and_way_out() -> None:
    seen, error = await after_a_change_of_type(WithoutDefault)
    assert seen == []
    assert isinstance(error, ProcessingError)
    assert "table 'things': the stored value of the key 'a' does not decode as its type of today" in str(error)
    assert "count" in str(error)
    assert "defaults for new fields" in str(error)
    assert error.position == "keys-0-1"


async def test_an_old_value_that_does_not_decode_goes_the_way_of_on_error() -> None:
    assert await after_a_change_of_type(WithoutDefault, sf.Skip()) == ([], None)


# --- on_recover ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_on_recover_is_told_of_each_partition_before_its_agents_run(is_async: bool) -> None:
    told: list[Any] = []

    def note(partition: int) -> None:
        told.append((partition, dict(summing.totals)))

    async def note_async(partition: int) -> None:
        await anyio.lowlevel.checkpoint()
        note(partition)

    summing = Summing(on_recover=note_async if is_async else note)
    async with Machine(summing.app) as machine:
        running = await machine.start()
        await summing.send(machine, 9)
        await machine.settle()
        await machine.stop(running)
        await summing.send(machine, 1)
        await machine.start()
        await machine.settle()
    assert told == [(0, {}), (0, {"k0": 3, "k1": 3, "k2": 3})]


async def test_an_on_recover_that_raises_stops_the_worker_and_names_the_table() -> None:
    def fail(partition: int) -> None:
        raise ValueError(f"nothing for {partition}")

    summing = Summing(on_recover=fail)
    async with Machine(summing.app) as machine:
        running = await machine.start()
        with anyio.fail_after(10):
            await running.ended.wait()
        machine.workers.clear()
    assert isinstance(running.error, FatalError)
    assert "on_recover of table 'totals'" in str(running.error)
    assert "ValueError: nothing for 0" in str(running.error)


# --- beside running tasks --------------------------------------------------------------------------------------------


def two_partitions(**table: Any) -> tuple[sf.App, Any, Any]:
    app = sf.App("beside")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=2, partitioner=lambda key, _: key[0] % 2)
    totals = app.table("totals", key_type=str, value_type=int, default=int, **table)

    @app.agent(numbers, tables=[totals])
    async def add(stream: sf.Stream[int]) -> None:
        async for key, number in stream.items():
            totals[key] += number

    return app, numbers, totals


async def test_a_task_is_restored_beside_running_ones_and_the_worker_says_how_far_it_is() -> None:
    go = anyio.Event()

    async def wait(partition: int) -> None:
        if partition == 1:
            await go.wait()

    app, numbers, totals = two_partitions(on_recover=wait)
    async with Machine(app) as machine:
        running = machine.launch()
        await until(lambda: len(running.tasks) == 2)
        zero, one = running.tasks["numbers-0"], running.tasks["numbers-1"]
        await until(lambda: zero.state == "running" and one.state == "restoring")
        await machine.send(numbers, 1, key="b")  # 98: partition 0
        await machine.send(numbers, 1, key="a")
        await until(lambda: zero.positions()[sf.TopicPartition("numbers", 0)] == 1)
        await machine.commit(running)
        await until(lambda: "to go" in running.worker.status().busy)  # before that it is not known how much
        status = running.worker.status()
        assert not status.ready
        assert status.busy == "restoring task numbers-1: 0 records so far, 0 to go, 0/s"
        assert [task.restoring is not None for task in status.tasks] == [False, True]
        assert one.positions()[sf.TopicPartition("numbers", 1)] == 0
        go.set()
        await machine.settle()
        assert running.worker.status().ready
        assert dict(totals) == {"a": 1, "b": 1}


async def test_while_the_log_has_not_said_how_much_there_is_to_restore_nothing_is_said_to_be_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go, asked = anyio.Event(), anyio.Event()
    spans = Restorer._spans

    async def slow(*args: Any, **options: Any) -> Any:
        asked.set()
        await go.wait()
        return await spans(*args, **options)

    monkeypatch.setattr(Restorer, "_spans", slow)
    app, _, _ = two_partitions()
    async with Machine(app) as machine:
        running = machine.launch()
        with anyio.fail_after(5):
            await asked.wait()
        status = running.worker.status()
        assert ": it is not known yet how many records" in status.busy
        assert {task.restoring.remaining for task in status.tasks if task.restoring is not None} == {None}
        go.set()
        await until(lambda: running.worker.status().ready)


async def test_a_worker_that_is_stopped_while_it_restores_stops_at_once_and_cleanly() -> None:
    async def wait(_: int) -> None:
        await anyio.sleep_forever()

    app, _, _ = two_partitions(on_recover=wait)
    async with Machine(app) as machine:
        running = machine.launch()
        await until(lambda: {task.state for task in running.tasks.values()} == {"restoring"})
        with anyio.fail_after(4):
            await machine.stop(running)


async def test_partitions_added_to_a_source_of_tables_are_refused_with_the_choices() -> None:
    app, _, _ = two_partitions()
    async with Machine(app) as machine:
        running = await machine.start()
        manager = running.worker.manager
        assert manager is not None
        manager._tell_of_new([sf.TopicPartition("numbers", 2)])
        with anyio.fail_after(10):
            await running.ended.wait()
        machine.workers.clear()
        assert isinstance(running.error, TopologyError)
        assert "'numbers' has 3 partitions or more, and had 2 when the tables totals" in str(running.error)
        assert "streamflow reset" in str(running.error)
