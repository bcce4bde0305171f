"""Workers that share a group: partitions are split, handed over and taken over; what stays is not disturbed."""

import asyncio
import signal
import time
from collections import Counter

import pytest

from tests.system.harness import DOUBLE, STOPPED, Key, System, Worker, numbered, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

SESSION_S = 2.0
PARTITIONS = 4
WATCHED = """
@app.on_revoked
def revoked(partitions) -> None:
    print("revoked hook", sorted(str(each) for each in partitions if each.topic == ID + "-numbers"), flush=True)

@app.agent(numbers, sink=results)
async def double(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number * 2
"""


async def check(system: System) -> None:
    """The results are the map of the input, record by record."""
    taken, made = await system.read("numbers"), await system.read("results")
    assert made == {partition: [(key, 2 * value) for key, value in rows] for partition, rows in taken.items()}


async def test_two_workers_split_and_take_over(system: System) -> None:
    system.write_app(WATCHED)
    await system.create("numbers", partitions=PARTITIONS)
    async with system.load("numbers", per_s=1000) as sent:
        first = await system.started()
        await first.owns(system.topic("numbers"), PARTITIONS)
        second = await system.started()
        ours = await second.owns(system.topic("numbers"), 2)
        kept = await first.owns(system.topic("numbers"), 2)
        assert ours | kept == set(range(PARTITIONS))

        second.kill()
        killed_s = time.monotonic()
        await first.owns(system.topic("numbers"), PARTITIONS, within_s=SESSION_S + 5)
        assert time.monotonic() - killed_s < SESSION_S + 5

        third = await system.started()
        await third.owns(system.topic("numbers"), 2)
        assert await third.stops() == STOPPED
        await first.owns(system.topic("numbers"), PARTITIONS, within_s=SESSION_S)
    await system.has_committed("numbers", sent.total())
    assert await first.stops() == STOPPED
    await check(system)


async def test_what_a_worker_keeps_is_not_disturbed_when_another_joins(system: System) -> None:
    system.write_app(WATCHED)
    await system.create("numbers", partitions=PARTITIONS)
    async with system.load("numbers", per_s=1000) as sent:
        first, second = await system.started(), await system.started()
        await first.owns(system.topic("numbers"), 2)
        await second.owns(system.topic("numbers"), 2)
        before = {worker: await worker.owned(system.topic("numbers")) for worker in (first, second)}
        gone = {worker: worker.said.count("giving back: ") for worker in (first, second)}

        third = await system.started()
        came = await third.owns(system.topic("numbers"), 1)
        for worker in (first, second):
            kept = before[worker] - came
            await worker.owns(system.topic("numbers"), len(kept))
            assert await worker.owned(system.topic("numbers")) == kept
            told = worker.said.split("giving back: ")[1 + gone[worker] :]
            assert len(told) == len(before[worker] & came), worker.said
        await system.has("results", await system.count("results") + 500)
        for worker in (third, second, first):
            assert await worker.stops() == STOPPED
        again = await system.started()
        await system.has_committed("numbers", sent.total())
    await system.has_committed("numbers", sent.total())
    assert await again.stops() == STOPPED
    await check(system)


async def stop_between_writes(worker: Worker, sent: Counter[Key]) -> None:
    """SIGSTOP at a moment when others can write: a process that holds SQLite's write lock would keep all waiting.

    The load that goes on shows it: what is written after the next records began after the signal.
    """
    while True:
        worker.signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        enough = sent.total() + 3 * len(sent)
        while time.monotonic() - stopped_s < SESSION_S / 2:
            if sent.total() >= enough:
                return
            await asyncio.sleep(0.01)
        worker.signal(signal.SIGCONT)
        await asyncio.sleep(0.05)


async def test_a_stopped_process_that_wakes_up_changes_nothing(system: System) -> None:
    """SIGSTOP for longer than the session: the others take over, and what wakes up is told so."""
    system.write_app(WATCHED)
    await system.create("numbers", partitions=PARTITIONS)
    async with system.load("numbers", per_s=1000) as sent:
        first, second = await system.started(), await system.started()
        await first.owns(system.topic("numbers"), 2)
        await system.has("results", 500)
        await stop_between_writes(first, sent)
        await second.owns(system.topic("numbers"), PARTITIONS, within_s=SESSION_S + 5)
        await system.has("results", await system.count("results") + 500)
        first.signal(signal.SIGCONT)
        await first.says("lost: ")
        await first.owns(system.topic("numbers"), 2)
        await system.has("results", await system.count("results") + 500)
    await system.has_committed("numbers", sent.total())
    for worker in (first, second):
        assert await worker.stops() == STOPPED
    await check(system)


async def test_a_worker_that_waits_to_join_can_be_stopped(system: System) -> None:
    system.write_app(WATCHED, session_timeout_ms=20_000)
    await system.create("numbers", partitions=PARTITIONS)
    first = await system.started()
    first.kill()
    second = system.start()
    await second.says("agents ")
    assert await second.stops(10) == STOPPED


LEADER = """
@app.timer(0.05, on_leader=True)
async def lead() -> None:
    results.send_nowait(key="leader", value=os.getpid())

@app.agent(numbers)
async def idle(stream: sf.Stream[int]) -> None:
    async for number in stream:
        pass
"""


async def test_one_worker_leads_and_another_takes_over(system: System) -> None:
    system.write_app(LEADER)
    await system.create("numbers", partitions=PARTITIONS)
    workers = {worker.pid: worker for worker in [await system.started(), await system.started()]}

    async def leaders() -> list[int]:
        return list(dict.fromkeys(pid for _, pid in await system.rows("results")))

    await system.has("results", 10)
    led = (await leaders())[-1]
    workers.pop(led).kill()
    ((next_pid, worker),) = workers.items()

    async def taken_over() -> bool:
        return (await leaders())[-1] == next_pid

    await until(taken_over, system.told)
    await system.has("results", await system.count("results") + 10)
    assert await worker.stops() == STOPPED
    # Whoever led before, and however often it moved while they joined: in the end each led once and never both.
    told = [pid for _, pid in await system.rows("results")]
    assert told[-10:] == [next_pid] * 10


async def test_more_workers_than_partitions(system: System) -> None:
    system.write_app(WATCHED, partitions=1)
    await system.create("numbers", partitions=1)
    first, second = await system.started(), await system.started()

    async def one_has_it() -> bool:
        return sorted([len(await each.owned(system.topic("numbers"))) for each in (first, second)]) == [0, 1]

    await until(one_has_it, system.told)
    async with system.load("numbers", per_s=200) as sent:
        await system.has("results", 100)
        owner = first if await first.owned(system.topic("numbers")) else second
        assert await owner.stops() == STOPPED
        await system.has("results", await system.count("results") + 100)
    await system.has_committed("numbers", sent.total())
    await check(system)


# --- long and stuck records -------------------------------------------------------------------------------------------

STUBBORN = """
@app.agent(numbers, sink=results)
async def stubborn(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        if number == 3 and os.environ.get("STUBBORN"):
            print("stubborn", flush=True)
            WAIT
        yield number * 2
"""


async def test_a_blocked_event_loop_keeps_its_partitions(system: System) -> None:
    system.write_app(STUBBORN.replace("WAIT", "time.sleep(4)"))
    await system.create("numbers", partitions=PARTITIONS)
    first = system.start(STUBBORN="1")
    await first.ready()
    await system.write("numbers", [(b"a", number) for number in range(6)])
    await first.says("stubborn")
    second = await system.started()
    await system.has("results", 6)
    assert "lost: " not in first.said, first.said
    assert await first.stops() == STOPPED
    assert await second.stops() == STOPPED
    await check(system)


async def test_an_agent_that_hangs_loses_its_partitions(system: System) -> None:
    system.write_app(STUBBORN.replace("WAIT", "await asyncio.Event().wait()"), max_poll_interval_ms=2_000)
    await system.create("numbers", partitions=PARTITIONS)
    first = system.start(STUBBORN="1")
    await first.ready()
    second = await system.started()
    await system.write("numbers", [(b"k%d" % (number // 6), number % 6) for number in range(60)])
    await first.says("stubborn")
    await first.says("lost: .*max_poll_interval_ms")
    assert first.runs
    # It comes back, and hangs again as soon as it meets such a record: only the other one gets past.
    await system.has_committed("numbers", 60)
    await system.has("results", 60)
    second.kill()
    first.kill()
    await check(system)


async def test_waiting_for_the_rest_of_a_unit_is_not_hanging(system: System) -> None:
    body = """
@app.agent(numbers, sink=results)
async def units(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
    async for unit in stream.take(100, within_s=4):
        yield sf.Out(len(unit), key="a")
"""
    system.write_app(body, max_poll_interval_ms=2_000, partitions=1)
    await system.create("numbers", partitions=1)
    worker = await system.started()
    await system.write("numbers", [(b"a", number) for number in range(6)])
    await system.has("results", 1)
    assert await system.rows("results") == [(b"a", 6)]
    assert "lost: " not in worker.said, worker.said
    assert await worker.stops() == STOPPED


async def test_many_slow_records_in_a_row_are_not_one_stuck_record(system: System) -> None:
    body = """
@app.agent(numbers, sink=results)
async def slow(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        await asyncio.sleep(0.7)
        yield number * 2
"""
    system.write_app(body, max_poll_interval_ms=3_000, partitions=1)
    await system.create("numbers", partitions=1)
    await system.write("numbers", [(b"a", number) for number in range(6)])
    worker = await system.started()
    await system.has("results", 6)
    assert "lost: " not in worker.said, worker.said
    assert await worker.stops() == STOPPED
    await check(system)


async def test_workers_that_start_all_at_once_on_a_new_log(system: System) -> None:
    system.write_app(WATCHED)
    workers = [system.start() for _ in range(4)]
    for worker in workers:
        await worker.ready()
    async with system.load("numbers", per_s=500) as sent:
        await system.has("results", 100)
        for worker in workers:
            assert await worker.stops() == STOPPED
    again = await system.started()
    await system.has_committed("numbers", sent.total())
    assert await again.stops() == STOPPED
    await check(system)


NEWER = (
    DOUBLE
    + """
extra = app.topic(ID + "-extra", key_type=str, value_type=int)
both = app.topic(ID + "-both", key_type=str, value_type=int)

@app.agent(extra, sink=both)
async def more(number: int) -> int:
    return number + 1
"""
)


@pytest.mark.kafka
async def test_a_topic_that_only_the_newer_version_reads_is_told_while_the_older_one_leads(kafka: System) -> None:
    kafka.write_app()
    older = await kafka.started()
    await older.owns(kafka.topic("numbers"), PARTITIONS)
    await kafka.create("extra", partitions=PARTITIONS)
    await kafka.write("extra", numbered(20))
    kafka.write_app(NEWER)
    newer = await kafka.started()
    await newer.says(f"WARNING .*nobody processes {kafka.topic('extra')}: the worker that leads the group")
    assert "nobody processes" not in older.said
    assert await kafka.count("both") == 0

    assert await older.stops() == STOPPED
    await newer.says(f"{kafka.topic('extra')} is processed now")
    await kafka.has("both", 20)
    third = await kafka.started()
    await third.says("assigned: ")
    assert await third.stops() == STOPPED
    assert await newer.stops() == STOPPED
    assert newer.said.count("nobody processes") == 1
    assert "nobody processes" not in third.said
