"""Asking an agent in another process."""

import asyncio
import json

import pytest

from tests.system.harness import STOPPED, System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow]

APP = """
import json
import sys

@app.agent(numbers, sink=results, on_error=sf.Skip())
async def double(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        if number == 13:
            raise ValueError("thirteen")
        if number == 99:
            print("taken", flush=True)
            await asyncio.sleep(60)
        yield number * 2

async def ask(number: int, timeout_s: float) -> object:
    try:
        return await double.ask(number, key=f"k{number}", timeout_s=timeout_s)
    except (sf.AskError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"

async def main(asked: list[int], timeout_s: float) -> None:
    async with app.client():
        print(json.dumps(await asyncio.gather(*(ask(number, timeout_s) for number in asked))))

if __name__ == "__main__":
    asyncio.run(main([int(text) for text in sys.argv[2:]], float(sys.argv[1])))
"""


def asking(system: System, *asked: int, timeout_s: float = 20) -> asyncio.Task[list[object]]:
    """Ask from a process of its own."""
    asker = system.program("app.py", str(timeout_s), *map(str, asked))

    async def answers() -> list[object]:
        assert await asker.ends() == STOPPED, asker.said
        found: list[object] = json.loads(asker.out)
        return found

    return asyncio.create_task(answers())


async def test_answers_come_to_who_asked(system: System) -> None:
    system.write_app(APP)
    workers = [await system.started(), await system.started()]
    askers = [asking(system, *range(start, start + 10)) for start in (20, 40, 60)]
    for start, asker in zip((20, 40, 60), askers, strict=True):
        assert await asker == [2 * number for number in range(start, start + 10)]
    assert len(await system.rows("results")) == 30
    for worker in workers:
        assert await worker.stops() == STOPPED


async def test_an_error_of_the_agent_comes_to_who_asked(system: System) -> None:
    system.write_app(APP)
    worker = await system.started()
    good, bad = await asking(system, 1, 13)
    assert good == 2
    assert isinstance(bad, str)
    assert bad.startswith("AskError")
    assert "thirteen" in bad
    assert await worker.stops() == STOPPED


async def test_who_asks_a_dead_worker_is_told_in_time(system: System) -> None:
    system.write_app(APP)
    assert "TimeoutError" in str(await asking(system, 1, timeout_s=1))
    worker = await system.started()
    asker = asking(system, 99, timeout_s=3)
    await worker.says("taken")
    worker.kill()
    (answer,) = await asker
    assert str(answer).startswith("TimeoutError")
    await system.write("numbers", numbered(1))
