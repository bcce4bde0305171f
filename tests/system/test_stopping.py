"""Signals: the record in hand is finished, what is done is committed, the group is left; all within the deadline."""

import asyncio
import re
import signal
import time

import pytest

from tests.system.harness import System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow]

SLOW = """
@app.agent(numbers, sink=results)
async def slow(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        print("taken", number, flush=True)
        while not (HERE / "go").exists():
            await asyncio.sleep(0.01)
        yield number
"""
"""A record is in hand until the test lets it go."""
STOP_WITHIN_S = 10.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_first_signal_finishes_the_record_in_hand(system: System, number: signal.Signals) -> None:
    system.write_app(SLOW, partitions=1)
    await system.create("numbers", partitions=1)
    await system.write("numbers", numbered(5))
    worker = await system.started()
    await worker.says("taken 0")
    worker.signal(number)
    await worker.says("stopping: finishing the records in hand")
    (system.folder / "go").touch()
    assert await worker.ends(STOP_WITHIN_S) == 0
    assert "taken 1" not in worker.said
    assert await system.committed("numbers") == {0: 1}
    assert [value for _, value in await system.rows("results")] == [0]

    again = await system.started()
    await system.has("results", 2)
    assert await again.stops(STOP_WITHIN_S) == 0
    assert "taken 0" not in again.said
    done = (await system.committed("numbers"))[0]
    assert [value for _, value in await system.rows("results")] == list(range(done))


async def test_a_stop_under_load_commits_all_that_left(system: System) -> None:
    system.write_app()
    await system.create("numbers")
    async with system.load("numbers", per_s=2000) as sent:
        for _ in range(3):
            worker = await system.started()
            await system.has("results", await system.count("results") + 200)
            assert await worker.stops(STOP_WITHIN_S) == 0
            assert sum((await system.committed("numbers")).values()) == await system.count("results")
    worker = await system.started()
    await system.has_committed("numbers", sent.total())
    assert await worker.stops(STOP_WITHIN_S) == 0
    taken, made = await system.read("numbers"), await system.read("results")
    assert made == {partition: [(key, 2 * value) for key, value in rows] for partition, rows in taken.items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_ends_it_at_once(sqlite: System, number: signal.Signals) -> None:
    sqlite.write_app(SLOW)
    await sqlite.create("numbers")
    await sqlite.write("numbers", numbered(1))
    worker = await sqlite.started()
    await worker.says("taken 0")
    worker.signal(signal.SIGTERM)
    await worker.says("stopping")
    await asyncio.sleep(0.1)  # the same signal at once again would be the first one's echo
    worker.signal(number)
    assert await worker.ends(2) == 128 + number
    assert sum((await sqlite.committed("numbers")).values()) == 0


async def test_a_record_that_takes_too_long_is_given_up(system: System) -> None:
    system.write_app(SLOW, shutdown_timeout_s=1)
    await system.create("numbers")
    await system.write("numbers", numbered(1))
    worker = await system.started()
    await worker.says("taken 0")
    assert await worker.stops(STOP_WITHIN_S) == 0
    assert re.search("not done within .* processed again", worker.said)
    assert sum((await system.committed("numbers")).values()) == 0
    assert await system.count("results") == 0


async def test_a_stop_does_not_wait_for_a_back_off(system: System) -> None:
    body = """
@app.agent(numbers, sink=results, on_error=sf.Retry(1000, backoff_s=3600, max_backoff_s=3600))
async def fails(number: int) -> int:
    if number == 3:
        raise ValueError("not today")
    return number
"""
    system.write_app(body)
    await system.create("numbers", partitions=1)
    await system.write("numbers", numbered(5))
    worker = await system.started()
    await worker.says("trying again in 3600")
    before_s = time.monotonic()
    assert await worker.stops(STOP_WITHIN_S) == 0
    assert time.monotonic() - before_s < 5
    assert "not done within" not in worker.said
    assert await system.committed("numbers") == {0: 3}
    assert [value for _, value in await system.rows("results")] == [0, 1, 2]


async def test_a_blocked_event_loop_does_not_prevent_the_stop(system: System) -> None:
    system.write_app(SLOW.replace("await asyncio.sleep(0.01)", "time.sleep(60)"), shutdown_timeout_s=1)
    await system.create("numbers")
    await system.write("numbers", numbered(1))
    worker = system.start()
    await worker.says("taken 0")
    assert await worker.stops(STOP_WITHIN_S) == 1
    assert "blocks the event loop" in worker.said
    assert sum((await system.committed("numbers")).values()) == 0
