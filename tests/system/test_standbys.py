"""Standbys and warm-ups of real workers: what is killed goes on elsewhere with nothing to restore."""

import asyncio
import shutil
from collections import Counter, defaultdict
from typing import Any

import pytest

from tests.system.harness import STOPPED, System, Worker, numbered, until
from tests.system.test_local_state import SUMS, aside, restored

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(180)]

KEYS = 400
PARTITIONS = 4
GUARANTEES = ["exactly_once", "at_least_once"]


async def begin(system: System, **options: object) -> None:
    system.write_app(SUMS, log_level="INFO", commit_interval_ms=50, **options)
    await system.create("numbers", "results", partitions=PARTITIONS)


async def standbys(worker: Worker) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await worker.status())["standbys"]
    return found


async def partitions_of(worker: Worker, system: System) -> set[int]:
    return await worker.owned(system.topic("numbers"))


async def is_settled(system: System, *workers: Worker) -> None:
    """Wait until the partitions are shared out, and every other worker's tasks are followed here and level."""

    async def settled() -> bool:
        owned, followed = 0, 0
        for worker in workers:
            mine, kept = await partitions_of(worker, system), await standbys(worker)
            if len(mine) != PARTITIONS // len(workers):
                return False
            if any(each["lag"] != 0 or each["warm_up"] for each in kept):
                return False
            owned, followed = owned + len(mine), followed + len(kept)
        return owned == followed == PARTITIONS

    await until(settled, lambda: f"two workers with standbys of one another; {system.told()}", 60)


async def has_counted(system: System, sent: Counter[bytes | None], *, exactly: bool) -> None:
    """Every key is counted up one by one, to the number of its records; at least once some come again."""

    async def found() -> dict[bytes | None, list[int]]:
        counts: dict[bytes | None, list[int]] = defaultdict(list)
        for key, value in await system.rows("results"):
            counts[key].append(value)
        return counts

    async def complete() -> bool:
        counts = await found()
        return all(max(counts[key], default=0) >= count for key, count in sent.items())

    await until(complete, lambda: f"everything that was sent to be counted; {system.told()}", 60)
    counts = await found()
    for key, count in sent.items():
        values = counts[key] if exactly else list(dict.fromkeys(counts[key]))
        assert values == list(range(1, count + 1)), (key, values)


def restored_since(worker: Worker, before: dict[int, list[int]]) -> dict[int, int]:
    """What each partition's restores have read since."""
    return {
        partition: sum(records[len(before.get(partition, [])) :])
        for partition, records in restored(worker).items()
        if len(records) > len(before.get(partition, []))
    }


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_what_is_killed_goes_on_in_the_standby_with_nothing_to_restore(system: System, guarantee: str) -> None:
    await begin(system, standby_replicas=1, processing_guarantee=guarantee)
    first = await system.started()
    await system.write("numbers", numbered(2 * KEYS, keys=KEYS))
    await system.has("results", 2 * KEYS)
    second = await system.started()
    await is_settled(system, first, second)
    sent: Counter[bytes | None] = Counter()
    async with system.load("numbers", per_s=400) as acknowledged:
        await until(lambda: sum(acknowledged.values()) > 400, "some load")
        before, moving = restored(second), await partitions_of(first, system)
        first.kill()
        await second.owns(system.topic("numbers"), PARTITIONS, within_s=40)
        await until(lambda: restored_since(second, before).keys() >= moving, lambda: f"restores; {second.said}")
        found = restored_since(second, before)
        sent = acknowledged
    sent.update({b"k%d" % key: 2 for key in range(KEYS)})
    if guarantee == "exactly_once" and system.is_kafka:
        assert set(found.values()) == {0}, second.said
    else:  # on SQLite who was killed is known as dead at once: what it wrote in the last moment is on its way
        assert sum(found.values()) <= sum(sent.values()) / 4, second.said  # a commit or two, of the whole changelog
    await has_counted(system, sent, exactly=guarantee == "exactly_once")
    assert aside(system) == []
    assert await second.stops() == STOPPED


async def test_a_task_with_state_moves_to_a_new_worker_when_that_has_its_state(system: System) -> None:
    """Its owner goes on until then; then next to nothing is left to restore."""
    keys = 30_000
    await begin(system, acceptable_lag_records=100, max_warmup_replicas=2)
    first = await system.started()
    await system.write("numbers", numbered(keys, keys=keys))
    await system.has_committed("numbers", keys, within_s=60)
    async with system.load("numbers", per_s=200) as acknowledged:
        second = await system.started()
        seen: set[str] = set()
        gaps: list[tuple[int, int]] = []

        async def has_moved() -> bool:
            mine, theirs = await partitions_of(first, system), await partitions_of(second, system)
            seen.update(each["task"] for each in await standbys(second) if each["warm_up"])
            gaps.append((len(mine), len(theirs)))
            return len(theirs) == PARTITIONS // 2

        await until(has_moved, lambda: f"half of the tasks to move; {system.told()}", 60)
        # Each was warmed up first, and none of the restores found more than what came in between.
        await until(lambda: len(restored(second)) == PARTITIONS // 2, lambda: second.said)
        assert {int(task.rpartition("-")[2]) for task in seen} >= restored(second).keys(), (seen, second.said)
        assert sum(sum(each) for each in restored(second).values()) <= 400, second.said
        sent = acknowledged
    assert "warmed up" in second.said
    sent.update({b"k%d" % key: 1 for key in range(keys)})
    assert await count_of(system, "results", sum(sent.values()))
    assert aside(system) == []
    assert await first.stops() == STOPPED
    assert await second.stops() == STOPPED


async def count_of(system: System, name: str, count: int) -> bool:
    await system.has(name, count, within_s=40)
    return await system.count(name) == count


async def test_a_standby_that_was_wiped_is_filled_again(system: System) -> None:
    await begin(system, standby_replicas=1)
    first = await system.started()
    await system.write("numbers", numbered(2 * KEYS, keys=KEYS))
    await system.has("results", 2 * KEYS)
    second = await system.started()
    await is_settled(system, first, second)
    assert await second.stops() == STOPPED
    shutil.rmtree(system.folder / "data" / system.app_id / "1")
    second = await system.started()
    await is_settled(system, first, second)
    before, moving = restored(second), await partitions_of(first, system)
    first.kill()
    await second.owns(system.topic("numbers"), PARTITIONS, within_s=40)
    await until(lambda: restored_since(second, before).keys() >= moving, lambda: f"restores; {second.said}")
    assert set(restored_since(second, before).values()) == {0}, second.said
    await system.write("numbers", numbered(KEYS, keys=KEYS))
    await has_counted(system, Counter({b"k%d" % key: 3 for key in range(KEYS)}), exactly=True)
    assert await second.stops() == STOPPED


async def test_workers_that_come_and_go_leave_no_store_with_two_users(system: System) -> None:
    await begin(system, standby_replicas=1)
    first = await system.started()
    sent: Counter[bytes | None] = Counter()
    async with system.load("numbers", per_s=400) as acknowledged:
        await system.has("results", 200)
        for turn in range(3):
            second = await system.started()
            await is_settled_under_load(system, first, second)
            if turn == 1:
                second.kill()
            else:
                assert await second.stops() == STOPPED
            await first.owns(system.topic("numbers"), PARTITIONS, within_s=40)
        sent = acknowledged
    await has_counted(system, sent, exactly=True)
    assert aside(system) == []
    for worker in system.workers:
        assert "is already open" not in worker.said
        assert "LOCK" not in worker.said
        assert "Traceback" not in worker.said
    assert await first.stops() == STOPPED


async def is_settled_under_load(system: System, *workers: Worker) -> None:
    """As `is_settled`, while lags come and go."""

    async def settled() -> bool:
        owned = [len(await partitions_of(worker, system)) for worker in workers]
        kept = [await standbys(worker) for worker in workers]
        followed = [each for of_worker in kept for each in of_worker if not each["warm_up"] and each["lag"] is not None]
        return owned == [PARTITIONS // len(workers)] * len(workers) and len(followed) == PARTITIONS

    await until(settled, lambda: f"two workers with standbys of one another; {system.told()}", 60)


async def test_state_that_lies_there_from_before_counts(system: System) -> None:
    """Both are killed; each gets back what it has, and restores next to nothing."""
    await begin(system, acceptable_lag_records=10_000)
    first, second = await system.started(), await system.started()
    await asyncio.gather(
        *(each.owns(system.topic("numbers"), PARTITIONS // 2, within_s=60) for each in (first, second))
    )
    await system.write("numbers", numbered(2 * KEYS, keys=KEYS))
    await system.has_committed("numbers", 2 * KEYS)
    before = await partitions_of(first, system), await partitions_of(second, system)
    assert await second.stops() == STOPPED
    assert await first.stops() == STOPPED
    first = system.start()
    await first.says("web +http")
    second = system.start()
    for worker in (first, second):
        await worker.owns(system.topic("numbers"), PARTITIONS // 2, within_s=60)
    after = await partitions_of(first, system), await partitions_of(second, system)
    assert set(map(frozenset, before)) == set(map(frozenset, after)), system.told()
