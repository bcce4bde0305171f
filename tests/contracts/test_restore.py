"""Restoring a task's tables from their changelogs: on every log, into RocksDB, whatever the log has become."""

import asyncio
import dataclasses
import logging
import re
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import pytest

import streamflow as sf
from streamflow.clock import SystemClock
from streamflow.error_groups import one_error
from streamflow.errors import StateCorruptedError, StateFullError, TopologyError
from streamflow.log.api import AtomicCommit, NewTopic
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import NONE
from streamflow.model.record import TopicPartition
from streamflow.runtime.changelogs import MIN_COMPACTION_LAG_MS, new_changelogs
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.local_state import LocalStates
from streamflow.runtime.outputs import Outputs
from streamflow.runtime.restore import Restorer
from streamflow.runtime.targets import KnownTargets
from streamflow.runtime.task_tables import TaskTables
from streamflow.sensors import Sensors
from streamflow.state.rocksdb import RocksStores
from streamflow.state.slots import claim
from tests.contracts.conftest import KAFKA
from tests.contracts.records import DEADLINE_S, until

DAY_MS = 86_400_000
Changes = Mapping[str, int | None]


class ShiftedClock(SystemClock):
    """The system's, with a calendar that a test moves."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.ahead_ms


class Counting(Sensors):
    def __init__(self) -> None:
        self.records = 0

    def restored(self, table: str, records: int) -> None:
        assert table == "totals"
        self.records += records


class Task:
    """One task with one table, its changelog written by the test itself, its store opened as a worker does."""

    def __init__(self, open_log, folder, **table) -> None:
        self.id = f"app-{uuid.uuid4().hex[:8]}"
        self.folder = folder
        self.clock = ShiftedClock()
        self.sensors = Counting()
        self._open_log = open_log
        self._stack = AsyncExitStack()
        self.declare(**table)

    def declare(self, value_type=int, **table) -> None:
        app = self.app = sf.App(self.id)
        source = app.topic(f"{self.id}-source", key_type=str, value_type=int)
        self.table = app.table("totals", key_type=str, value_type=value_type, **table)

        @app.agent(source, tables=[self.table])
        def add(_: int) -> None:
            """Nothing runs here."""

        self.topology = app.topology()
        (self.sub,) = self.topology.sub_topologies
        self.changelog = TopicPartition(self.table.changelog.name, 0)

    async def __aenter__(self) -> "Task":
        self.log = await self._stack.enter_async_context(self._open_log())
        self.stores = RocksStores(16 << 20)
        self._stack.callback(lambda: self.stores.close())
        self.slot = self._stack.enter_context(claim(str(self.folder), self.id))
        await self.log.admin.create([NewTopic(self.sub.topics[0], 1)])
        await self.make_changelog()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def make_changelog(self, **config: str) -> None:
        (new,) = new_changelogs(self.app, self.topology, {self.sub.topics[0]: 1}, {}, -1)
        await self.log.admin.create([dataclasses.replace(new, config={**new.config, **config})])

    def batch(self, changes: Changes, timestamp_ms: int | None = None):
        builder = BatchBuilder(NONE, 1 << 20)
        codecs = self.table.changelog
        for key, value in changes.items():
            data = None if value is None else codecs.value_codec.encode(value, ())
            at_ms = self.clock.now_ms() if timestamp_ms is None else timestamp_ms
            assert builder.append(at_ms, codecs.key_codec.encode(key, ()), data, [])
        return builder.seal()

    async def until_gone(self) -> None:
        """Wait until the changelog that was deleted is not there any more."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.log.admin.describe([self.changelog.topic]):
                await self.log.changed()

    async def make_changelog_anew(self, **config: str) -> None:
        await self.log.admin.delete([self.changelog.topic])
        await self.until_gone()
        await self.make_changelog(**config)

    async def until_written(self, end: int) -> None:
        """Wait until the changelog reaches an offset, open transactions included."""
        async with asyncio.timeout(DEADLINE_S):
            while (await self.log.admin.high_watermarks([self.changelog]))[self.changelog] < end:
                await self.log.changed()

    async def write(self, changes: Changes, timestamp_ms: int | None = None) -> int:
        """Append to the changelog; returns the offset after it."""
        async with self.log.producer() as producer:
            base = await (await producer.enqueue(self.changelog, self.batch(changes, timestamp_ms)))
        return base + len(changes)

    @asynccontextmanager
    async def opened(self):
        """The task's tables, not restored, and what restores them."""
        with one_error():
            async with self.log.reader("restore") as reader, anyio.create_task_group() as group:
                async with self._tables(reader, group) as found:
                    yield found
                group.cancel_scope.cancel()

    @asynccontextmanager
    async def _tables(self, reader, group):
        described = await self.log.admin.describe([self.sub.topics[0], self.changelog.topic])
        known = KnownTargets(self.log.admin, NONE)
        known.add_all(self.app, described)
        restorer = Restorer(reader, self.log.admin, self.clock, self.sensors)
        group.start_soon(restorer.run)
        states = LocalStates(self.app, described, self.stores, self.slot, restorer, 16 << 20, 1)
        local = await states.open(self.sub, 0, None)
        tables = TaskTables(
            local.tables,
            0,
            local.store,
            Outputs(known.targets, lambda: None),
            self.clock,
            local.live_entries,
            lambda *_: None,
            stale_after_ms=local.stale_after_ms,
            set_aside=local.set_aside,
            damaged=lambda: None,
        )
        try:
            yield tables, restorer
        finally:
            await tables.close()

    async def restore(self, mark: CommitMark | None = None, *, is_new: bool = False) -> "Restored":
        """Open, restore, and close cleanly."""
        before = self.sensors.records
        async with asyncio.timeout(DEADLINE_S), self.opened() as (tables, restorer):
            try:
                await restorer.restore(
                    "task-0", tables, mark or CommitMark("some"), is_new=is_new, filled=[], starts={}
                )
            except StateCorruptedError as error:
                tables.is_damaged(error)
                raise
            return Restored(self, tables, self.sensors.records - before)

    @property
    def aside(self) -> list[str]:
        """Why stores were set aside."""
        return sorted(path.name.rpartition("Z-")[2] for path in self.folder.glob("*/*/*.aside-*"))


class Restored:
    def __init__(self, task: Task, tables: TaskTables, records: int) -> None:
        overlay = tables.overlays["totals"]
        decode = task.table.changelog.value_codec.decode
        self.records = records
        self.values = {overlay.keys.decode(key): decode(data, ()) for key, data in overlay.entries(None, None)}
        self.stored = [overlay.keys.decode(key) for key, _ in tables.store.scan("totals")]
        self.position = tables.store.checkpoint.changelogs.get("totals", 0)
        self.positions = dict(tables.positions)
        self.dirty = dict(overlay.dirty)


@pytest.fixture
async def task(open_log, tmp_path):
    async with Task(open_log, tmp_path) as task:
        yield task


# --- what the log may be like ----------------------------------------------------------------------------------------


async def test_an_empty_changelog_is_an_empty_table(task):
    restored = await task.restore(is_new=True)
    assert (restored.values, restored.records) == ({}, 0)


async def test_the_last_value_of_each_key_is_restored_and_a_clean_restart_reads_nothing_again(task):
    await task.write({"a": 1, "b": 2, "c": 3})
    await task.write({"a": 10, "c": None})
    first = await task.restore()
    assert (first.values, first.records) == ({"a": 10, "b": 2}, 5)
    again = await task.restore()
    assert (again.values, again.records) == ({"a": 10, "b": 2}, 0)


async def test_only_what_came_since_is_read(task):
    await task.write({"a": 1, "b": 2})
    await task.restore()
    await task.write({"b": None, "c": 3})
    restored = await task.restore()
    assert (restored.values, restored.records) == ({"a": 1, "c": 3}, 2)
    assert task.aside == []


async def test_a_long_restore_says_how_far_it_is(task, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "streamflow")
    monkeypatch.setattr("streamflow.runtime.restore._TOLD_EVERY_S", -1.0)
    await task.write({"a": 1, "b": 2})
    await task.restore()
    assert re.search(r"task task-0: restoring, 2 records so far, 0 to go, [\d,]+/s", caplog.text)
    assert re.search(r"restored 2 records in \d+\.\d s \(\d+/s\): task-0 2$", caplog.text, re.MULTILINE)


async def test_a_kill_in_the_middle_of_a_restore_keeps_what_it_reached(task):
    """Each fetch is in the store with its position; only what was not is read again."""
    for number in range(12):  # several fetches of about a mebibyte
        await task.write({f"{number}-{'k' * 1000}-{each}": each for each in range(200)})
        await task.write({f"{number}-{'k' * 1000}-{each}": each for each in range(200, 400)})
    async with task.opened() as (tables, restorer):
        restore = partial(restorer.restore, is_new=False, filled=[], starts={})
        async with anyio.create_task_group() as group:  # as a worker cancels: a write under way is waited for
            group.start_soon(restore, "task-0", tables, CommitMark("some"))
            await until(lambda: tables.store.checkpoint.changelogs.get("totals"))
            group.cancel_scope.cancel()
    reached = tables.restoring.records
    assert 0 < reached < 4800
    restored = await task.restore()
    assert (len(restored.values), restored.records) == (4800, 4800 - reached)
    assert task.aside == []


async def test_small_batches_are_taken_together(task, monkeypatch):
    """Each write waits for the event loop: one for every few records takes for ever beside tasks that are at work."""
    async with task.log.producer() as producer:
        for number in range(200):
            await producer.enqueue(task.changelog, task.batch({f"k{number % 7}": number}))
        await producer.flush()
    writes = []
    async with task.opened() as (tables, restorer):
        write = tables.store.write
        monkeypatch.setattr(tables.store, "write", lambda batch: (writes.append(batch), write(batch)))
        await restorer.restore("task-0", tables, CommitMark("some"), is_new=False, filled=[], starts={})
        restored = Restored(task, tables, task.sensors.records)
    assert (sorted(restored.values.values()), restored.records) == (list(range(193, 200)), 200)
    assert sum("totals" in batch.changes for batch in writes) < 20


async def test_records_that_were_deleted_from_the_beginning_are_no_longer_there(task):
    """A changelog that retention has trimmed: what it still has is the table."""
    await task.make_changelog_anew(**{"cleanup.policy": "compact,delete"})
    await task.write({"a": 1, "b": 2})
    await task.write({"c": 3})
    await task.log.admin.delete_records({task.changelog: 2})
    restored = await task.restore()
    assert restored.values == {"c": 3}


async def test_a_store_that_reaches_less_far_than_the_log_begins_is_set_aside(task):
    await task.make_changelog_anew(**{"cleanup.policy": "compact,delete"})
    await task.write({"a": 1})
    await task.restore()
    await task.write({"b": 2, "c": 3})
    await task.log.admin.delete_records({task.changelog: 2})
    with pytest.raises(StateCorruptedError, match="begins at 2"):
        await task.restore()
    assert task.aside == ["behind"]
    assert (await task.restore()).values == {"c": 3}


async def test_a_store_that_reaches_further_than_the_log_is_set_aside(task):
    await task.write({"a": 1, "b": 2})
    async with task.opened() as (tables, _):
        tables.positions["totals"] = 100
        await tables.level()
    with pytest.raises(StateCorruptedError, match=re.escape(f"offset 100 of changelog {task.changelog}, which ends")):
        await task.restore()
    assert task.aside == ["ahead"]
    assert (await task.restore()).values == {"a": 1, "b": 2}


async def test_a_changelog_that_was_deleted_and_made_again_is_told_by_its_id(task, caplog):
    await task.write({"a": 1})
    await task.restore()
    await task.make_changelog_anew()
    await task.write({"b": 2})
    restored = await task.restore()
    assert restored.values == {"b": 2}
    assert task.aside == ["table"]
    assert "topic id" in caplog.text


async def test_a_store_that_was_away_for_long_and_is_behind_is_set_aside(task):
    """Its changelog keeps deletions for a week: after half of it some may be gone."""
    await task.write({"a": 1, "b": 2})
    await task.restore()
    task.clock.ahead_ms = 4 * DAY_MS
    assert (await task.restore()).records == 0  # level: nothing was deleted meanwhile
    task.clock.ahead_ms = 7 * DAY_MS
    await task.write({"b": 3})
    assert (await task.restore()).values == {"a": 1, "b": 3}  # three days are fine
    await task.write({"a": None})
    task.clock.ahead_ms = 11 * DAY_MS
    with pytest.raises(StateCorruptedError, match=r"4\.0 days ago"):
        await task.restore()
    assert task.aside == ["stale"]
    assert (await task.restore()).values == {"b": 3}


async def test_how_long_is_long_is_what_the_changelog_says(task):
    await task.make_changelog_anew(**{"delete.retention.ms": str(DAY_MS // 12)})
    await task.write({"a": 1})
    await task.restore()
    await task.write({"a": None})
    task.clock.ahead_ms = DAY_MS // 23
    with pytest.raises(StateCorruptedError, match="may have missed deletions"):
        await task.restore()


# --- what is not committed -------------------------------------------------------------------------------------------


async def test_keys_written_past_the_acknowledged_offset_are_taken_back(task, caplog):
    caplog.set_level(logging.INFO, "streamflow")
    end = await task.write({"a": 1, "b": 2})
    await task.write({"a": 100, "b": None, "c": 3})
    mark = CommitMark("some", {"totals": end})
    for _ in range(2):  # also when the worker is killed again before it has committed that
        restored = await task.restore(mark)
        assert restored.values == {"a": 1, "b": 2}
        assert restored.stored == ["a", "b"]
        assert set(restored.dirty) == {"a", "b", "c"}
        assert (restored.position, restored.positions) == (end, {"totals": end})
    assert "3 keys were written and not committed; taken back" in caplog.text


async def test_what_is_past_the_acknowledged_offset_and_old_may_be_all_there_is(task, caplog):
    """After `min.compaction.lag.ms` the committed value may be gone from the log; a store that has it still counts."""
    old_ms = task.clock.now_ms() - MIN_COMPACTION_LAG_MS - 60_000
    end = await task.write({"a": 1})
    mark = CommitMark("some", {"totals": end})
    await task.restore(mark)
    await task.write({"a": 100, "c": 3}, old_ms)
    restored = await task.restore(mark)
    assert restored.values == {"a": 1, "c": 3}
    assert "1 keys were written over a day ago and not committed" in caplog.text


async def test_a_table_that_the_mark_does_not_know_is_committed_as_it_is(task):
    await task.write({"a": 1})
    restored = await task.restore(CommitMark("some", {"another": 0}))
    assert (restored.values, restored.dirty) == ({"a": 1}, {})


async def test_state_without_committed_offsets_is_refused(task):
    await task.write({"a": 1})
    with pytest.raises(TopologyError, match=r"changelog records.*no committed offset.*streamflow reset"):
        await task.restore(is_new=True)


async def test_local_state_without_committed_offsets_is_refused(task):
    await task.write({"a": 1})
    await task.restore()
    with pytest.raises(TopologyError, match=r"local state of table 'totals'.*no committed offset"):
        await task.restore(is_new=True)


# --- the store -------------------------------------------------------------------------------------------------------


async def test_a_full_disk_is_waited_out(task, monkeypatch, caplog):
    await task.write({"a": 1})
    left = 2
    monkeypatch.setattr("streamflow.runtime.restore._RETRY_FULL_S", 0.01)
    async with task.opened() as (tables, restorer):
        write = tables.store.write

        def full(batch):
            nonlocal left
            if batch.changes and left:
                left -= 1
                raise StateFullError("no room")
            write(batch)

        monkeypatch.setattr(tables.store, "write", full)
        await restorer.restore("task-0", tables, CommitMark("some"), is_new=False, filled=[], starts={})
        assert Restored(task, tables, 1).values == {"a": 1}
    assert "restoring goes on when there is room" in caplog.text


async def test_damage_found_while_restoring_sets_the_store_aside(task, monkeypatch):
    await task.write({"a": 1})

    async with task.opened() as (tables, restorer):

        def damaged(_):
            raise StateCorruptedError("a block is damaged")

        monkeypatch.setattr(tables.store, "write", damaged)
        with pytest.raises(StateCorruptedError) as caught:
            await restorer.restore("task-0", tables, CommitMark("some"), is_new=False, filled=[], starts={})
        tables.is_damaged(caught.value)
    assert task.aside == ["damaged"]
    assert (await task.restore()).values == {"a": 1}


async def test_values_that_expire_keep_their_time_through_a_restore(open_log, tmp_path):
    async with Task(open_log, tmp_path, ttl_s=10) as task:
        await task.write({"a": 1}, 1_000)
        await task.write({"b": 2}, 5_000)
        assert (await task.restore()).values == {"a": 1, "b": 2}
        assert (await task.restore(CommitMark("some", None, {"totals": 12_000}))).values == {"b": 2}


# --- Kafka's transactions and cleaner --------------------------------------------------------------------------------

both_brokers = [pytest.param(kafka, marks=pytest.mark.kafka) for kafka in KAFKA]
only_kafka = pytest.mark.parametrize("open_log", both_brokers, indirect=True)
"""Transactions of version 2 and of version 1."""


@asynccontextmanager
async def open_transaction(task: Task, changes: Changes, monkeypatch):
    """A transaction over a changelog that has been written and not ended; yields what lets it end."""
    end = asyncio.Event()
    async with task.log.transactional_producer(f"{task.id}-id") as producer, asyncio.TaskGroup() as group:
        really_end = producer._end

        async def wait_and_end() -> None:
            await end.wait()
            await really_end()

        monkeypatch.setattr(producer, "_end", wait_and_end)
        before = (await task.log.admin.high_watermarks([task.changelog]))[task.changelog]
        group.create_task(producer.commit(AtomicCommit([(task.changelog, task.batch(changes))], {}, None)))
        await task.until_written(before + 1)
        yield end
        end.set()


@only_kafka
async def test_an_open_transaction_is_waited_out_as_it_may_be_committed(task, monkeypatch):
    await task.write({"a": 1})
    async with open_transaction(task, {"a": 2, "b": 3}, monkeypatch) as end:
        restore = asyncio.ensure_future(task.restore())
        await until(lambda: task.sensors.records == 1)
        await asyncio.sleep(0.2)
        assert not restore.done()
        end.set()
        restored = await restore
    assert (restored.values, restored.records) == ({"a": 2, "b": 3}, 3)
    assert (await task.restore()).records == 0


@only_kafka
async def test_records_of_aborted_transactions_are_passed_over(task, monkeypatch):
    await task.write({"a": 1})
    left_open = task.log.transactional_producer(f"{task.id}-id")
    async with left_open as producer:
        monkeypatch.setattr(producer, "_end", asyncio.Event().wait)
        with anyio.move_on_after(0.5):
            commit = asyncio.ensure_future(
                producer.commit(AtomicCommit([(task.changelog, task.batch({"a": 2, "b": 3}))], {}, None))
            )
            await asyncio.Event().wait()
        commit.cancel()
        async with task.log.transactional_producer(f"{task.id}-id"):  # its successor aborts
            restored = await task.restore()
    assert (restored.values, restored.records) == ({"a": 1}, 1)
    assert restored.position > 3  # the records, and the marker


@only_kafka
async def test_a_first_commit_that_was_aborted_is_no_state(task, monkeypatch):
    """Killed in its first transaction, a task has changelog records that nobody may see, and no offset."""
    async with task.log.transactional_producer(f"{task.id}-id") as producer:
        monkeypatch.setattr(producer, "_end", asyncio.Event().wait)
        commit = asyncio.ensure_future(
            producer.commit(AtomicCommit([(task.changelog, task.batch({"a": 2}))], {}, None))
        )
        await task.until_written(1)
        commit.cancel()
        async with task.log.transactional_producer(f"{task.id}-id"):
            for _ in range(2):
                restored = await task.restore(is_new=True)
                assert (restored.values, restored.records) == ({}, 0)


@only_kafka
async def test_a_compacted_changelog_has_holes_and_loses_no_key(task):
    await task.log.admin.delete([task.changelog.topic])
    await task.until_gone()
    quick = {"min.cleanable.dirty.ratio": "0.0", "segment.ms": "50", "min.compaction.lag.ms": "0"}
    await task.make_changelog(**quick)
    for number in range(10):
        await task.write({"a": number, "b": number, f"only-{number}": number})
        await asyncio.sleep(0.06)
    async with asyncio.timeout(DEADLINE_S):
        while (count := await records_of(task)) >= 20:
            await task.write({"a": 10})  # closes a segment
            await asyncio.sleep(0.1)
    restored = await task.restore()
    assert restored.values == {"a": restored.values["a"], "b": 9, **{f"only-{number}": number for number in range(10)}}
    assert restored.records <= count + 1


async def records_of(task: Task) -> int:
    found = 0
    end = (await task.log.admin.high_watermarks([task.changelog]))[task.changelog]
    async with task.log.reader("look") as reader:
        reader.add(task.changelog, 0)
        position = 0
        while position < end:
            reader.ask(task.changelog)
            for fetched in await reader.receive():
                found += sum(1 for batch in fetched.batches for _ in batch.open())
                position = fetched.next_offset
    return found
