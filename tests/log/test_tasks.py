"""Tasks of a block: they end with it, and what it raises comes out as it is."""

import asyncio

import pytest

from streamflow.log import tasks
from streamflow.log.tasks import TaskOwner


async def fails(error):
    raise error


async def test_the_block_ends_its_tasks_and_waits_for_them():
    ended = []

    async def work(number):
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    async with TaskOwner("t", work(1)) as owner:
        owner.start(work(2))
        await asyncio.sleep(0)
    assert sorted(ended) == [1, 2]


async def test_what_the_block_raises_comes_out_as_it_is():
    error = LookupError("mine")

    async def block():
        async with TaskOwner("t", fails(ValueError("a bug"))):
            await asyncio.sleep(0)
            raise error

    with pytest.raises(LookupError) as caught:
        await block()
    assert caught.value is error


async def test_a_bug_is_raised_at_the_end_of_the_block():
    done = []

    async def block():
        async with TaskOwner("t", fails(ValueError("a bug"))):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            done.append(True)

    with pytest.raises(ValueError, match="a bug"):
        await block()
    assert done


async def test_a_bug_of_the_last_moment_is_raised_too():
    async def work():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise ValueError("at the end") from None

    with pytest.raises(ValueError, match="at the end"):
        async with TaskOwner("t", work()):
            await asyncio.sleep(0)


async def test_who_asks_is_told_of_a_bug_at_once_and_it_is_not_raised():
    told = []
    async with TaskOwner("t", fails(ValueError("a bug")), on_bug=told.append):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [str(error) for error in told] == ["a bug"]


async def test_a_task_that_does_not_end_is_left_behind_and_said_so(monkeypatch, caplog):
    monkeypatch.setattr(tasks, "_END_TIMEOUT_S", 0.01)
    go = asyncio.Event()

    async def stubborn():
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue

    async with TaskOwner("stubborn", stubborn()):
        await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records] == ["stubborn: does not end; it is left behind"]
    go.set()
    await asyncio.sleep(0)
