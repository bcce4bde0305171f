"""Several processes on one file: killed in the middle of writing, stopped, side by side."""

import asyncio
import random
import re
import signal
import sqlite3
import time
from contextlib import ExitStack

import pytest

from streamflow.clock import SystemClock
from streamflow.errors import LogUnavailableError, TaskMigratedError
from streamflow.log.api import GroupSettings, Lost, NewTopic, OffsetMark
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, batch, read_to, receive, records, spread, until, values
from tests.log.sqlite.processes import Child
from tests.log.sqlite.writer import SETTINGS

pytestmark = pytest.mark.slow

ROUNDS = 15


@pytest.fixture(autouse=True)
def whole_file(path):
    """After all of it the file is sound."""
    yield
    sql = sqlite3.connect(path)
    try:
        assert sql.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        sql.close()


def open_log(path, **options):
    return SqliteLog.at_path(path, clock=SystemClock(), **options)


async def content(log, topic) -> list[bytes]:
    tp = TopicPartition(topic, 0)
    end = (await log.admin.end_offsets([tp]))[tp]
    async with log.reader("check") as reader:
        reader.add(tp, 0)
        return values(await read_to(reader, tp, end)) if end else []


async def create(path, *topics, partitions=1) -> None:
    async with open_log(path) as log:
        await log.admin.create([NewTopic(topic, partitions) for topic in topics])


# --- kill -9 ---------------------------------------------------------------------------------------------------------


async def test_kill_9_while_writing_never_loses_what_was_acknowledged(path):
    await create(path, "batches")
    dice, acknowledged = random.Random(1), {}
    for number in range(ROUNDS):
        with Child("batches", path, str(number)) as child:
            child.wait_for(lambda lines: len(lines) > 10)
            time.sleep(dice.uniform(0, 0.2))  # noqa: ASYNC251
            child.kill()
            acknowledged |= dict(line.split() for line in child.lines())
    async with open_log(path) as log, log.reader("check") as reader:
        tp = TopicPartition("batches", 0)
        end = (await log.admin.end_offsets([tp]))[tp]
        reader.add(tp, 0)
        found = await read_to(reader, tp, end)
        assert [record.offset for record in found] == list(range(end))
        at = {record.value.decode(): record.offset for record in found[::2]}
        assert len(at) * 2 == len(found)  # each batch once, and whole
        assert all(at[text] == int(offset) for text, offset in acknowledged.items())
    assert len(acknowledged) > ROUNDS * 10
    assert len(at) - len(acknowledged) < ROUNDS * 40  # what was under way may be there, nothing else is


async def test_kill_9_while_committing_never_shows_half_a_commit(path):
    await create(path, "source-0", "out0", "out1")
    dice, acknowledged = random.Random(2), 0
    for _ in range(ROUNDS):
        with Child("commits", path, "0") as child:
            child.wait_for(lambda lines: len(lines) > 5)
            time.sleep(dice.uniform(0, 0.1))  # noqa: ASYNC251
            child.kill()
            said = child.lines()
        last = int(said[-1].split()[0].removeprefix("0-"))
        async with open_log(path) as log:
            outputs = [await content(log, "out0"), await content(log, "out1")]
            mark = (await log.admin.group_offsets("group-0"))[TopicPartition("source-0", 0)]
        assert outputs[0] == outputs[1] == [b"0-%d" % count for count in range(mark.offset)]
        assert last < mark.offset <= last + 2
        acknowledged += len(said)
    assert acknowledged > ROUNDS * 5


async def test_three_processes_write_side_by_side(path):
    await create(path, "source-0", "source-1", "batches", "out0", "out1")
    async with open_log(path) as log:
        with ExitStack() as stack:
            children = [stack.enter_context(Child("commits", path, str(number))) for number in range(2)]
            children.append(stack.enter_context(Child("batches", path, "2")))
            for child in children:
                child.wait_for(lambda lines: len(lines) > 200)
            for child in children:
                child.kill()
            said = [child.lines() for child in children]
        outputs = [await content(log, "out0"), await content(log, "out1")]
        assert outputs[0] == outputs[1]
        for number in range(2):
            mine = [value for value in outputs[0] if value.startswith(b"%d-" % number)]
            mark = (await log.admin.group_offsets(f"group-{number}"))[TopicPartition(f"source-{number}", 0)]
            assert mine == [b"%d-%d" % (number, count) for count in range(mark.offset)]
            assert mark.offset >= len(said[number])
        assert len(await content(log, "batches")) >= 2 * len(said[2])


# --- groups between processes ----------------------------------------------------------------------------------------


def owned(lines: list[str]) -> set[int]:
    mine: set[int] = set()
    for line in lines:
        what, _, numbers = line.partition(" ")
        these = {int(number) for number in re.findall(r"\d+", numbers)}
        mine = mine | these if what == "assigned" else mine - these
    return mine


async def test_a_killed_member_hands_over_and_its_offsets_are_read(path):
    await create(path, "t", partitions=4)
    # A process that is certainly gone is not waited for: the session would be over long after this test has given up.
    with Child("member", path, "11", "600000") as first:
        first.wait_for(lambda lines: owned(lines) == {0, 1, 2, 3})
        with Child("member", path, "22", "600000") as second:
            second.wait_for(lambda lines: len(owned(lines)) == 2)
            first.wait_for(lambda lines: len(owned(lines)) == 2)
            assert owned(first.lines()) | owned(second.lines()) == {0, 1, 2, 3}
            first.kill()
            second.wait_for(lambda lines: owned(lines) == {0, 1, 2, 3})
    async with open_log(path) as log:
        await asyncio.sleep(0.1)
        assert set((await log.admin.group_offsets("group")).values()) == {OffsetMark(22)}


async def test_a_stopped_member_expires_and_finds_out_when_it_goes_on(path):
    await create(path, "t", partitions=2)
    with Child("member", path, "1") as stopped:
        stopped.wait_for(lambda lines: owned(lines) == {0, 1})
        async with (
            open_log(path) as log,
            log.group("group", frozenset({"t"}), spread, SETTINGS) as group,
            Watched(group) as member,
        ):
            await until(lambda: len(member.owned) == 1)
            stopped.signal(signal.SIGSTOP)
            since = time.monotonic()
            await until(lambda: len(member.owned) == 2)
            assert time.monotonic() - since > 1  # its session; its last heartbeat was before it was stopped
            stopped.signal(signal.SIGCONT)
            await asyncio.to_thread(stopped.wait_for, lambda lines: any(line.startswith("lost") for line in lines))
            await until(lambda: len(member.owned) == 1)  # it has joined again
            stopped.wait_for(lambda lines: len(owned(lines)) == 1)


async def test_a_stopped_process_that_holds_the_lock_costs_nobody_the_membership(path):
    await create(path, "t", partitions=2)
    settings = GroupSettings(session_timeout_ms=1000, heartbeat_interval_ms=100)
    async with (
        open_log(path) as log,
        open_log(path) as other,
        log.group("group", frozenset({"t"}), spread, settings) as one,
        other.group("group", frozenset({"t"}), spread, settings) as two,
        Watched(one) as first,
        Watched(two) as second,
        log.producer() as producer,
    ):
        await until(lambda: len(first.owned) == len(second.owned) == 1)
        before = one.membership, two.membership
        with Child("lock", path) as holder:
            holder.wait_for(lambda lines: "locked" in lines)
            holder.signal(signal.SIGSTOP)
            stored = await producer.enqueue(TopicPartition("t", 0), batch(b"waits"))
            await asyncio.sleep(3.0)
            assert not stored.done()
            assert one.statistics().last_heartbeat_age_s > 2
            holder.kill()
        assert await stored == 0
        await asyncio.sleep(0.5)
        assert (one.membership, two.membership) == before
        assert not [event for event in (*first.events, *second.events) if isinstance(event, Lost)]


async def test_a_locked_file_is_said_with_who_holds_it_and_nothing_is_lost(path):
    await create(path, "t", "out0")
    async with open_log(path, busy_timeout_s=0.3) as log:
        with Child("lock", path) as holder:
            holder.wait_for(lambda lines: "locked" in lines)
            holder.signal(signal.SIGSTOP)
            async with log.producer(delivery_timeout_s=0.5) as producer:
                stored = await producer.enqueue(TopicPartition("t", 0), batch(b"1"))
                with pytest.raises(LogUnavailableError) as caught:
                    await stored
            assert path in str(caught.value)
            assert f"process {holder.pid} (" in str(caught.value)
            assert "stopped" in str(caught.value)
            with pytest.raises(LogUnavailableError):
                await log.admin.create([NewTopic("another", 1)])
        async with log.producer() as producer:
            assert await (await producer.enqueue(TopicPartition("t", 0), batch(b"1"))) == 0


# --- notification ----------------------------------------------------------------------------------------------------


async def test_a_reader_hears_of_another_process_soon(path):
    await create(path, "batches")
    tp = TopicPartition("batches", 0)
    async with open_log(path) as log, log.reader("tail") as reader:
        reader.add(tp, 0)
        reader.ask(tp)
        waiting = asyncio.create_task(receive(reader))
        with Child("batches", path, "0") as child:
            (fetched,) = await waiting
            assert records(fetched)
            waiting = asyncio.create_task(log.changed())
            await asyncio.wait_for(waiting, 1)
            child.kill()


async def test_a_commit_of_an_expired_member_of_another_process_is_refused(path):
    await create(path, "t", partitions=1)
    with Child("member", path, "1") as child:
        child.wait_for(lambda lines: owned(lines) == {0})
        async with (
            open_log(path) as log,
            log.group("group", frozenset({"t"}), spread, SETTINGS) as group,
            Watched(group) as member,
        ):
            early = group.membership
            with pytest.raises(TaskMigratedError, match="does not own t-0"):
                await group.commit({TopicPartition("t", 0): OffsetMark(9)}, early)
            child.kill()
            await until(lambda: member.owned)
            await group.commit({TopicPartition("t", 0): OffsetMark(9)}, group.membership)
