"""The local state of real workers: killed, wiped, copied, damaged, half-written, held by another process."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.harness import STOPPED, System, Worker, numbered, until

pytestmark = [pytest.mark.system, pytest.mark.slow]
EVERY_LOG = ["sqlite", *(pytest.param(name, marks=pytest.mark.kafka) for name in ("kafka", "old_kafka"))]

SUMS = """
totals = app.table("totals", key_type=str, value_type=int, default=int)

@app.agent(numbers, sink=results)
async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for key, number in stream.items():
        totals[key] += 1
        yield totals[key]
"""
KEYS = 400
TASKS = 2


def restored(worker: Worker) -> dict[int, list[int]]:
    """How many records each restore of each task has read, by partition."""
    found: dict[int, list[int]] = {}
    for tasks in re.findall(r"restored \d+ records in [\d.]+ s \(\d+/s\): (.*)", worker.said):
        for partition, records in re.findall(r"-(\d+) (\d+)", tasks):
            found.setdefault(int(partition), []).append(int(records))
    return found


async def all_restored(worker: Worker) -> int:
    """Wait until it is ready; the sum of what it has restored."""
    await worker.ready()
    assert len(restored(worker)) == TASKS, worker.said
    return sum(sum(each) for each in restored(worker).values())


def stores(system: System, slot: int = 0) -> list[Path]:
    """The directories of the tasks' stores."""
    found = (system.folder / "data" / system.app_id / str(slot)).glob("*-numbers-?")
    return sorted(path for path in found if ".aside-" not in path.name)


def aside(system: System) -> list[str]:
    """Why stores were set aside."""
    return sorted(path.name.rpartition("Z-")[2] for path in (system.folder / "data").glob("**/*.aside-*"))


class Counted:
    """An app that has counted, and what its counts must be."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.rounds = 0

    async def begin(self, **options: object) -> None:
        self.system.write_app(SUMS, log_level="INFO", **options)
        await self.system.create("numbers", "results", partitions=TASKS)

    async def count(self) -> None:
        """One more record of each key."""
        self.rounds += 1
        await self.system.write("numbers", numbered(KEYS, keys=KEYS))
        await self.system.has("results", KEYS * self.rounds)
        await self.system.has_committed("numbers", KEYS * self.rounds)

    async def check(self) -> None:
        """Every key was counted up one by one: no value was ever wrong."""
        rows = await self.system.rows("results")
        for key in {key for key, _ in rows}:
            assert [value for each, value in rows if each == key] == list(range(1, self.rounds + 1)), key


@pytest.fixture
async def counted(system: System) -> Counted:
    counted = Counted(system)
    await counted.begin()
    return counted


async def stored(system: System, counted: Counted) -> None:
    """A run that has counted twice and was stopped cleanly."""
    worker = await system.started()
    await counted.count()
    await counted.count()
    assert await worker.stops() == STOPPED


@pytest.mark.parametrize("system", EVERY_LOG, indirect=True)
async def test_a_clean_restart_restores_nothing_and_a_killed_worker_only_what_it_had_not_stored(
    system: System, counted: Counted
) -> None:
    await stored(system, counted)
    worker = await system.started()
    assert await all_restored(worker) == 0
    await counted.count()
    worker.kill()
    worker = await system.started()
    assert await all_restored(worker) <= KEYS  # of 3 * KEYS in the log
    await counted.count()
    await counted.check()
    assert aside(system) == []
    assert await worker.stops() == STOPPED


@pytest.mark.parametrize("system", EVERY_LOG, indirect=True)
async def test_local_state_that_is_gone_is_restored_from_the_log_and_counted_in_the_metrics(
    system: System, counted: Counted
) -> None:
    await stored(system, counted)
    shutil.rmtree(system.folder / "data" / system.app_id)
    worker = await system.started()
    assert await all_restored(worker) == 2 * KEYS
    metrics = (await worker.get("/metrics"))[1]
    assert f'streamflow_restored_records_total{{table="totals"}} {2 * KEYS}.0' in metrics
    await counted.count()
    await counted.check()


def swap(paths: list[Path]) -> None:
    first, second = paths
    middle = first.with_name("middle")
    first.rename(middle)
    second.rename(first)
    middle.rename(second)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + 40] = bytes(byte ^ 0xFF for byte in data[at : at + 40])
    file.write_bytes(data)


def newest(path: Path, pattern: str) -> Path:
    return max(path.glob(pattern), key=lambda file: file.stat().st_size)


def damage_manifests(paths: list[Path]) -> None:
    for path in paths:
        flip(newest(path, "MANIFEST-*"), 20)


def lose_files(paths: list[Path]) -> None:
    for path in paths:
        for file in path.glob("*.sst"):
            file.unlink()


def cut_manifests(paths: list[Path]) -> None:
    """Half-written: as on a disk that went away."""
    for path in paths:
        manifest = newest(path, "MANIFEST-*")
        manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 3])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(swap, "partition"), (damage_manifests, "damaged"), (lose_files, "damaged"), (cut_manifests, "damaged")],
    ids=["of another task", "flipped bytes", "files lost", "half-written"],
)
async def test_a_store_that_does_not_fit_is_set_aside_and_rebuilt(
    sqlite: System, spoil: Callable[[list[Path]], None], reason: str
) -> None:
    counted = Counted(sqlite)
    await counted.begin()
    await stored(sqlite, counted)
    spoil(stores(sqlite))
    worker = await sqlite.started()
    assert await all_restored(worker) == 2 * KEYS
    assert aside(sqlite) == [reason] * TASKS
    assert "cannot be used" in worker.said
    await counted.count()
    await counted.check()


async def test_a_store_of_another_app_is_set_aside(sqlite: System) -> None:
    counted = Counted(sqlite)
    await counted.begin()
    await stored(sqlite, counted)
    other = sqlite.folder / "data" / f"{sqlite.app_id}-other"
    shutil.copytree(sqlite.folder / "data" / sqlite.app_id, other)
    (sqlite.folder / "app.py").write_text(
        (sqlite.folder / "app.py").read_text().replace("app = sf.App(ID,", 'app = sf.App(ID + "-other",')
    )
    worker = await sqlite.started()
    await until(lambda: aside(sqlite) == ["app"] * TASKS, worker.said)
    await sqlite.has("results", 4 * KEYS)  # it has counted everything anew, for itself
    rows = await sqlite.rows("results")
    assert sorted(value for key, value in rows if key == b"k0") == [1, 1, 2, 2]


async def test_an_older_copy_of_a_store_catches_up(system: System, counted: Counted) -> None:
    worker = await system.started()
    await counted.count()
    assert await worker.stops() == STOPPED
    before = system.folder / "before"
    data = system.folder / "data" / system.app_id
    shutil.copytree(data, before)
    worker = await system.started()
    await counted.count()
    await counted.count()
    assert await worker.stops() == STOPPED
    shutil.rmtree(data)
    shutil.copytree(before, data)
    worker = await system.started()
    assert await all_restored(worker) == 2 * KEYS  # of 3 * KEYS in the log
    await counted.count()
    await counted.check()
    assert aside(system) == []


async def test_blocks_that_turn_out_damaged_while_it_runs_cost_no_record(sqlite: System) -> None:
    """The files open; what is wrong shows when a key is read."""
    counted = Counted(sqlite)
    await counted.begin()
    await stored(sqlite, counted)
    for path in stores(sqlite):
        for file in path.glob("*.sst"):
            flip(file, 100)
    worker = await sqlite.started()
    await counted.count()
    await counted.check()
    assert worker.runs
    assert set(aside(sqlite)) == {"damaged"}


async def test_a_second_worker_on_the_same_data_has_a_slot_of_its_own_and_takes_over_the_stores_of_a_dead_one(
    system: System, counted: Counted
) -> None:
    first = await system.started()
    await counted.count()
    second = await system.started()
    await first.owns(system.topic("numbers"), 1)
    await second.owns(system.topic("numbers"), 1)
    await counted.count()
    assert len(stores(system, 1)) == 1
    first.kill()
    await second.owns(system.topic("numbers"), 2)
    assert "was taken over from a free slot" in second.said
    await counted.count()
    await counted.check()
    assert len(stores(system, 1)) == 2
    assert aside(system) == []


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_stopped_worker_keeps_its_slot_and_its_stores(system: System, guarantee: str) -> None:
    """Its partitions go to another worker, which restores them; when it wakes up it starts anew, and all is right."""
    counted = Counted(system)
    await counted.begin(processing_guarantee=guarantee, session_timeout_ms=6_000 if system.is_kafka else 2_000)
    first = await system.started()
    await counted.count()
    first.signal(signal.SIGSTOP)
    second = system.start()
    await second.owns(system.topic("numbers"), 2)
    of_tasks = await all_restored(second)
    if system.is_kafka:
        assert of_tasks == KEYS
    else:  # it is let in while the first one's session runs, and has a warm-up meanwhile: that one's keys are here
        assert 0 < of_tasks < KEYS
    await counted.count()
    first.signal(signal.SIGCONT)
    await first.owns(system.topic("numbers"), 1)
    await counted.count()
    await counted.check()
    assert aside(system) == []


@pytest.mark.parametrize("is_wiped", [False, True], ids=["kept", "wiped"])
async def test_a_changelog_made_anew_is_told_by_its_id(system: System, counted: Counted, is_wiped: bool) -> None:
    """Its values are gone, and the offsets are not: to go on would count from nothing in the middle."""
    await stored(system, counted)
    admin = (await system.log()).admin
    changelog = f"{system.app_id}-totals-changelog"
    await admin.delete([changelog])

    async def is_gone() -> bool:
        return not await admin.describe([changelog])

    await until(is_gone, "the changelog is deleted")
    if is_wiped:
        shutil.rmtree(system.folder / "data" / system.app_id)
    worker = system.start()
    assert await worker.ends() == 2
    assert f"the changelog '{changelog}' of table 'totals' was deleted and made anew" in worker.said
    assert "streamflow reset APP" in worker.said


async def test_a_table_is_not_ready_until_it_is_restored(sqlite: System) -> None:
    """And says how far it is: `/ready`, the page, the status."""
    counted = Counted(sqlite)
    await counted.begin()
    await stored(sqlite, counted)
    shutil.rmtree(sqlite.folder / "data" / sqlite.app_id)
    slow = SUMS.replace("default=int)", "default=int, on_recover=wait)")
    wait = """
async def wait(partition: int) -> None:
    print("restored", partition, flush=True)
    while not (HERE / "go").exists():
        await asyncio.sleep(0.02)

"""
    sqlite.write_app(wait + slow, log_level="INFO")
    worker = sqlite.start()
    await worker.says("restored [01]")
    code, text = await worker.get("/ready")
    assert code == 503
    assert re.search(r"restoring task \S+-[01]: \d+ records so far, 0 to go", text), text
    assert ">restoring</span>" in (await worker.get("/"))[1]
    assert (await worker.get("/live"))[0] == 200
    assert "streamflow_restore_remaining_records{" in (await worker.get("/metrics"))[1]
    (sqlite.folder / "go").touch()
    await worker.ready()
    assert ">running</span>" in (await worker.get("/"))[1]
    assert "streamflow_restore_remaining_records{" not in (await worker.get("/metrics"))[1]
