"""What stops a worker, or keeps it from starting: exit codes, and messages that say what to do."""

import pytest

from tests.system.harness import STOPPED, System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow]

POISON = """
@app.agent(numbers, sink=results)
async def picky(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        if number == 5 and not os.environ.get("FIXED"):
            raise ValueError("five is right out")
        yield number
"""


async def test_a_record_that_fails_stops_the_worker(system: System) -> None:
    system.write_app(POISON, partitions=1)
    await system.create("numbers", partitions=1)
    await system.write("numbers", numbered(10))
    for _ in range(2):
        worker = system.start()
        assert await worker.ends() == 1
        assert f"{system.topic('numbers')}-0-5" in worker.said
        assert "five is right out" in worker.said
        assert "on_error=sf.Skip()" in worker.said
        assert await system.committed("numbers") == {0: 5}
        assert [value for _, value in await system.rows("results")] == list(range(5))
    fixed = system.start(FIXED="1")
    await system.has("results", 10)
    assert await fixed.stops() == STOPPED
    assert [value for _, value in await system.rows("results")] == list(range(10))


async def test_a_wrong_partition_count_is_refused(system: System) -> None:
    system.write_app("strict = app.topic(ID + '-strict', partitions=3)\n" + POISON)
    await system.create("strict", partitions=5)
    worker = system.start()
    assert await worker.ends() == 2
    assert "has 5 partitions, but partitions=3 was declared" in worker.said
    assert "Traceback" not in worker.said


async def test_in_a_structured_log_and_among_several_processes_it_is_one_line(sqlite: System) -> None:
    sqlite.write_app("strict = app.topic(ID + '-strict', partitions=3)\n" + POISON)
    await sqlite.create("strict", partitions=5)
    for arguments in (("--log-format", "json"), ("--processes", "2")):
        worker = sqlite.start(*arguments)
        assert await worker.ends() == 2
        (line, *_) = [line for line in worker.said.splitlines() if "CRITICAL" in line]
        assert "has 5 partitions, but partitions=3 was declared" in line
        assert "Traceback" not in worker.said


async def test_a_missing_topic_that_may_not_be_created_is_refused(system: System) -> None:
    system.write_app("there = app.topic(ID + '-there', create=False)\n" + POISON)
    worker = system.start()
    assert await worker.ends() == 2
    assert "does not exist, and create=False forbids creating it" in worker.said
    assert await system.partitions("there") == []


async def test_unknown_names(sqlite: System) -> None:
    sqlite.write_app()
    refused = sqlite.start("--comit-interval-ms", "5")
    assert await refused.ends() == 2
    assert "--commit-interval-ms" in refused.said
    warned = await sqlite.started(STREAMFLOW_COMIT_INTERVAL_MS="5")
    assert "STREAMFLOW_COMIT_INTERVAL_MS" in warned.said
    assert await warned.stops() == STOPPED


@pytest.mark.kafka
async def test_a_broker_that_never_comes(kafka: System) -> None:
    kafka.broker = "kafka://127.0.0.1:9"
    kafka.write_app(start_timeout_s=1)
    worker = kafka.start()
    assert await worker.ends() == 1
    assert "127.0.0.1:9" in worker.said
    assert "STREAMFLOW_BROKER" in worker.said
    assert "Traceback" not in worker.said
