"""A topic on a real broker that gets more partitions under a running worker: the new ones are processed whole."""

import pytest

from tests.system.harness import System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.kafka]


async def test_records_of_new_partitions_are_not_lost_where_workers_start_at_the_end(kafka: System) -> None:
    kafka.write_app(partitions=2, auto_offset_reset="latest")
    await kafka.create("numbers", partitions=2)
    worker = await kafka.started(STREAMFLOW_KAFKA_METADATA_MAX_AGE_MS="1000")
    await kafka.write("numbers", numbered(100))
    await kafka.has("results", 100)
    await kafka.grow("numbers", 4)
    await kafka.write("numbers", numbered(100, start=100))
    await worker.says("partitions or more, and had 2 when this worker started")
    await kafka.has("results", 200)
    assert await worker.stops() == 0
    assert sorted(value for _, value in await kafka.rows("results")) == [2 * number for number in range(200)]
