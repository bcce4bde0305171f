"""A worker that hangs says where: its task in what it awaits, its threads where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracle.stacks import TELL_STACKS, stacks_of, telling_stacks
from tests.system.harness import System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow]

HANGS = """
async def never_told() -> None:
    await asyncio.Event().wait()

@app.agent(numbers)
async def hang(stream: sf.Stream[int]) -> None:
    async for number in stream:
        print("taken", flush=True)
        if number:
            time.sleep(1000)
        await never_told()
"""


@pytest.mark.parametrize("number", [0, 1], ids=["awaits", "blocks"])
async def test_who_hangs_says_where(number: int, tmp_path: Path) -> None:
    async with System(tmp_path, f"sqlite:///{tmp_path / 'log.db'}") as system:
        system.write_app(TELL_STACKS + HANGS, partitions=1)
        await system.create("numbers", partitions=1)
        await system.write("numbers", numbered(1, start=number))
        worker = system.start()
        await worker.says("taken")
        with pytest.raises(AssertionError, match="not within") as raised, telling_stacks([worker]):
            raise AssertionError("not within 1 s")
        note = "\n".join(raised.value.__notes__)
        assert f"pid {worker.pid}" in note
        assert ("never_told" if number == 0 else 'app.py", line') in note
        assert "_keep_beating" in note  # another thread's
        assert worker.runs


def test_nobody_runs_nobody_is_asked() -> None:
    assert stacks_of([]) == ""
