"""Workers of before beside workers of today, whoever leads.

Those of before the members of a group had words, see `old_words.py`; and of before they packed where tasks are, see
`old_routes.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.system.harness import STOPPED, System, Worker, until
from tests.system.test_rebalancing import PARTITIONS, SUMS, check

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.kafka, pytest.mark.timeout(240)]

PLAIN = """
plain = app.topic(ID + "-plain", key_type=str, value_type=int)
doubled = app.topic(ID + "-doubled", key_type=str, value_type=int)

@app.agent(plain, sink=doubled)
async def double(number: int) -> int:
    return number * 2
"""
"""Tasks without state beside those with tables, which stay with who can warm another one up."""


def start_old(system: System, module: str = "old_words") -> Worker:
    program = str(Path(__file__).with_name(f"{module}.py"))
    return system.program(program, "worker", "app.py", "--web-port", "0")


async def shared(system: System, workers: Sequence[Worker]) -> None:
    """Wait until each worker has something to do, and every partition one worker."""
    for worker in workers:
        await worker.ready()
    owned: list[list[tuple[str, int]]] = []

    async def all_have() -> bool:
        topics = ("numbers", "plain")
        owned[:] = [[(t, p) for t in topics for p in await each.owned(system.topic(t))] for each in workers]
        together = [tp for mine in owned for tp in mine]
        return all(owned) and len(together) == len(set(together)) == 2 * PARTITIONS

    await until(all_have, lambda: f"{owned}; {system.told()}")


@pytest.mark.parametrize("leads", ["old", "new"])
async def test_workers_of_before_and_of_today_share_the_work_and_lose_and_double_nothing(
    kafka: System, leads: str
) -> None:
    kafka.write_app(SUMS + PLAIN, session_timeout_ms=6_000, standby_replicas=1)
    await kafka.create("numbers", "results", "plain", "doubled", partitions=PARTITIONS)
    async with kafka.load("numbers", per_s=100) as numbers, kafka.load("plain", per_s=100) as plain:
        first = start_old(kafka) if leads == "old" else kafka.start()
        await shared(kafka, [first])  # it leads until it goes
        second = kafka.start() if leads == "old" else start_old(kafka)
        await shared(kafka, [first, second])
        third = kafka.start()
        await shared(kafka, [first, second, third])
        assert await first.stops() == STOPPED
        await shared(kafka, [second, third])
        upgraded = kafka.start()
        await shared(kafka, [second, third, upgraded])
        second.kill()
        await shared(kafka, [third, upgraded])
        for worker in (third, upgraded):  # now that all are of today, each follows the other one's tasks
            await worker.says(r"standbys: (?!none)")
    await kafka.has_committed("numbers", numbers.total())
    await kafka.has_committed("plain", plain.total())
    for worker in (third, upgraded):
        assert await worker.stops() == STOPPED
    assert not [worker for worker in kafka.workers if "Traceback" in worker.said]
    await check(kafka)
    taken, made = await kafka.read("plain"), await kafka.read("doubled")
    assert made == {partition: [(key, 2 * value) for key, value in rows] for partition, rows in taken.items()}


async def reads_all(worker: Worker, keys: Sequence[str]) -> None:
    """Wait until it reads every key, its own and those of others."""
    missing: list[object] = []

    async def found() -> bool:
        missing[:] = [answer for key in keys if (answer := await worker.get(f"/tables/totals/{key}"))[0] != 200]
        return not missing

    await until(found, lambda: f"{missing} at a worker that said:\n{worker.said}")


@pytest.mark.parametrize("leads", ["old", "new"])
async def test_workers_that_pack_where_tasks_are_and_those_that_do_not_read_one_anothers_tables(
    kafka: System, leads: str
) -> None:
    kafka.write_app(SUMS + PLAIN, session_timeout_ms=6_000, standby_replicas=1)
    await kafka.create("numbers", "results", "plain", "doubled", partitions=PARTITIONS)
    keys = [f"k{number}" for number in range(20)]
    await kafka.write("numbers", [(key.encode(), 1) for key in keys])

    def start(version: str) -> Worker:
        return kafka.start() if version == "new" else start_old(kafka, "old_routes")

    workers = [start(leads)]
    await shared(kafka, workers)  # it leads until it goes
    workers.append(start("new" if leads == "old" else "old"))
    await shared(kafka, workers)
    workers.append(start("new"))
    await shared(kafka, workers)
    for worker in workers:
        await reads_all(worker, keys)
    assert await workers.pop(0).stops() == STOPPED
    await shared(kafka, workers)
    for worker in workers:
        await reads_all(worker, keys)
        assert await worker.stops() == STOPPED
    assert not [worker for worker in kafka.workers if "Traceback" in worker.said or "cannot be read" in worker.said]
