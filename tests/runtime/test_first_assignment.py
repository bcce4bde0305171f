"""`app.running()` beside members that may be dead: it enters with its partitions, or when they are surely others'."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf

DEAD = "elsewhere 1 1"  # in a process namespace that nobody can look into


@pytest.fixture
async def counts(tmp_path: Path) -> Any:
    """A table that has counted one record, and whose worker is gone."""
    app = sf.App(
        "counting",
        broker=f"sqlite:///{tmp_path}/log.db",
        data_dir=tmp_path,
        partitions=1,
        web=False,
        heartbeat_interval_ms=100,
        session_timeout_ms=1_000,
    )
    numbers = app.topic("numbers", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int, default=int)

    @app.agent(numbers)
    async def count(stream: sf.Stream[int]) -> None:
        async for event in stream.events():
            table[event.key] += event.value

    async with app.running():
        await table.update_async("a", lambda value: value + 1)
    return table


def left_by_another(path: Path, session_timeout_ms: int) -> None:
    """Give all partitions to a member in a process that cannot be looked at."""
    with closing(sqlite3.connect(path / "log.db")) as sql, sql:
        topics = json.dumps(sorted({topic for (topic,) in sql.execute("SELECT DISTINCT topic FROM owners")}))
        sql.execute(
            "INSERT INTO members (group_id, member_id, topics, process, session_timeout_ms) "
            "VALUES ('counting', 'another', ?, ?, ?)",
            (topics, DEAD, session_timeout_ms),
        )
        sql.execute("UPDATE owners SET member_id = 'another', target = 'another'")


async def test_partitions_of_a_member_that_may_be_dead_are_waited_for_and_it_is_named(
    counts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamflow")
    left_by_another(tmp_path, 2_500)
    async with counts.app.running():
        assert dict(counts) == {"a": 1}
    assert "waiting for 1 partitions held by member another (process 1)" in caplog.text
    assert "its session ends, at most 2.5 s" in caplog.text


async def test_a_worker_enters_without_partitions_when_who_holds_them_is_heard_of(counts: Any, tmp_path: Path) -> None:
    left_by_another(tmp_path, 600_000)

    async def beat() -> None:
        while True:
            with closing(sqlite3.connect(tmp_path / "log.db")) as sql, sql:
                sql.execute("UPDATE members SET beat = beat + 1 WHERE member_id = 'another'")
            await asyncio.sleep(0.05)

    beating = asyncio.create_task(beat())
    async with asyncio.timeout(30), counts.app.running() as worker:
        assert counts.partitions == frozenset()
        assert worker.status().state == "running"
    beating.cancel()
