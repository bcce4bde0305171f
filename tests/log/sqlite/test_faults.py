"""Files that cannot be used, damaged files, full disks, and what is said about them."""

import asyncio
import os
import resource
import shutil
import sqlite3
import tempfile
import threading
from pathlib import Path

import pytest

from streamflow import disk
from streamflow.clock import SystemClock
from streamflow.errors import ConfigurationError, FatalError, LogCorruptedError, LogFullError, UnknownTopicError
from streamflow.log.api import AtomicCommit, NewTopic
from streamflow.log.connect import connect
from streamflow.log.sqlite import schema
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.record import TopicPartition
from tests.contracts.records import batch, numbered, read_to, records, values

TP = TopicPartition("t", 0)
IS_ROOT = os.geteuid() == 0
NOBODY = 65534


def open_log(path, **options):
    return SqliteLog.at_path(path, clock=SystemClock(), **options)


def change(path, *statements) -> None:
    sql = sqlite3.connect(path)
    try:
        with sql:
            for statement in statements:
                sql.execute(*statement if isinstance(statement, tuple) else (statement,))
    finally:
        sql.close()


async def made(path) -> None:
    async with open_log(path) as log:
        await log.admin.create([NewTopic("t", 1)])
        async with log.producer() as producer:
            for number in range(3):
                await (await producer.enqueue(TP, numbered([number])))


async def refused(path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        async with open_log(path):
            pass
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what is refused at the start ------------------------------------------------------------------------------------


async def test_a_newer_file_is_refused_and_left_as_it_is(path):
    await made(path)
    change(path, f"PRAGMA user_version = {schema.VERSION + 1}")
    before = Path(path).read_bytes()  # noqa: ASYNC240
    assert "newer StreamFlow" in await refused(path)
    assert Path(path).read_bytes() == before  # noqa: ASYNC240


async def test_somebody_elses_database_is_refused_and_left_as_it_is(path):
    change(path, "CREATE TABLE theirs (x)")
    before = Path(path).read_bytes()  # noqa: ASYNC240
    assert "something else" in await refused(path)
    assert Path(path).read_bytes() == before  # noqa: ASYNC240
    assert os.listdir(os.path.dirname(path)) == ["log.db"]


@pytest.fixture
def not_root(tmp_path_factory):
    """Takes root's power away, which no permission stops; gives a directory that anybody may enter."""
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o777)
    try:
        if IS_ROOT:
            os.seteuid(NOBODY)
        yield directory
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(directory)


@pytest.mark.parametrize("neighbour", ["-wal", "-shm"])
async def test_a_neighbour_that_cannot_be_written_is_refused(not_root, neighbour):
    path = os.path.join(not_root, "log.db")
    await made(path)
    Path(path + neighbour).write_bytes(b"")  # noqa: ASYNC240
    os.chmod(path + neighbour, 0o400)
    assert f"the file {path}{neighbour} cannot be read and written" in await refused(path)


@pytest.mark.parametrize("what", ["directory", "file", "new file"])
async def test_what_cannot_be_written_is_refused(not_root, what):
    path = os.path.join(not_root, "place", "log.db")
    os.mkdir(os.path.dirname(path))
    if what != "new file":
        await made(path)
    os.chmod(path if what == "file" else os.path.dirname(path), 0o500)
    await refused(path)


async def test_a_place_below_a_file_and_a_directory_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    await refused(str(tmp_path / "file" / "log.db"))
    (tmp_path / "directory").mkdir()
    assert "directory" in await refused(str(tmp_path / "directory"))


async def test_what_is_no_database_is_damaged(path):
    with open(path, "wb") as file:  # noqa: ASYNC230
        file.write(b"no database" * 1000)
    with pytest.raises(LogCorruptedError, match=r"log\.db"):
        async with open_log(path):
            pass


async def test_missing_directories_are_made_and_the_address_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = connect("sqlite:///a/b/log.db", clock=SystemClock(), client_id="test")
    assert log.address == f"sqlite:///{tmp_path}/a/b/log.db"
    async with log:
        pass
    assert connect(log.address, clock=SystemClock(), client_id="test").address == log.address
    assert (tmp_path / "a/b/log.db").exists()


def test_an_address_without_a_file_is_refused():
    with pytest.raises(ConfigurationError, match="names no file"):
        connect("sqlite:///", clock=SystemClock(), client_id="test")


async def test_network_file_systems_are_refused(path, monkeypatch):
    monkeypatch.setattr(disk, "file_system_type", lambda path: "nfs4")
    assert "nfs4" in await refused(path)
    assert os.listdir(os.path.dirname(path)) == []


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE batches SET data = substr(data, 1, 40) WHERE base_offset = 1", "too short"),
        ("UPDATE batches SET data = substr(data, 1, length(data) - 1) WHERE base_offset = 1", "header"),
        ("UPDATE batches SET data = zeroblob(length(data)) WHERE base_offset = 1", "header"),
        (
            "UPDATE batches SET data = CAST(substr(data, 1, length(data) - 2) || x'ffff' AS BLOB) WHERE id = 2",
            "checksum",
        ),
        ("UPDATE batches SET base_offset = 0 WHERE base_offset = 1", "header"),
    ],
)
async def test_a_damaged_batch_is_named_by_topic_partition_and_offset(path, statement, reason):
    await made(path)
    change(path, statement)
    async with open_log(path) as log, log.reader("r") as reader:
        reader.add(TP, 0)
        reader.ask(TP)
        (fetched,) = await reader.receive()
        assert values(records(fetched)) == [b"0"]  # what stands before it is still handed out
        reader.ask(TP)
        (fetched,) = await reader.receive()
        assert isinstance(fetched.error, LogCorruptedError)
        assert "t-0-" in str(fetched.error)
        assert reason in str(fetched.error)
        assert path in str(fetched.error)
        reader.add(TP, 2)
        assert values(await read_to(reader, TP, 3)) == [b"2"]


async def test_a_damaged_file_is_said_to_be_damaged(path):
    await made(path)
    with open(path, "r+b") as file:  # noqa: ASYNC230
        file.seek(4096)
        file.write(os.urandom(200_000))

    async def use():
        async with open_log(path) as log:
            await log.admin.topics()
            await log.admin.create([NewTopic("u", 1)])

    with pytest.raises(LogCorruptedError, match="damaged"):
        await use()


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(path):
    """Makes the disk full, but for `room` bytes at the end of the write-ahead log; None gives it its room back.

    What is limited is the size of files, which SQLite meets as it meets a full disk. A reader keeps the log as it is:
    without one, maintenance (every 30 s, so in a slow run only) copies it into the database, and the next commits go
    to its beginning, where there is room.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    reader = None

    def fill(room: int | None) -> None:
        nonlocal reader
        if reader is None:
            reader = sqlite3.connect(path, isolation_level=None)
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM topics").fetchall()
        limit = soft if room is None else os.stat(path + "-wal").st_size + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if reader is not None:
        reader.close()


async def test_a_full_disk_loses_nothing_and_writing_goes_on_when_there_is_room(path, full_disk):
    async with open_log(path) as log:
        await log.admin.create([NewTopic("t", 1), NewTopic("u", 1)])
        async with log.producer() as producer, log.transactional_producer("x") as transactional:
            stored = [await (await producer.enqueue(TP, batch(bytes(1000)))) for _ in range(20)]
            full_disk(10_000)
            for _ in range(3):
                assert await log.maintain()  # a checkpoint makes no room beside the reader
                with pytest.raises(LogFullError) as caught:
                    await transactional.commit(
                        AtomicCommit([(TP, batch(bytes(50_000))), (TopicPartition("u", 0), batch(b"1"))], {}, None)
                    )
            assert path in str(caught.value)
            assert "free space" in str(caught.value)
            waiting = await producer.enqueue(TP, batch(bytes(60_000)))
            await asyncio.sleep(0.3)
            assert not waiting.done()  # within its delivery time-out it is tried again
            ends = await log.admin.end_offsets([TP, TopicPartition("u", 0)])
            assert ends == {TP: 20, TopicPartition("u", 0): 0}
            full_disk(None)
            assert await waiting == len(stored)
        async with log.reader("r") as reader:
            reader.add(TP, 0)
            assert [r.offset for r in await read_to(reader, TP, 21)] == list(range(21))


async def test_a_disk_that_stays_full_fails_the_batch_after_its_time(path, full_disk):
    async with open_log(path) as log:
        await log.admin.create([NewTopic("t", 1)])
        full_disk(10_000)
        async with log.producer(delivery_timeout_s=0.2) as producer:
            stored = await producer.enqueue(TP, batch(bytes(100_000)))
            with pytest.raises(LogFullError):
                await stored
        full_disk(None)
        assert await log.admin.end_offsets([TP]) == {TP: 0}


# --- the rest --------------------------------------------------------------------------------------------------------


async def test_writing_to_a_topic_that_does_not_exist_fails_that_batch_alone(path):
    async with open_log(path) as log:
        await log.admin.create([NewTopic("t", 1)])
        async with log.producer() as producer:
            bad = await producer.enqueue(TopicPartition("missing", 0), batch(b"1"))
            worse = await producer.enqueue(TopicPartition("t", 7), batch(b"1"))
            good = await producer.enqueue(TP, batch(b"1"))
            with pytest.raises(UnknownTopicError, match="missing"):
                await bad
            with pytest.raises(UnknownTopicError, match="1 partitions"):
                await worse
            assert await good == 0


async def test_a_waiting_enqueue_can_be_cancelled_and_the_memory_bound_is_kept(path, monkeypatch):
    monkeypatch.setattr("streamflow.log.sqlite.producer.BUFFER_BYTES", 10_000)
    async with open_log(path) as log:
        await log.admin.create([NewTopic("t", 1)])
        blocker = sqlite3.connect(path, isolation_level=None)
        try:
            blocker.execute("BEGIN IMMEDIATE")
            async with log.producer() as producer:
                taken = [await producer.enqueue(TP, batch(bytes(4000))) for _ in range(2)]
                waiting = [asyncio.create_task(producer.enqueue(TP, batch(bytes(4000)))) for _ in range(3)]
                await asyncio.sleep(0.05)
                assert not any(task.done() for task in waiting)
                waiting[0].cancel()
                await asyncio.sleep(0.05)
                blocker.execute("ROLLBACK")
                assert [await future for future in taken] == [0, 1]
                assert [await (await task) for task in waiting[1:]] == [2, 3]
                assert waiting[0].cancelled()
        finally:
            blocker.close()


async def test_closing_a_log_ends_its_threads_also_while_the_file_is_locked(path):
    before = threading.active_count()
    blocker = None
    async with open_log(path) as log:
        await log.admin.create([NewTopic("t", 1)])
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(log.admin.create([NewTopic("u", 1)]))
        await asyncio.sleep(0.05)
    with pytest.raises(Exception, match="locked"):
        await waiting
    blocker.close()
    assert threading.active_count() == before


async def test_the_disk_is_flushed_before_a_commit_is_acknowledged(path):
    async with open_log(path) as log:
        assert await log._database.writer.read(lambda sql: sql.execute("PRAGMA synchronous").fetchone()) == (2,)
        assert await log._database.writer.read(lambda sql: sql.execute("PRAGMA journal_mode").fetchone()) == ("wal",)


@pytest.mark.parametrize("instead", ["nothing", "another file"])
async def test_a_file_that_goes_away_while_in_use_is_noticed(path, instead):
    async with open_log(path) as log:
        await log.admin.create([NewTopic("t", 1)])
        async with log.producer() as producer:
            await (await producer.enqueue(TP, numbered([0])))
            for neighbour in ("", "-wal", "-shm"):
                os.unlink(path + neighbour)
            if instead == "another file":
                sqlite3.connect(path).close()
            refused = await producer.enqueue(TP, numbered([1]))
            with pytest.raises(FatalError, match=r"was (deleted|replaced by another file) while it was in use.*back"):
                await refused
