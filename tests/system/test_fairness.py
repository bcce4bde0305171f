"""Between records no agent starves another, a timer, or the web server."""

import re

import pytest

from tests.system.harness import STOPPED, System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(150)]

WITHIN_S = 100
"""The agents burn seconds of CPU: on a machine that ten others use, these take long."""

BACKLOG = 600
APP = """
quick_in = app.topic(ID + "-quick", key_type=str, value_type=int)
quick_out = app.topic(ID + "-quick-out", key_type=str, value_type=int)

def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

@app.agent(numbers, sink=results)
async def heavy(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        burn(HEAVY_S(number))
        yield number

@app.agent(quick_in, sink=quick_out)
async def quick(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number

last = time.process_time()  # of this process: what others on the machine take is not the worker's doing

@app.timer(0.1)
async def tick() -> None:
    global last
    now = time.process_time()
    print(f"tick {now - last:.3f}", flush=True)
    last = now
"""


def pauses(said: str) -> list[float]:
    """Seconds of CPU between one tick and the next, the first (the start) left out."""
    return [float(text) for text in re.findall(r"tick (\d+\.\d+)", said)][1:]


async def test_a_heavy_agent_leaves_room_for_others(system: System) -> None:
    system.write_app(APP.replace("HEAVY_S(number)", "0.005"))
    await system.create("numbers", "quick")
    await system.write("numbers", numbered(BACKLOG))
    await system.write("quick", numbered(BACKLOG))
    worker = await system.started()
    await system.has("quick-out", BACKLOG, within_s=WITHIN_S)
    assert await system.count("results") < BACKLOG  # the quick one did not have to wait for the heavy one's end
    await system.has("results", BACKLOG, within_s=WITHIN_S)
    ticks = pauses(worker.said)
    assert len(ticks) >= 10  # 3 s of work leave room for 30
    assert sorted(ticks)[len(ticks) // 2] < 0.5
    assert (await worker.get("/live"))[0] == 200
    assert await worker.stops() == STOPPED


async def test_records_that_become_heavy_all_at_once(system: System) -> None:
    system.write_app(APP.replace("HEAVY_S(number)", "0 if number < 20_000 else 0.02"), partitions=1)
    await system.create("numbers", partitions=1)
    await system.write("numbers", numbered(20_250))
    worker = await system.started()
    await system.has("results", 20_250, within_s=WITHIN_S)
    assert max(pauses(worker.said)) < 3  # not as long as a run of them takes, which is 5 s
    assert await worker.stops() == STOPPED
