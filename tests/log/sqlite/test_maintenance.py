"""Retention and compaction, in time that the test moves."""

import asyncio
import os
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.clock import SystemClock, VirtualClock
from streamflow.errors import ConfigurationError, LogUnavailableError
from streamflow.log import codec
from streamflow.log.api import NewTopic
from streamflow.log.batch import BatchBuilder
from streamflow.log.sqlite import compaction
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.record import TopicPartition
from tests.contracts.records import batch, numbered, read_to, values

DAY_S = 86_400
TP = TopicPartition("t", 0)
COMPACT = {"cleanup.policy": "compact"}


def keyed(pairs, compression=codec.NONE):
    builder = BatchBuilder(compression, 1_000_000)
    for key, value in pairs:
        assert builder.append(1, key, value, [("h", b"x")])
    return builder.seal()


async def everything(log):
    start, end = (await log.admin.start_offsets([TP]))[TP], (await log.admin.end_offsets([TP]))[TP]
    async with log.reader("all") as reader:
        reader.add(TP, start)
        return await read_to(reader, TP, end) if end > start else []


async def write(log, *batches):
    async with log.producer() as producer:
        for one in batches:
            await (await producer.enqueue(TP, one))


# --- retention -------------------------------------------------------------------------------------------------------


async def test_without_configuration_everything_is_kept(memory, clock):
    await memory.admin.create([NewTopic("t", 1)])
    await write(memory, numbered(range(3)))
    clock.advance(1000 * DAY_S)
    assert await memory.maintain()
    assert len(await everything(memory)) == 3


async def test_old_batches_go_by_their_newest_record(memory, clock):
    await memory.admin.create([NewTopic("t", 1, config={"retention.ms": "60000"})])
    now = clock.now_ms()
    stamps = [now - 100_000, now - 70_000, now, now - 80_000]
    await write(memory, *(batch(b"%d" % number, timestamp_ms=stamp) for number, stamp in enumerate(stamps)))
    await memory.maintain()
    assert values(await everything(memory)) == [b"2", b"3"]  # never past one that stays
    assert await memory.admin.start_offsets([TP]) == {TP: 2}
    clock.advance(61)
    await memory.maintain()
    assert await memory.admin.start_offsets([TP]) == await memory.admin.end_offsets([TP]) == {TP: 4}
    await write(memory, batch(b"next", timestamp_ms=clock.now_ms()))
    assert [record.offset for record in await everything(memory)] == [4]


async def test_a_partition_is_kept_at_its_size(memory):
    one = batch(bytes(1000))
    await memory.admin.create([NewTopic("t", 1, config={"retention.bytes": str(one.size_bytes * 10)})])
    await write(memory, *[one] * 200)
    await memory.maintain()
    assert [record.offset for record in await everything(memory)] == list(range(190, 200))


# --- compaction ------------------------------------------------------------------------------------------------------


async def test_the_newest_record_of_each_key_stays_at_its_offset(memory):
    await memory.admin.create([NewTopic("t", 1, config=COMPACT)])
    await write(memory, keyed([(b"a", b"1"), (b"b", b"1"), (b"a", b"2")]), keyed([(b"c", b"1"), (b"a", b"3")]))
    await memory.maintain()
    found = await everything(memory)
    assert [(r.offset, r.key, r.value, r.headers) for r in found] == [
        (1, b"b", b"1", [("h", b"x")]),
        (3, b"c", b"1", [("h", b"x")]),
        (4, b"a", b"3", [("h", b"x")]),
    ]
    assert await memory.admin.end_offsets([TP]) == {TP: 5}
    await write(memory, keyed([(b"d", b"1")]))
    assert [r.offset for r in await everything(memory)] == [1, 3, 4, 5]


async def test_a_reader_passes_over_what_compaction_took(memory, clock):
    await memory.admin.create([NewTopic("t", 1, config=COMPACT | {"delete.retention.ms": "1000"})])
    await write(memory, keyed([(b"a", b"1")]), keyed([(b"a", None)]))
    await memory.maintain()
    clock.advance(2)
    await memory.maintain()
    assert await everything(memory) == []
    async with memory.reader("r") as reader:
        for position in range(2):
            reader.add(TP, position)
            reader.ask(TP)
            (fetched,) = await reader.receive()
            assert (fetched.batches, fetched.next_offset, fetched.end_offset) == ([], 2, 2)


async def test_tombstones_stay_for_their_time_and_then_go(memory, clock):
    await memory.admin.create([NewTopic("t", 1, config=COMPACT | {"delete.retention.ms": "60000"})])
    await write(memory, keyed([(b"a", b"1"), (b"b", b"1")]), keyed([(b"a", None)]))
    for _ in range(3):
        await memory.maintain()
        assert [(r.key, r.value) for r in await everything(memory)] == [(b"b", b"1"), (b"a", None)]
        clock.advance(19)
    clock.advance(10)
    await memory.maintain()
    assert [(r.key, r.value) for r in await everything(memory)] == [(b"b", b"1")]


async def test_young_records_are_left_alone(memory, clock):
    await memory.admin.create([NewTopic("t", 1, config=COMPACT | {"min.compaction.lag.ms": "60000"})])
    await write(memory, keyed([(b"a", b"1")]), keyed([(b"a", b"2")]))
    clock.advance(50)
    await memory.maintain()
    assert len(await everything(memory)) == 2
    await write(memory, keyed([(b"a", b"3")]))
    clock.advance(20)
    await memory.maintain()
    assert values(await everything(memory)) == [b"2", b"3"]


async def test_small_batches_are_merged_and_a_clean_partition_is_left_alone(log):
    await log.admin.create([NewTopic("t", 1, config=COMPACT)])
    async with log.producer() as producer:
        for number in range(2000):
            await producer.enqueue(TP, keyed([(b"%d" % (number % 1500), b"x" * 10)]))
        await producer.flush()
    await log.maintain()
    async with log.reader("r") as reader:
        reader.add(TP, 0)
        reader.ask(TP)
        (fetched,) = await reader.receive()
        assert len(fetched.batches) <= 10
        assert [r.offset for one in fetched.batches for r in one.open()] == list(range(500, 2000))
        await log.maintain()
        reader.remove(TP)
        reader.add(TP, 700)
        assert [r.offset for r in await read_to(reader, TP, 2000)] == list(range(700, 2000))


async def test_records_without_a_key_stay(memory):
    await memory.admin.create([NewTopic("t", 1, config=COMPACT)])
    await write(memory, batch(b"1", b"2"), batch(b"3"))
    await memory.maintain()
    assert values(await everything(memory)) == [b"1", b"2", b"3"]


KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
BATCHES = st.lists(st.tuples(KEYS, st.one_of(st.none(), st.binary(max_size=3))), min_size=1, max_size=6)
STEPS = st.lists(
    st.one_of(BATCHES, st.just("maintain"), st.integers(1, 40), st.tuples(st.just("purge"), st.integers(0, 30))),
    max_size=25,
)


@given(STEPS, st.integers(1, 4), st.sampled_from([codec.NONE, codec.ZSTD, codec.GZIP]))
def test_a_compacted_log_reads_as_the_same_table(steps, most_keys, compression):
    """Whatever is written, purged and compacted: offsets grow, nothing comes back, and the table stays the same."""
    asyncio.run(check_compaction(steps, most_keys, compression))


def table(records):
    """What a table restored from the records holds."""
    found = {}
    for key, value in records:
        found.pop(key, None)
        if value is not None:
            found[key] = value
    return found


async def check_compaction(steps, most_keys, compression):
    clock, history, purged = VirtualClock(), [], 0
    config = COMPACT | {"delete.retention.ms": "30000", "min.compaction.lag.ms": "5000"}
    saved, compaction.MOST_KEYS = compaction.MOST_KEYS, most_keys
    try:
        async with SqliteLog.in_memory("property", clock=clock) as log:
            await log.admin.create([NewTopic("t", 1, config=config)])
            for step in [*steps, 100, "maintain", "maintain", 100, "maintain"]:
                if step == "maintain":
                    await log.maintain()
                elif isinstance(step, int):
                    clock.advance(step)
                elif isinstance(step, tuple):
                    purged = max(purged, min(step[1], len(history)))
                    await log.admin.delete_records({TP: purged})
                else:
                    await write(log, keyed(step, compression))
                    history += step
                found = await everything(log)
                offsets = [record.offset for record in found]
                assert offsets == sorted(set(offsets))
                assert all((r.key, r.value) == history[r.offset] and r.offset >= purged for r in found)
                assert table((r.key, r.value) for r in found) == table(history[purged:])
    finally:
        compaction.MOST_KEYS = saved


async def test_compaction_beside_readers_and_writers_loses_nothing(log):
    await log.admin.create([NewTopic("t", 1, config=COMPACT | {"min.cleanable.dirty.ratio": "0"})])
    newest, seen, done = {}, {}, asyncio.Event()

    async def write_all():
        async with log.producer() as producer:
            for number in range(600):
                pairs = [(b"%d" % ((number * 7 + i) % 50), b"%d" % number) for i in range(5)]
                newest.update(pairs)
                await (await producer.enqueue(TP, keyed(pairs)))
        done.set()

    async def compact():
        while not done.is_set():
            await log.maintain()
            await asyncio.sleep(0.001)

    async def read_all():
        async with log.reader("r") as reader:
            reader.add(TP, 0)
            for record in await read_to(reader, TP, 3000):
                seen[record.key] = record.value

    await asyncio.gather(write_all(), compact(), read_all())
    assert seen == newest
    assert {record.key: record.value for record in await everything(log)} == newest


# --- the one that does it ---------------------------------------------------------------------------------------------


async def test_one_process_holds_the_lease_until_it_closes(path):
    async with SqliteLog.at_path(path, clock=SystemClock()) as other:
        async with SqliteLog.at_path(path, clock=SystemClock()) as holder:
            assert await holder.maintain()
            assert await holder.maintain()
            assert not await other.maintain()
        assert await other.maintain()


async def test_without_a_place_for_the_lease_there_is_no_maintenance_here(path):
    async with SqliteLog.at_path(path, clock=SystemClock()) as log:
        lease = f"{path}-maintenance"
        os.mkdir(lease)
        assert not await log.maintain()
        os.rmdir(lease)
        assert await log.maintain()


async def test_maintenance_runs_by_itself(memory, clock):
    await memory.admin.create([NewTopic("t", 1, config={"retention.ms": "1000"})])
    await write(memory, batch(b"old", timestamp_ms=0))
    clock.advance(31)
    for _ in range(20):
        await asyncio.sleep(0)
    assert await memory.admin.start_offsets([TP]) == {TP: 1}


async def test_deleted_topics_leave_nothing(log, path):
    await log.admin.create([NewTopic("t", 3)])
    async with log.producer() as producer:
        for number in range(600):
            await producer.enqueue(TopicPartition("t", number % 3), batch(bytes(5000)))
    await log.admin.delete(["t"])
    for table in ("topics", "partitions", "batches"):
        count = await log._database.reader.read(
            lambda sql, table=table: sql.execute(f"SELECT count(*) FROM {table}").fetchone()
        )
        assert count == (0,)


async def test_the_write_ahead_log_stays_small_also_beside_a_reader(log, path):
    await log.admin.create([NewTopic("t", 1)])
    one, largest = batch(bytes(500_000)), 0
    async with log.producer() as producer, log.reader("r") as reader:
        reader.add(TP, 0)
        for number in range(200):
            await (await producer.enqueue(TP, one))
            if number % 10 == 0:
                await read_to(reader, TP, number + 1)
            largest = max(largest, os.stat(path + "-wal").st_size)
    assert largest < 40_000_000
    assert os.stat(path).st_size > 50_000_000


async def test_only_under_the_write_lock_is_the_write_ahead_log_copied(log, path):
    """SQLite before 3.51.3 may lose a commit that races with a checkpoint, so that the two are kept apart."""
    for runner in (log._database.writer, log._database.reader, await log._database.lane("extra")):
        assert await runner.read(lambda sql: sql.execute("PRAGMA wal_autocheckpoint").fetchone()) == (0,)
    await runner.aclose()
    await log.admin.create([NewTopic("t", 1)])
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LogUnavailableError):
            await log._database.writer.checkpoint()
        other.execute("ROLLBACK")
        await log._database.writer.checkpoint()
        assert other.execute("PRAGMA wal_checkpoint").fetchone()[1:] in {(n, n) for n in range(1000)}
    finally:
        other.close()


@pytest.mark.parametrize(
    "config",
    [
        {"retention.ms": "soon"},
        {"cleanup.policy": "shrink"},
        {"max.message.bytes": "-1"},
        {"min.compaction.lag.ms": "-5"},
        {"min.cleanable.dirty.ratio": "2"},
    ],
)
async def test_a_configuration_that_means_nothing_is_refused(memory, config):
    with pytest.raises(ConfigurationError, match=next(iter(config))):
        await memory.admin.create([NewTopic("t", 1, config=config)])


# --- the size of the file ---------------------------------------------------------------------------------------------


async def test_a_retention_run_gives_room_back_to_the_disk_beside_a_writer(path):
    clock = VirtualClock()
    async with SqliteLog.at_path(path, clock=clock) as log:
        await log.admin.create([NewTopic("t", 1, config={"retention.ms": "1000"}), NewTopic("u", 1)])
        for _ in range(150):
            await write(log, batch(bytes(500_000), timestamp_ms=clock.now_ms()))
        await log._database.writer.checkpoint()
        full = os.stat(path).st_size
        assert full > 70_000_000
        clock.advance(2)

        async def write_on():
            async with log.producer() as producer:
                for number in range(50):
                    await (await producer.enqueue(TopicPartition("u", 0), numbered([number])))

        await asyncio.gather(log.maintain(), write_on())
        await log.maintain()
        assert os.stat(path).st_size < 20_000_000  # 16 MiB stay for the next batches
        async with log.reader("r") as reader:
            reader.add(TopicPartition("u", 0), 0)
            assert len(await read_to(reader, TopicPartition("u", 0), 50)) == 50
        sql = sqlite3.connect(path)
        assert sql.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        sql.close()


async def test_little_that_is_free_is_kept_for_the_next_batches(path):
    clock = VirtualClock()
    async with SqliteLog.at_path(path, clock=clock) as log:
        await log.admin.create([NewTopic("t", 1, config={"retention.ms": "1000"})])
        for _ in range(20):
            await write(log, batch(bytes(500_000), timestamp_ms=clock.now_ms()))
        await log._database.writer.checkpoint()
        size = os.stat(path).st_size
        clock.advance(2)
        await log.maintain()
        assert os.stat(path).st_size == size
