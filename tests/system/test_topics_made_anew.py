"""A topic that is deleted and made anew under a running worker: its offsets start again, and so do the group's."""

import re

import pytest

from streamflow.errors import StreamFlowError
from streamflow.log.api import NewTopic
from tests.system.harness import System, numbered, until

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.mark.kafka
async def test_offsets_of_the_topic_before_are_not_taken_for_those_of_the_new_one(kafka: System) -> None:
    kafka.write_app(partitions=1)
    await kafka.create("numbers", partitions=1)
    await kafka.write("numbers", numbered(100))
    worker = await kafka.started()
    await kafka.has_committed("numbers", 100)

    admin = (await kafka.log()).admin
    name = kafka.topic("numbers")
    await admin.delete([name])

    async def is_gone() -> bool:
        return name not in await admin.describe([name])

    await until(is_gone, "the deletion")
    await admin.create([NewTopic(name, 1)])
    await worker.says("the topic was made anew")

    async def is_back() -> bool:
        return await kafka.committed("numbers") == {0: 0}

    await until(is_back, "the offset of the new topic", 10)
    await kafka.write("numbers", numbered(30, start=100))
    await kafka.has("results", 130)
    assert await worker.stops() == 0
    assert await kafka.committed("numbers") == {0: 30}

    await kafka.write("numbers", numbered(100, start=130))  # past where the old offset stood
    again = await kafka.started()
    await kafka.has("results", 230)
    assert await again.stops() == 0
    assert sorted(value for _, value in await kafka.rows("results")) == [2 * number for number in range(230)]


@pytest.mark.kafka
async def test_nothing_of_a_topic_that_is_made_anew_and_filled_at_once_is_passed_over(kafka: System) -> None:
    """Where the old offset lies within the new topic, nothing is out of range."""
    kafka.write_app(partitions=4)
    workers = [kafka.start(), kafka.start()]
    for worker in workers:
        await worker.owns(kafka.topic("numbers"), 2)
    await kafka.write("numbers", numbered(200))
    await kafka.has_committed("numbers", 200)

    admin = (await kafka.log()).admin
    name = kafka.topic("numbers")
    await admin.delete([name])

    async def is_made() -> bool:
        try:
            await admin.create([NewTopic(name, 4)])
        except StreamFlowError:  # the old one is being deleted
            return False
        return True

    await until(is_made, "the new topic")
    await kafka.write("numbers", numbered(1_000, start=1_000))
    await kafka.has("results", 1_200)
    await kafka.has_committed("numbers", 1_000)
    for worker in workers:
        assert await worker.stops() == 0
        assert "which was made anew" in worker.said
    assert sorted(await kafka.rows("results")) == sorted(
        (key, 2 * number) for key, number in [*numbered(200), *numbered(1_000, start=1_000)]
    )


async def test_a_source_topic_that_is_deleted_stops_the_worker(system: System) -> None:
    system.write_app(partitions=2)
    await system.create("numbers", partitions=2)
    await system.write("numbers", numbered(20))
    worker = await system.started()
    await system.has_committed("numbers", 20)
    name = system.topic("numbers")
    await (await system.log()).admin.delete([name])
    assert await worker.ends(30) == 1
    assert "InternalError" not in worker.said
    assert "Traceback" not in worker.said
    assert re.search(rf"error: .*{name}.*deleted while this worker read it.*start it again", worker.said)

    again = await system.started()  # it makes the topic anew
    await system.write("numbers", numbered(5, start=20))
    await system.has("results", 25)
    assert await again.stops() == 0
