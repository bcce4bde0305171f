"""A backlog does not fill the memory: what is not asked for is not read."""

import re
from pathlib import Path

import pytest

from tests.system.harness import STOPPED, System, Worker, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(240)]

BACKLOG = 500_000
WITHIN_S = 150
"""It is CPU that they take: on a machine that ten others use, long."""
WRITTEN_AT_ONCE = 100_000
LIMIT_MB = 200


def peak_mb(worker: Worker) -> float:
    """The most memory the process has had at once."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


async def test_half_a_million_records_wait(system: System) -> None:
    system.write_app()
    await system.create("numbers")
    for start in range(0, BACKLOG, WRITTEN_AT_ONCE):
        await system.write("numbers", numbered(WRITTEN_AT_ONCE, start=start))
    worker = await system.started()
    await system.has_committed("numbers", BACKLOG, within_s=WITHIN_S)
    assert await system.count("results") == BACKLOG
    assert peak_mb(worker) < LIMIT_MB
    assert await worker.stops() == STOPPED


async def test_a_slow_agent_holds_its_input_back(system: System) -> None:
    body = """
@app.agent(numbers, sink=results)
async def slow(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        await asyncio.sleep(0.01)
        yield number
"""
    system.write_app(body)
    await system.create("numbers")
    for start in range(0, BACKLOG, WRITTEN_AT_ONCE):
        await system.write("numbers", numbered(WRITTEN_AT_ONCE, start=start))
    worker = await system.started()
    await system.has("results", 500)
    assert peak_mb(worker) < LIMIT_MB
    assert await worker.stops() == STOPPED
