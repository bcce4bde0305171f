"""Workers with an instance_id: a restart costs the others nothing, and of two with one name the older stops."""

import asyncio
import re
import signal
import sqlite3

import pytest

from tests.ports import free_port
from tests.system.harness import STOPPED, System, Worker, until
from tests.system.test_rebalancing import PARTITIONS, SUMS, check, shares

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(180)]

REFUSED = 2
EVERYWHERE = pytest.mark.parametrize(
    "system", ["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True
)


class Named:
    """Workers by name, each with an address that it keeps."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._ports: dict[str, int] = {}

    def start(self, name: str) -> Worker:
        port = self._ports.setdefault(name, free_port())
        return self.system.start("--web-port", str(port), STREAMFLOW_INSTANCE_ID=name)

    async def started(self, name: str) -> Worker:
        return await self.start(name).ready()


async def disturbed(workers: list[Worker]) -> list[object]:
    """What a rebalance changes of workers."""
    rebalances = [(await worker.status())["rebalances"] for worker in workers]
    return [rebalances, [re.findall("(?:assigned|revoked|lost): .*", worker.said) for worker in workers]]


async def settled(system: System, workers: list[Worker]) -> list[object]:
    """Wait until all have their share, and no round follows; what one would change."""
    await shares(system, workers)
    seen: list[object] = []
    for _ in range(100):
        before, seen = seen, await disturbed(workers)
        if before == seen:
            return seen
        await asyncio.sleep(1)
    raise AssertionError(f"no rest: {system.told()}")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("system", "guarantee"),
    [
        ("sqlite", "exactly_once"),
        pytest.param("kafka", "exactly_once", marks=pytest.mark.kafka),
        pytest.param("kafka", "at_least_once", marks=pytest.mark.kafka),
    ],
    indirect=["system"],
)
async def test_a_restart_within_the_session_is_no_rebalance(
    system: System, how: signal.Signals, guarantee: str
) -> None:
    named = Named(system)
    system.write_app(SUMS, session_timeout_ms=25_000, processing_guarantee=guarantee)
    await system.create("numbers", "results", partitions=PARTITIONS)
    async with system.load("numbers", per_s=200) as sent:
        others = [await named.started("w-0"), await named.started("w-1")]
        bounced = await named.started("w-2")
        before = await settled(system, [*others, bounced])
        numbers = system.topic("numbers")
        had = await bounced.owned(numbers)
        for _ in range(2):
            bounced.signal(how)
            assert await bounced.ends() == (STOPPED if how == signal.SIGTERM else -signal.SIGKILL)
            bounced = await named.started("w-2")
            assert await bounced.owned(numbers) == had
        written = sent.total()
        await system.has_committed("numbers", written)
        assert (await disturbed(others)) == [before[0][:2], before[1][:2]]  # type: ignore[index]
    await system.has_committed("numbers", sent.total())
    for worker in (*others, bounced):
        assert await worker.stops() == STOPPED
    if guarantee == "exactly_once" or how == signal.SIGTERM:
        await check(system)


@pytest.mark.kafka
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_is_no_rebalance_on_an_older_broker(old_kafka: System, how: signal.Signals) -> None:
    await test_a_restart_within_the_session_is_no_rebalance(old_kafka, how, "exactly_once")


LATER = (
    SUMS
    + """
by_parity = app.table("by_parity", key_type=int, value_type=int, default=int)
more = app.topic(ID + "-more", key_type=str, value_type=int)

@app.agent(numbers.group_by(lambda number: number % 2, name="parity", key_type=int))
async def count(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        by_parity[event.key] += 1

@app.agent(more)
async def look(number: int) -> None: ...
"""
)
"""The next version: one more topic of its own, one by way of group_by, and a table."""


@EVERYWHERE
async def test_a_version_is_taken_back_worker_by_worker(system: System) -> None:
    named, names = Named(system), ["w-0", "w-1"]
    await system.create("numbers", "results", "more", partitions=PARTITIONS)
    workers: dict[str, Worker] = {}
    async with system.load("numbers", per_s=200) as sent:
        for body in (LATER, SUMS, LATER, SUMS):
            system.write_app(body, session_timeout_ms=25_000)
            for name in names:
                if name in workers:
                    assert await workers.pop(name).stops() == STOPPED
                workers[name] = await named.started(name)
            read = ["numbers", "more", "parity-repartition"] if body is LATER else ["numbers"]
            for worker in workers.values():
                for each in read:
                    await worker.owns(system.topic(each), PARTITIONS // 2)
            written = sent.total()
            await system.has_committed("numbers", written)
    await system.has_committed("numbers", sent.total())
    for worker in workers.values():
        assert await worker.stops() == STOPPED
    await check(system)
    assert not [worker for worker in system.workers if "Traceback" in worker.said]


@EVERYWHERE
async def test_the_others_take_over_when_the_session_is_over(system: System) -> None:
    named = Named(system)
    system.write_app(SUMS, session_timeout_ms=6_000)
    await system.create("numbers", "results", partitions=PARTITIONS)
    async with system.load("numbers", per_s=200) as sent:
        stays, goes = await named.started("stays"), await named.started("goes")
        await settled(system, [stays, goes])
        assert await goes.stops() == STOPPED
        assert len(await stays.owned(system.topic("numbers"))) == PARTITIONS // 2
        await stays.owns(system.topic("numbers"), PARTITIONS)
        back = await named.started("goes")
        await shares(system, [stays, back])
    await system.has_committed("numbers", sent.total())
    for worker in (stays, back):
        assert await worker.stops() == STOPPED
    await check(system)


async def has_had_a_round(worker: Worker, before: object) -> bool:
    (rounds, _) = await disturbed([worker])
    return rounds != before


@EVERYWHERE
async def test_of_two_workers_with_one_name_the_older_stops_and_says_why(system: System) -> None:
    named = Named(system)
    system.write_app(SUMS, session_timeout_ms=25_000)
    await system.create("numbers", "results", partitions=PARTITIONS)
    async with system.load("numbers", per_s=200) as sent:
        older, other = await named.started("same"), await named.started("other")
        before = await settled(system, [other, older])
        newer = system.start(STREAMFLOW_INSTANCE_ID="same")
        assert await older.ends() == REFUSED
        assert re.search("error: .*another worker was started with instance_id 'same'", older.said)
        assert "Traceback" not in older.said
        await shares(system, [newer, other])
        await system.has_committed("numbers", sent.total())
        # The newer one has another address, which the other one has to be told, in a round that moves nothing.
        await until(lambda: "know another address" in newer.said, lambda: newer.said)
        rounds = before[0][:1]  # type: ignore[index]
        await until(lambda: has_had_a_round(other, rounds), system.told)
        assert (await disturbed([other]))[1] == before[1][:1]  # type: ignore[index]
    await system.has_committed("numbers", sent.total())
    for worker in (newer, other):
        assert await worker.stops() == STOPPED
    await check(system)


async def test_each_process_of_one_command_has_a_name_of_its_own(sqlite: System) -> None:
    sqlite.write_app(SUMS, session_timeout_ms=25_000)
    await sqlite.create("numbers", "results", partitions=PARTITIONS)
    worker = await sqlite.started("--processes", "2", STREAMFLOW_INSTANCE_ID="shop")
    await until(lambda: len(re.findall("assigned: ", worker.said)) >= 2, lambda: worker.said)
    sql = sqlite3.connect(sqlite.folder / "log.db")
    try:
        assert {name for (name,) in sql.execute("SELECT instance_id FROM members")} == {"shop-0", "shop-1"}
    finally:
        sql.close()
    assert await worker.stops() == STOPPED


async def test_each_process_of_one_command_finds_the_state_that_it_had(sqlite: System) -> None:
    sqlite.write_app(SUMS, session_timeout_ms=25_000)
    await sqlite.create("numbers", "results", partitions=PARTITIONS)
    slots = sqlite.folder / "data" / sqlite.app_id
    async with sqlite.load("numbers", per_s=200) as sent:
        for start in range(4):
            worker = await sqlite.started("--processes", "3", STREAMFLOW_INSTANCE_ID="shop")
            await worker.says("assigned: ", times=3)
            written = sent.total()
            await sqlite.has_committed("numbers", written)
            pids = dict(re.findall(r"process (\d) started \(pid (\d+)\)", worker.said))
            had = {(slot / ".name").read_text(): (slot / ".lock").read_text().strip() for slot in slots.glob("[0-9]")}
            assert had == {f"shop-{number}": pid for number, pid in pids.items()}
            assert await worker.stops() == STOPPED
            restored = [int(number) for number in re.findall(r"restored (\d+) records", worker.said)]
            assert start == 0 or not any(restored), sqlite.told()  # at first tasks move as one comes after the other
