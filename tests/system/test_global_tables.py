"""Global tables in real processes: each holds all of it, whatever is killed, on both logs."""

import json
import shutil
import signal

import pytest

from tests.system.harness import Row, System, Worker, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

RATES = """
import json
rates = app.global_table(
    "rates", source=app.topic(ID + "-rates", key_type=str, value_type=int, compacting=True, partitions=3)
)

@app.timer(0.05)
def show() -> None:
    new = HERE / f"seen-{os.getpid()}.new"
    new.write_text(json.dumps(dict(rates.items())))
    new.rename(new.with_suffix(".json"))
"""

PRICED = """
@app.agent(numbers, sink=results)
async def price(stream: sf.Stream[int, str]) -> AsyncIterator[int]:
    async for key, number in stream.items():
        yield number * rates.get(key, 0)
"""


def rows_of(count: int, factor: int) -> list[Row]:
    return [(b"k%d" % number, number * factor) for number in range(count)]


def as_seen(rows: list[Row]) -> dict[str, int]:
    return {key.decode(): value for key, value in rows if key is not None}


async def sees(system: System, worker: Worker, expected: dict[str, int]) -> None:
    path = system.folder / f"seen-{worker.pid}.json"

    def looks_so() -> bool:
        assert worker.runs, f"it ended:\n{worker.said}"
        return path.exists() and json.loads(path.read_text()) == expected

    await until(looks_so, lambda: f"{len(expected)} keys at a worker that said:\n{worker.said}")


def records_read(worker: Worker) -> int:
    found = [line for line in worker.said.splitlines() if "global tables are here" in line]
    assert len(found) == 1, worker.said
    return int(found[0].split("(")[1].split()[0])


async def test_every_process_holds_all_of_it_whatever_is_killed(system: System) -> None:
    """An app of nothing but a global table and a timer; its workers share no work, and a data directory."""
    system.write_app(RATES)
    first = await system.started()
    await system.write("rates", rows_of(500, 1))
    others = [await system.started() for _ in range(2)]
    for worker in (first, *others):
        await sees(system, worker, as_seen(rows_of(500, 1)))
    await system.write("rates", rows_of(100, 3))
    expected = as_seen(rows_of(500, 1)) | as_seen(rows_of(100, 3))
    for worker in (first, *others):
        await sees(system, worker, expected)
    others[0].kill()
    await system.write("rates", [(b"new", 1), (b"k0", 7)])
    expected |= {"new": 1, "k0": 7}
    again = await system.started()
    for worker in (first, again, others[1]):
        await sees(system, worker, expected)
    assert records_read(again) == 2
    for worker in (first, again, others[1]):
        worker.signal(signal.SIGTERM)
    assert [await worker.ends() for worker in (first, again, others[1])] == [0, 0, 0]
    last = await system.started()
    await sees(system, last, expected)
    assert records_read(last) == 0
    assert await last.stops() == 0


async def test_what_is_wiped_is_read_anew(system: System) -> None:
    system.write_app(RATES)
    worker = await system.started()
    await system.write("rates", rows_of(300, 2))
    await sees(system, worker, as_seen(rows_of(300, 2)))
    worker.kill()
    shutil.rmtree(system.folder / "data", ignore_errors=True)
    again = await system.started()
    await sees(system, again, as_seen(rows_of(300, 2)))
    assert records_read(again) == 300
    assert await again.stops() == 0


async def test_agents_of_all_workers_find_every_key(system: System) -> None:
    await system.create("numbers", "results", partitions=2)
    system.write_app(RATES + PRICED)
    workers = [await system.started()]
    await system.write("rates", rows_of(50, 2))
    await sees(system, workers[0], as_seen(rows_of(50, 2)))
    workers.append(await system.started())
    for worker in workers:
        await worker.owns(system.topic("numbers"), 1)
        await sees(system, worker, as_seen(rows_of(50, 2)))
    await system.write("numbers", rows_of(50, 1))
    await system.has_committed("numbers", 50)
    assert sorted(value for _, value in await system.rows("results")) == sorted(2 * n * n for n in range(50))
    for worker in workers:
        assert await worker.stops() == 0
