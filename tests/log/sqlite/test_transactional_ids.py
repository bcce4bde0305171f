"""Transactional ids expire when nobody uses them, and never while somebody does."""

import asyncio
import sqlite3

import pytest

from streamflow.clock import VirtualClock
from streamflow.errors import ProducerFencedError
from streamflow.log.api import AtomicCommit, NewTopic
from streamflow.log.sqlite import process, schema
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.record import TopicPartition
from tests.contracts.records import batch

TP = TopicPartition("t", 0)
DAY_S = 86_400
COMMIT = AtomicCommit([(TP, batch(b"1"))], {}, None)


@pytest.fixture
async def log(path, clock):
    """On a file, whose ids' time the test moves."""
    async with SqliteLog.at_path(path, clock=clock) as log:
        await log.admin.create([NewTopic("t", 1)])
        yield log


async def ids(log):
    found = await log._database.reader.read(lambda sql: sql.execute("SELECT id FROM transactional_ids").fetchall())
    return {id_ for (id_,) in found} - {""}


async def used_by(log, who):
    """As if another process had opened the producers."""
    await log._database.writer.write(
        lambda sql: sql.execute("UPDATE transactional_ids SET process = ?", (who,)).rowcount
    )


async def test_an_id_that_was_let_go_expires_after_a_week(log, clock):
    async with log.transactional_producer("x") as producer:
        await producer.commit(COMMIT)
    clock.advance(7 * DAY_S)
    await log.maintain()
    assert await ids(log) == {"x"}
    clock.advance(1)
    await log.maintain()
    assert await ids(log) == set()


async def test_an_id_in_use_does_not_expire_however_far_the_clock_jumps(log, clock):
    async with log.transactional_producer("x") as producer:
        clock.advance(1000 * DAY_S)
        await log.maintain()
        assert await ids(log) == {"x"}
        await producer.commit(COMMIT)


@pytest.mark.parametrize("who", ["elsewhere 1 5", "elsewhere 1 ?"])
async def test_an_id_of_a_process_that_cannot_be_looked_up_is_renewed(memory, clock, who):
    await memory.admin.create([NewTopic("t", 1)])
    async with memory.transactional_producer("x") as producer:
        await used_by(memory, who)
        for _ in range(8 * 24):
            await asyncio.sleep(0)
            clock.advance(3601)
            for _ in range(5):
                await asyncio.sleep(0)
        await memory.maintain()
        await producer.commit(COMMIT)


async def test_who_comes_back_after_its_id_expired_is_refused_whoever_has_it_now(log, clock):
    async with log.transactional_producer("x") as late:
        await used_by(log, "elsewhere 1 5")
        clock.advance(8 * DAY_S)
        await log.maintain()
        with pytest.raises(ProducerFencedError, match="'x' expired"):
            await late.commit(COMMIT)
        async with log.transactional_producer("x") as other:
            with pytest.raises(ProducerFencedError, match="taken over"):
                await late.commit(COMMIT)
            await other.commit(COMMIT)
    assert await log.admin.end_offsets([TP]) == {TP: 1}


async def test_an_id_of_a_killed_process_expires(log, clock):
    async with log.transactional_producer("x"):
        namespace, pid, started = process.identity().split(" ")
        await used_by(log, f"{namespace} {pid} {int(started) + 1}")
        clock.advance(8 * DAY_S)
        await log.maintain()
        assert await ids(log) == set()


async def test_a_clock_that_was_ahead_keeps_no_id_for_ever(path):
    ahead = VirtualClock(1_900_000_000_000)
    async with SqliteLog.at_path(path, clock=ahead) as log, log.transactional_producer("x"):
        pass
    clock = VirtualClock(1_700_000_000_000)
    async with SqliteLog.at_path(path, clock=clock) as log:
        await log.maintain()
        clock.advance(8 * DAY_S)
        await log.maintain()
        assert await ids(log) == set()


async def test_a_file_of_format_1_is_brought_up_to_date(path, clock):
    async with SqliteLog.at_path(path, clock=clock) as log:
        await log.admin.create([NewTopic("t", 1)])
    sql = sqlite3.connect(path, isolation_level=None)
    sql.execute("DROP TABLE transactional_ids")
    sql.execute("CREATE TABLE transactional_ids (id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID")
    sql.execute("INSERT INTO transactional_ids VALUES ('old', 7), ('x', 3)")
    for column in ("instance_id", "says", "told"):
        sql.execute(f"ALTER TABLE members DROP COLUMN {column}")
    sql.execute("ALTER TABLE groups DROP COLUMN told_generation")
    sql.execute("PRAGMA user_version = 1")
    sql.close()
    async with SqliteLog.at_path(path, clock=clock) as log, log.transactional_producer("x") as producer:
        await producer.commit(COMMIT)
        assert producer._epoch == 8
        await log.maintain()
        assert await ids(log) == {"old", "x"}
    sql = sqlite3.connect(path)
    assert sql.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
    sql.close()
