"""Tables read, exported and imported, and apps reset, by real commands beside and after real workers on each log."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.system.harness import STOPPED, Row, System, numbered, per_key, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

REFUSED = 2
TOTALS = """
totals = app.table("totals", key_type=str, value_type=int, default=int)

@app.agent(numbers, sink=results)
async def total(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for event in stream.events():
        totals[event.key] += event.value
        yield totals[event.key]
"""
GUARANTEES = ("exactly_once", "at_least_once")


def sums(rows: Iterable[Row]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for key, value in rows:
        assert key is not None
        found[key.decode()] += value
    return dict(found)


async def said(system: System, *arguments: str, code: int = STOPPED) -> str:
    """What a command prints on standard output; its errors too where it is to fail."""
    command = system.command(*arguments)
    assert await command.ends() == code, command.said
    return command.out if code == STOPPED else command.said


async def table(system: System) -> dict[str, int]:
    rows: list[Any] = [
        json.loads(line) for line in (await said(system, "table", "scan", "app.py", "totals", "--json")).splitlines()
    ]
    keys = [row["key"] for row in rows]
    assert keys == sorted(keys)
    return {row["key"]: row["value"] for row in rows}


async def worked_off(system: System, *rows: list[Row]) -> None:
    """Run a worker over all of it, and stop it."""
    worker = await system.started()
    await system.has_committed("numbers", sum(len(each) for each in rows))
    assert await worker.stops() == STOPPED, worker.said


async def test_reading_beside_a_worker_and_moving_to_a_fresh_app(system: System, tmp_path: Path) -> None:
    first, later = numbered(200), numbered(100, start=1000)
    system.write_app(TOTALS)
    await system.create("numbers")
    await system.write("numbers", first)
    worker = await system.started()
    await system.has_committed("numbers", 200)
    assert await table(system) == sums(first)
    assert (await said(system, "table", "get", "app.py", "totals", "k3")).strip() == str(sums(first)["k3"])
    (line,) = (await said(system, "tables", "app.py", "--count", "--json")).splitlines()
    described = json.loads(line)
    assert (described["table"], described["entries"], described["entries_are_exact"]) == ("totals", 20, True)
    assert described["local_bytes"] > 0
    exported = tmp_path / "totals.jsonl"
    assert await said(system, "table", "export", "app.py", "totals", str(exported)) == ""
    for refused in (("table", "import", "app.py", "totals", str(exported)), ("reset", "app.py", "--yes")):
        assert "live" in await said(system, *refused, code=REFUSED)
    assert worker.runs
    assert await table(system) == sums(first)
    assert await worker.stops() == STOPPED

    folder = tmp_path / "fresh"
    folder.mkdir()
    async with System(folder, system.broker) as fresh:
        fresh.write_app(TOTALS)
        await fresh.create("numbers")
        await fresh.write("numbers", later)
        await said(fresh, "table", "import", "app.py", "totals", str(exported))
        assert await table(fresh) == sums(first)
        await worked_off(fresh, later)
        assert await table(fresh) == sums([*first, *later])
        assert max(value for _, value in await fresh.rows("results")) == max(sums([*first, *later]).values())


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_an_import_into_an_app_that_has_run_is_seen_by_its_local_stores(
    system: System, tmp_path: Path, guarantee: str
) -> None:
    first, later = numbered(60), numbered(40, start=500)
    system.write_app(TOTALS, processing_guarantee=guarantee)
    await system.create("numbers")
    await system.write("numbers", first)
    await worked_off(system, first)
    (tmp_path / "empty.jsonl").touch()
    refused = await said(
        system, "table", "import", "app.py", "totals", str(tmp_path / "empty.jsonl"), "--replace", code=2
    )
    assert "would delete every key of table 'totals'" in refused
    (tmp_path / "new.jsonl").write_text('{"key":"k1","value":7}\n{"key":"new","value":9}\n')
    told = json.loads(
        await said(system, "table", "import", "app.py", "totals", str(tmp_path / "new.jsonl"), "--replace", "--json")
    )
    assert told == {"table": "totals", "written": 2, "cleared": 19, "restored": 0, "offsets_set": 0}
    assert await table(system) == {"k1": 7, "new": 9}
    await system.write("numbers", later)
    await worked_off(system, first, later)
    expected = Counter(sums(later)) + Counter({"k1": 7, "new": 9})
    assert await table(system) == dict(expected)


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_after_a_reset_a_worker_computes_the_same_again(system: System, guarantee: str) -> None:
    rows = numbered(300)
    system.write_app(TOTALS, processing_guarantee=guarantee)
    await system.create("numbers")
    await system.write("numbers", rows)
    worker = await system.started()
    await system.has_committed("numbers", 300)
    before = per_key(await system.rows("results"))
    worker.kill()  # its session may outlive it; then the reset says so

    told: list[str] = []

    async def was_reset() -> bool:
        command = system.command("reset", "app.py", "--yes")
        code = await command.ends()
        assert code in (STOPPED, REFUSED), command.said
        assert code == STOPPED or "live" in command.said
        told.append(command.said)
        return code == STOPPED

    await until(was_reset, lambda: "\n".join(told))
    assert f"{system.app_id}-totals-changelog" in told[-1]
    assert await system.committed("numbers") == {}
    assert await system.partitions("totals-changelog") == []
    assert "nothing to delete" in (await _errors(system, "reset", "app.py", "--yes"))
    await worked_off(system, rows)
    assert await table(system) == sums(rows)
    after = per_key(await system.rows("results"))
    assert after == {key: [*values, *values] for key, values in before.items()}


async def _errors(system: System, *arguments: str) -> str:
    command = system.command(*arguments)
    assert await command.ends() == STOPPED, command.said
    return command.said


async def test_a_reset_to_the_latest_offset_leaves_what_was_there_unread(system: System) -> None:
    old, new = numbered(80), numbered(40, start=900)
    system.write_app(TOTALS)
    await system.create("numbers")
    await system.write("numbers", old)
    await worked_off(system, old)
    await said(system, "reset", "app.py", "--yes", "--to", "latest")
    assert sum((await system.committed("numbers")).values()) == 80
    await system.write("numbers", new)
    await worked_off(system, old, new)
    assert await table(system) == sums(new)


EARLIER = """
sums = app.table("sums", key_type=int, value_type=int, default=int)

def third(number: int) -> int:
    return number % 3

@app.agent(numbers.group_by(third, name="thirds", key_type=int))
async def add(stream: sf.Stream[int]) -> None:
    async for key, number in stream.items():
        sums[key] += number
"""


async def test_a_reset_finds_topics_that_only_an_earlier_version_of_the_app_declares(system: System) -> None:
    system.write_app(EARLIER)
    await system.create("numbers")
    await system.write("numbers", numbered(50))
    worker = await system.started()
    await system.has_committed("numbers", 50)
    assert await worker.stops() == STOPPED
    system.write_app(TOTALS)
    told = await _errors(system, "reset", "app.py", "--yes")
    left = {system.topic("sums-changelog"), system.topic("thirds-repartition")}
    assert all(f" topic {name}, which the app does not declare, about " in told for name in left)
    assert not left.intersection(await (await system.log()).admin.topics())
