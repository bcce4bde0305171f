"""Real workers that lose their sessions and live: they have their state yet."""

import signal

import pytest

from tests.system.harness import STOPPED, System, numbered, until
from tests.system.test_local_state import SUMS, restored
from tests.system.test_rebalancing import states_of

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.kafka, pytest.mark.timeout(180)]

PARTITIONS = 12
KEYS = 3_000


async def test_workers_that_all_stood_still_have_back_what_they_had_with_nothing_to_restore(kafka: System) -> None:
    """As when their machine was paused. The group has forgotten all of them when the first one comes.

    Who comes first may have everything for a moment.
    """
    kafka.write_app(SUMS, log_level="INFO", acceptable_lag_records=0)
    await kafka.create("numbers", "results", partitions=PARTITIONS)
    first, *workers = [await kafka.started() for _ in range(3)]
    await kafka.write("numbers", numbered(KEYS, keys=KEYS))
    await kafka.has_committed("numbers", KEYS)
    assert await first.stops() == STOPPED  # so that who has what is not what comes about if all start anew
    workers.append(await kafka.started())
    before = [await worker.owns(kafka.topic("numbers"), PARTITIONS // 3, within_s=60) for worker in workers]
    await kafka.write("numbers", numbered(KEYS, keys=KEYS))  # nobody else is level with any of it
    await kafka.has_committed("numbers", 2 * KEYS)
    async with states_of(kafka) as state:
        for worker in workers:
            worker.signal(signal.SIGSTOP)

        async def is_empty() -> bool:
            return await state() == "Empty"

        await until(is_empty, kafka.told)
        for worker in workers:
            worker.signal(signal.SIGCONT)
    known = [{tp: len(records) for tp, records in restored(worker).items()} for worker in workers]
    for worker in workers:
        await worker.says("lost: ")

    async def have_back() -> bool:
        return [await worker.owned(kafka.topic("numbers")) for worker in workers] == before

    await until(have_back, kafka.told)
    for worker, mine, counts in zip(workers, before, known, strict=True):
        await worker.ready()
        again = {partition: records[counts.get(partition, 0) :] for partition, records in restored(worker).items()}
        assert [again[partition][-1] for partition in mine] == [0] * len(mine), worker.said
    await kafka.write("numbers", numbered(KEYS, keys=KEYS))
    await kafka.has("results", 3 * KEYS)
    for worker in workers:
        assert await worker.stops() == STOPPED
