"""A worker that is told to stop while another process holds the file's write lock: in time, with the reason."""

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.harness import System, numbered

pytestmark = [pytest.mark.system, pytest.mark.slow]

LOCKER = """
import sqlite3, sys
sql = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=20)
sql.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""
WAITS = """
@app.agent(numbers, sink=results)
async def wait(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        if number == 100:
            print("waiting", flush=True)
            while not (HERE / "go").exists():
                await asyncio.sleep(0.01)
        yield number * 2
"""


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path, f"sqlite:///{tmp_path / 'log.db'}") as system:
        yield system


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Another process holds the write lock; yields its id."""
    locker = subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert locker.stdin is not None
    assert locker.stdout is not None
    try:
        assert locker.stdout.readline() == "locked\n"
        yield locker.pid
    finally:
        locker.kill()
        locker.wait()
        locker.stdin.close()
        locker.stdout.close()


async def test_a_stop_does_not_wait_for_a_foreign_lock_and_loses_nothing(system: System, tmp_path: Path) -> None:
    system.write_app(WAITS, partitions=1)
    await system.create("numbers", partitions=1)
    await system.write("numbers", numbered(100))
    worker = await system.started()
    await system.has_committed("numbers", 100)
    await system.write("numbers", numbered(50, start=100))
    await worker.says("waiting")
    with locked(tmp_path / "log.db") as pid:
        (tmp_path / "go").touch()
        assert await worker.stops(10) == 0
        assert f"held by process {pid}" in worker.said
        assert "Nothing was stored" in worker.said
        assert "the log did not answer the last commit; what it held is processed again" in worker.said
        assert "Traceback" not in worker.said
    assert await system.committed("numbers") == {0: 100}
    assert [value for _, value in await system.rows("results")] == [2 * number for number in range(100)]
    sql = sqlite3.connect(tmp_path / "log.db")
    try:
        assert sql.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        sql.close()

    again = await system.started()
    await system.has_committed("numbers", 150)
    assert await again.stops(10) == 0
    assert [value for _, value in await system.rows("results")] == [2 * number for number in range(150)]


async def test_a_stop_before_the_start_is_over_does_not_wait_for_a_foreign_lock(system: System, tmp_path: Path) -> None:
    system.write_app(WAITS, partitions=1)
    await system.create("numbers", partitions=1)  # the file is there, the app's other topics are not
    with locked(tmp_path / "log.db") as pid:
        worker = system.start()
        await worker.says(f"held by process {pid}")
        assert await worker.stops(10) == 0
        assert "the start was not over yet" in worker.said
        assert "Traceback" not in worker.said
