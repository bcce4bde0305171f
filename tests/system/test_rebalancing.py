"""What a rebalance may cost: nothing for what stays, a commit for what leaves, and no record twice.

Gates are files: a negative number keeps its agent at work until its partition's gate is open, so that a rebalance
meets records in hand wherever the test wants them.
"""

import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from streamflow.model.partitioner import partition_for
from tests.system.harness import DOUBLE, STOPPED, Key, Row, System, Worker, numbered, until

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(150)]

PARTITIONS = 4
KEYS = [next(b"k%d" % n for n in range(100) if partition_for(b"k%d" % n, PARTITIONS) == p) for p in range(PARTITIONS)]
"""One of each partition."""

SUMS = """
totals = app.table("totals", key_type=str, value_type=int, default=int)
seen = os.open(HERE / f"seen-{os.getpid()}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

@app.agent(numbers, sink=results)
async def total(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for event in stream.events():
        os.write(seen, f"{event.id}\\n".encode())
        totals[event.key] += abs(event.value)
        yield totals[event.key]
        while event.value < 0 and not (HERE / f"gate-{event.partition}").exists() and not os.environ.get("OPEN"):
            await asyncio.sleep(0.01)
"""
"""A sum that leaves its output first, and stays in hand behind it while the gate is shut."""


def sums(rows: list[Row]) -> list[Row]:
    """What the agent makes of a partition."""
    totals: Counter[Key] = Counter()
    made = []
    for key, value in rows:
        totals[key] += abs(value)
        made.append((key, totals[key]))
    return made


async def check(system: System) -> None:
    """Every output is there, once and in order, and none of work that was dropped."""
    taken, made = await system.read("numbers"), await system.read("results")
    assert made == {partition: sums(rows) for partition, rows in taken.items()}


def seen(folder: Path) -> Counter[str]:
    """How often user code has seen each record."""
    return Counter(line for path in folder.glob("seen-*") for line in path.read_text().splitlines())


def told(worker: Worker, what: str, topic: str) -> set[int]:
    """The partitions that a worker was last told of: `assigned`, `giving back`, `lost`."""
    lines = re.findall(rf"{what}: (.*)", worker.said)
    return {int(number) for number in re.findall(rf"{topic}-(\d+)", lines[-1])} if lines else set()


def open_gates(system: System, partitions: set[int]) -> None:
    for partition in partitions:
        (system.folder / f"gate-{partition}").touch()


async def holding_a_record_everywhere(system: System, **options: object) -> Worker:
    """A worker that has all partitions, and a record in hand in each."""
    system.write_app(SUMS, **options)
    await system.create("numbers", "results", partitions=PARTITIONS)
    await system.write("numbers", [(key, 1) for key in KEYS])
    worker = await system.started()
    await system.has_committed("numbers", PARTITIONS)
    await system.write("numbers", [(key, -10) for key in KEYS])
    await until(lambda: seen(system.folder).total() == 2 * PARTITIONS, "a record in every hand")
    return worker


async def test_what_stays_goes_on_while_what_leaves_is_waited_for(system: System) -> None:
    first = await holding_a_record_everywhere(system, shutdown_timeout_s=60)
    second = system.start(OPEN="1")
    await first.says("giving back: ")
    leaving = told(first, "giving back", system.topic("numbers"))
    staying = set(range(PARTITIONS)) - leaving
    assert len(leaving) == PARTITIONS // 2

    open_gates(system, staying)
    await system.write("numbers", [(KEYS[partition], 1) for partition in sorted(staying)] * 50)

    async def have_committed() -> bool:
        committed = await system.committed("numbers")
        return all(committed[partition] == 52 for partition in staying)

    await until(have_committed, system.told)
    # All that time, what leaves was waited for: it has neither been committed nor gone to the other one.
    assert {partition: (await system.committed("numbers"))[partition] for partition in leaving} == dict.fromkeys(
        leaving, 1
    )
    assert "assigned: " not in second.said
    assert (await first.status())["state"] == "rebalancing"

    open_gates(system, leaving)
    assert await second.owns(system.topic("numbers"), len(leaving)) == leaving
    await system.has_committed("numbers", 2 * PARTITIONS + 50 * len(staying))
    for worker in (first, second):
        assert await worker.stops() == STOPPED
    assert set(seen(system.folder).values()) == {1}
    await check(system)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_what_takes_too_long_to_leave_is_let_go_and_its_work_dropped(system: System, guarantee: str) -> None:
    options = {"shutdown_timeout_s": 2, "processing_guarantee": guarantee}
    first = await holding_a_record_everywhere(system, **options)
    second = await system.started(OPEN="1")
    taken = await second.owns(system.topic("numbers"), PARTITIONS // 2)
    assert taken == told(first, "giving back", system.topic("numbers"))
    await system.has_committed("numbers", PARTITIONS + len(taken))
    open_gates(system, set(range(PARTITIONS)))  # nobody is behind those of the ones that left any more
    await system.has_committed("numbers", 2 * PARTITIONS)
    for worker in (first, second):
        assert await worker.stops() == STOPPED
    again = {record for record, times in seen(system.folder).items() if times > 1}
    assert again == {f"{system.topic('numbers')}-{partition}-1" for partition in taken}
    await check(system)


@pytest.mark.kafka
async def test_commits_go_on_while_the_group_waits_for_a_member(kafka: System) -> None:
    """A member joins, and another one that has been stopped keeps the round open, until it goes on."""
    kafka.write_app(SUMS, session_timeout_ms=25_000)
    await kafka.create("numbers", "results", partitions=PARTITIONS)
    async with kafka.load("numbers", per_s=500) as sent, states_of(kafka) as state:
        workers = [kafka.start() for _ in range(3)]
        await shares(kafka, workers)
        *others, stopped = workers
        theirs = set[int]().union(*[await each.owned(kafka.topic("numbers")) for each in others])
        await kafka.has("results", 200)
        stopped.signal(signal.SIGSTOP)
        fourth = kafka.start()

        async def waits() -> bool:
            return await state() == "PreparingRebalance"

        await until(waits, kafka.told)
        before = await kafka.committed("numbers")

        async def have_committed() -> bool:
            now = await kafka.committed("numbers")
            return all(now[partition] > before[partition] + 20 for partition in theirs)

        await until(have_committed, kafka.told)
        assert await state() == "PreparingRebalance"
        stopped.signal(signal.SIGCONT)
        await shares(kafka, [*workers, fourth])
    await kafka.has_committed("numbers", sent.total())
    for worker in (*workers, fourth):
        assert await worker.stops() == STOPPED
    await check(kafka)


@asynccontextmanager
async def states_of(system: System) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """What the broker says of the app's group."""
    admin = AIOKafkaAdminClient(bootstrap_servers=system.broker.removeprefix("kafka://"))
    await admin.start()

    async def state() -> str:
        (answer,) = await admin.describe_consumer_groups([system.app_id])
        ((_, _, found, *_),) = answer.groups
        return str(found)

    try:
        yield state
    finally:
        await admin.close()


async def shares(system: System, workers: Sequence[Worker], partitions: int = PARTITIONS) -> list[int]:
    """Wait until all are ready and have all partitions among them, balanced; how many each has."""
    for worker in workers:
        await worker.ready()
    counts: list[int] = []

    async def shared() -> bool:
        owned = [await worker.owned(system.topic("numbers")) for worker in workers]
        counts[:] = [len(each) for each in owned]
        together = set[int]().union(*owned)
        if not sum(counts) == len(together) == partitions or max(counts) - min(counts) > 1:
            return False
        # Who was ready without any may have been given one since, and restore it.
        return all([(await worker.get("/ready"))[0] == 200 for worker in workers])

    await until(shared, lambda: f"{counts}; {system.told()}")
    return counts


async def test_what_is_new_restores_beside_what_runs(system: System) -> None:
    body = """
async def recovered(partition: int) -> None:
    while (HERE / "block").exists():
        await asyncio.sleep(0.01)
"""
    system.write_app(body + SUMS.replace("default=int)", "default=int, on_recover=recovered)"))
    await system.create("numbers", "results", partitions=PARTITIONS)
    async with system.load("numbers", per_s=500) as sent:
        first, second = await system.started(), await system.started()
        await shares(system, [first, second])
        own = await second.owned(system.topic("numbers"))
        await system.has("results", 200)
        (system.folder / "block").touch()
        first.kill()
        await until_restoring(second, PARTITIONS - len(own))
        before = await system.committed("numbers")

        async def have_committed() -> bool:
            now = await system.committed("numbers")
            return all(now[partition] > before[partition] + 50 for partition in own)

        await until(have_committed, system.told)
        code, answer = await second.get("/ready")
        assert code == 503
        assert "restoring task" in answer
        assert {p: n for p, n in (await system.committed("numbers")).items() if p not in own} == {
            p: n for p, n in before.items() if p not in own
        }
        (system.folder / "block").unlink()
        await second.owns(system.topic("numbers"), PARTITIONS)
    await system.has_committed("numbers", sent.total())
    assert await second.stops() == STOPPED
    await check(system)


async def until_restoring(worker: Worker, count: int) -> None:
    async def are_restoring() -> bool:
        return [task["state"] for task in (await worker.status())["tasks"]].count("restoring") == count

    await until(are_restoring, lambda: f"{count} tasks restoring at a worker that said:\n{worker.said}")


# --- clean stops ------------------------------------------------------------------------------------------------------


async def test_a_rolling_restart_loses_doubles_and_repeats_nothing(system: System) -> None:
    """The session is too long to end in this test: whoever takes over has been told so."""
    system.write_app(SUMS, session_timeout_ms=60_000)
    await system.create("numbers", "results", partitions=PARTITIONS)
    async with system.load("numbers", per_s=300) as sent:
        workers = [system.start() for _ in range(3)]
        await shares(system, workers)
        for number in range(3):
            assert await workers[number].stops() == STOPPED
            await system.has("results", await system.count("results") + 200)
            workers[number] = await system.started()
            await shares(system, workers)
            await system.has("results", await system.count("results") + 200)
    await system.has_committed("numbers", sent.total())
    for worker in workers:
        assert await worker.stops() == STOPPED
        assert "lost: " not in worker.said
    times = seen(system.folder)
    assert len(times) == sent.total()
    assert set(times.values()) == {1}
    await check(system)


# --- members and partitions that do not go together -------------------------------------------------------------------


async def test_members_without_partitions_are_ready_and_take_over(system: System) -> None:
    system.write_app(SUMS)
    await system.create("numbers", "results", partitions=2)
    workers = [system.start() for _ in range(4)]
    await shares(system, workers, 2)
    assert [(await worker.get("/ready"))[0] for worker in workers] == [200] * 4
    assert [(await worker.get("/live"))[0] for worker in workers] == [200] * 4
    async with system.load("numbers", per_s=500) as sent:
        await system.has("results", 100)
        for _ in range(2):
            owners = [worker for worker in workers if await worker.owned(system.topic("numbers"))]
            owners[0].kill()
            workers.remove(owners[0])
            await shares(system, workers, 2)
    await system.has_committed("numbers", sent.total())
    for worker in workers:
        assert await worker.stops() == STOPPED
    await check(system)


@pytest.mark.kafka
async def test_partitions_that_are_added_are_shared_while_the_old_ones_go_on(kafka: System) -> None:
    """Keys move to other partitions when a topic grows, so only what keeps no tables goes on."""
    kafka.write_app(DOUBLE, session_timeout_ms=60_000)
    await kafka.create("numbers", partitions=2)
    await kafka.create("results", partitions=PARTITIONS)
    quick = {"STREAMFLOW_KAFKA_METADATA_MAX_AGE_MS": "500"}
    first, second = await kafka.started(**quick), await kafka.started(**quick)
    await shares(kafka, [first, second], 2)
    await kafka.write("numbers", numbered(200))
    moved = [worker.said.count("giving back: ") for worker in (first, second)]
    await kafka.grow("numbers", PARTITIONS)
    await kafka.write("numbers", numbered(200, start=200))
    assert await shares(kafka, [first, second]) == [2, 2]
    await kafka.has_committed("numbers", 400)
    assert [worker.said.count("giving back: ") for worker in (first, second)] == moved
    for worker in (first, second):
        assert await worker.stops() == STOPPED
    assert sorted(value for _, value in await kafka.rows("results")) == [2 * number for number in range(400)]


@pytest.mark.parametrize("noticed_by", ["reader", "leader"])
async def test_a_source_that_is_deleted_stops_all_that_read_it(system: System, noticed_by: str) -> None:
    """Whether the group's leader looks for new partitions first, or a fetch fails."""
    system.write_app(DOUBLE, partitions=2)
    await system.create("numbers", partitions=2)
    environment = {"STREAMFLOW_KAFKA_METADATA_MAX_AGE_MS": "500"} if noticed_by == "leader" else {}
    workers = [system.start(**environment) for _ in range(2)]
    await shares(system, workers, 2)
    await system.write("numbers", numbered(20))
    await system.has_committed("numbers", 20)
    name = system.topic("numbers")
    await (await system.log()).admin.delete([name])
    for worker in workers:
        assert await worker.ends(30) == 1
        assert re.search(rf"error: .*{name}.*deleted while this worker read it.*start it again", worker.said)
        assert "Traceback" not in worker.said

    again = await system.started()
    await system.write("numbers", numbered(5, start=20))
    await system.has("results", 25)
    assert await again.stops() == STOPPED


async def test_a_source_that_may_not_be_created_is_waited_for_by_starting_again(system: System) -> None:
    body = DOUBLE.replace("numbers,", "there,")
    system.write_app("there = app.topic(ID + '-there', key_type=str, value_type=int, create=False)\n" + body)
    refused = system.start()
    assert await refused.ends() == 2
    assert "does not exist, and create=False forbids creating it" in refused.said
    await system.create("there", partitions=2)
    worker = await system.started()
    await system.write("there", numbered(10))
    await system.has("results", 10)
    assert await worker.stops() == STOPPED
