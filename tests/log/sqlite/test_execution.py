"""Writes that are cancelled: not begun, they are not done; begun, their outcome is known."""

import asyncio
import sqlite3
import threading

import anyio
import pytest

from streamflow.clock import SystemClock
from streamflow.errors import LogUnavailableError
from streamflow.log.api import NewTopic
from streamflow.log.sqlite import execution
from streamflow.log.sqlite.log import SqliteLog


@pytest.fixture
def blocker(path, log):
    sql = sqlite3.connect(path, isolation_level=None)
    yield sql
    sql.close()


def add(name):
    return lambda sql: sql.execute("INSERT INTO groups (id) VALUES (?)", (name,)).rowcount


async def names(log):
    return set(await log.admin.groups())


async def test_a_write_that_waits_for_the_lock_is_given_up_at_once(log, blocker, caplog):
    blocker.execute("BEGIN IMMEDIATE")
    with anyio.move_on_after(0.4) as scope:
        await log._database.writer.write(add("given up"))
    assert scope.cancelled_caught
    blocker.execute("ROLLBACK")
    await log._database.writer.write(add("later"))
    assert await names(log) == {"later"}
    (warning,) = (record.message for record in caplog.records)
    assert "another process has kept it locked" in warning


async def test_a_lock_that_is_held_for_long_is_told_and_then_refuses_the_write(path, log, monkeypatch, caplog):
    monkeypatch.setattr(execution, "TELL_WAITING_S", 0.1)
    async with SqliteLog.at_path(path, clock=SystemClock(), busy_timeout_s=0.4) as impatient:
        holder = sqlite3.connect(path, isolation_level=None)
        try:
            holder.execute("BEGIN IMMEDIATE")
            with pytest.raises(LogUnavailableError, match=r"has kept it locked.*Nothing was stored"):
                await impatient._database.writer.write(add("refused"))
            told = [record.message for record in caplog.records]
            assert told == [message for message in told if "waiting for another process to unlock it" in message]
            assert len(told) == 1
            holder.execute("ROLLBACK")
            await impatient._database.writer.write(add("later"))
        finally:
            holder.close()
    assert await names(log) == {"later"}


async def test_a_write_that_waits_for_its_turn_is_given_up_at_once(log, blocker, caplog):
    blocker.execute("BEGIN IMMEDIATE")
    first = asyncio.create_task(log._database.writer.write(add("first")))
    second = asyncio.create_task(log._database.writer.write(add("second")))
    await asyncio.sleep(0.05)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not first.done()
    blocker.execute("ROLLBACK")
    assert await first == 1
    await log.admin.create([NewTopic("t", 1)])  # after the one that was given up
    assert await names(log) == {"first"}
    assert not caplog.records


class Held:
    """Work that begins and goes on until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, sql):
        self.begun.set()
        assert self.go.wait(20)
        return add("stored")(sql)


async def begun_and_let_go(held, cancel):
    """Cancels when the work has begun, and lets it go a little later."""
    await asyncio.to_thread(held.begun.wait, 20)
    cancel()
    await asyncio.sleep(0.05)
    held.go.set()


async def test_a_begun_write_is_waited_for_by_a_cancelled_scope(log):
    held, answers = Held(), []
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            tasks.start_soon(begun_and_let_go, held, scope.cancel)
            answers.append(await log._database.writer.write(held))
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert answers == [1]
    assert await names(log) == {"stored"}


async def test_a_begun_write_is_waited_for_by_a_cancelled_task(log):
    held, answers = Held(), []

    async def write():
        answers.append(await log._database.writer.write(held))
        await asyncio.sleep(3600)

    task = asyncio.create_task(write())
    await begun_and_let_go(held, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answers == [1]
    assert await names(log) == {"stored"}


async def test_a_begun_write_is_waited_for_by_a_timeout(log):
    held, answers, passing = Held(), [], []

    async def write():
        async with asyncio.timeout(None) as timeout:
            passing.append(asyncio.create_task(begun_and_let_go(held, lambda: timeout.reschedule(0))))
            answers.append(await log._database.writer.write(held))
            await asyncio.sleep(3600)

    with pytest.raises(TimeoutError):
        await write()
    await passing[0]
    assert answers == [1]
    assert await names(log) == {"stored"}
