"""Every command while a worker runs on the same SQLite file, under load."""

import asyncio
import json
from typing import Any

import pytest

from tests.system.harness import DOUBLE, STOPPED, System, Worker

pytestmark = [pytest.mark.system, pytest.mark.slow]

LINES = 1_000


async def lines(command: Worker) -> list[Any]:
    """Wait until a command has succeeded; what it printed on standard output, decoded."""
    assert await command.ends() == STOPPED, command.said
    return [json.loads(line) for line in command.out.splitlines()]


async def test_all_commands_beside_a_busy_worker(sqlite: System) -> None:
    sqlite.write_app("single = app.topic(ID + '-single', key_type=str, value_type=int)\n" + DOUBLE)
    await sqlite.create("numbers")
    (sqlite.folder / "lines.txt").write_text("".join(f"{number}\n" for number in range(LINES)))
    single, results = sqlite.topic("single"), sqlite.topic("results")
    async with sqlite.load("numbers", per_s=500) as sent:
        worker = await sqlite.started()
        sends = [sqlite.command("send", "app.py", single, "--file", "lines.txt", "--key", "k") for _ in range(2)]
        for send in sends:
            assert await send.ends() == STOPPED, send.said
        tailed = await lines(sqlite.command("tail", "app.py", single, "--json", "--limit", str(2 * LINES)))
        values = [record["value"] for record in tailed]
        assert sorted(values) == sorted([*range(LINES)] * 2)
        assert [record["offset"] for record in tailed] == list(range(2 * LINES))

        await sqlite.has("results", 10)
        some = await lines(sqlite.command("tail", "app.py", results, "--json", "--limit", "10"))
        assert len(some) == 10
        assert set(some[0]) == {"topic", "partition", "offset", "timestamp_ms", "key", "value", "headers"}
        (topic,) = (
            found
            for found in await lines(sqlite.command("topics", "app.py", "--json"))
            if found["topic"] == sqlite.topic("numbers")
        )
        (group,) = topic["groups"]
        assert group["group"] == sqlite.app_id
        assert group["lag"] >= 0
        (agent,) = await lines(sqlite.command("agents", "app.py", "--json"))
        assert agent["name"] == "double"
        (graph,) = await lines(sqlite.command("topology", "app.py", "--json"))
        assert graph
        await sqlite.has("results", await sqlite.count("results") + 100)
        assert worker.runs
    await sqlite.has_committed("numbers", sent.total())
    assert await worker.stops() == STOPPED
    assert await sqlite.count("results") == sent.total()


async def test_a_sent_record_is_processed_within_a_moment(sqlite: System) -> None:
    sqlite.write_app()
    worker = await sqlite.started()
    tail = sqlite.command("tail", "app.py", sqlite.topic("results"), "--json", "--limit", "1")
    send = sqlite.command("send", "app.py", sqlite.topic("numbers"), "21", "--key", "k")
    assert await send.ends() == STOPPED
    (record,) = await lines(tail)
    assert (record["key"], record["value"]) == ("k", 42)
    await asyncio.gather(*(each.ends() for each in (tail, send)))
    assert await worker.stops() == STOPPED
