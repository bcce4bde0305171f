"""Tables with keys of several parts in real processes: read from every side in the partition of their records."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streamflow.model.partitioner import partition_for
from tests.system.harness import STOPPED, System, numbered, until

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(150)]

PARTITIONS = 4
VISITS = """
import json

KEYS = [("k%d" % number, digit) for number in range(20) for digit in (0, 1)]
visits = app.table("visits", key_type=tuple[str, int], value_type=int, default=int, partition_by=lambda key: key[0])
pages = app.set_table("pages", key_type=tuple[str, int], member_type=str, partition_by=lambda key: key[0])
changed = set()

@app.agent(numbers)
async def visit(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        visits[event.key, event.value // 20 % 2] += 1
        pages[event.key, event.value // 20 % 2].add("page")

@app.timer(0.2)
async def look() -> None:
    found = {}
    for key in KEYS:
        try:
            found["%s %d" % key] = [visits[key], len(pages[key])]
            if key not in changed and visits[key] == 2:
                await visits.update_async(key, lambda count: count + 100)
                await pages.update_async(key, lambda members: members.add("other page"))
                changed.add(key)
        except sf.NotHeld:
            found["%s %d" % key] = None
    draft = HERE / f"{os.getpid()}.draft"
    draft.write_text(json.dumps({"partitions": sorted(visits.partitions), "found": found}))
    draft.rename(HERE / f"{os.getpid()}.json")
"""
ROWS = numbered(80)
COUNTS = Counter((f"k{number % 20}", number // 20 % 2) for number in range(80))


async def scanned(system: System, table: str) -> list[Any]:
    command = system.command("table", "scan", "app.py", table, "--json")
    assert await command.ends() == STOPPED, command.said
    return [json.loads(line) for line in command.out.splitlines()]


async def done(system: System, *arguments: str) -> str:
    command = system.command(*arguments)
    assert await command.ends() == STOPPED, command.said
    return command.out


async def test_composite_keys_of_two_workers_and_of_a_fresh_app(system: System, tmp_path: Path) -> None:
    system.write_app(VISITS)
    await system.create("numbers", partitions=PARTITIONS)
    workers = [system.start(), system.start()]
    for worker in workers:
        await worker.owns(system.topic("numbers"), PARTITIONS // 2)
    await system.write("numbers", ROWS)

    def looked() -> list[dict[str, Any]]:
        """What each process sees, once every key was changed where it is held."""
        reports = [system.folder / f"{worker.pid}.json" for worker in workers]
        seen = [json.loads(path.read_text()) for path in reports if path.exists()]
        held = [found for each in seen for found in each["found"].values() if found is not None]
        return seen if held == [[102, 2]] * len(COUNTS) else []

    seen = await until(looked, system.told)
    assert sorted(number for each in seen for number in each["partitions"]) == list(range(PARTITIONS))
    for each in seen:
        homes = {text: partition_for(text.split()[0].encode(), PARTITIONS) for text in each["found"]}
        assert {text for text, found in each["found"].items() if found} == {
            text for text, home in homes.items() if home in each["partitions"]
        }
    rows = await scanned(system, "visits")
    assert {tuple(row["key"]): row["value"] for row in rows} == dict.fromkeys(COUNTS, 102)
    assert all(row["partition"] == partition_for(row["key"][0].encode(), PARTITIONS) for row in rows)
    assert (await done(system, "table", "get", "app.py", "visits", '["k3", 1]')).strip() == "102"
    for worker in workers:
        assert await worker.stops() == STOPPED, worker.said

    folder = tmp_path / "fresh"
    folder.mkdir()
    async with System(folder, system.broker) as fresh:
        fresh.write_app(VISITS)
        await fresh.create("numbers", partitions=PARTITIONS)
        files = {table: str(tmp_path / f"{table}.jsonl") for table in ("visits", "pages")}
        await asyncio.gather(*(done(system, "table", "export", "app.py", *each) for each in files.items()))
        for each in files.items():
            await done(fresh, "table", "import", "app.py", *each)
        both = [scanned(one, table) for one in (system, fresh) for table in files]
        visits, pages, *imported = await asyncio.gather(*both)
        assert imported == [visits, pages]
        await fresh.write("numbers", numbered(80))
        worker = await fresh.started()
        await fresh.has_committed("numbers", len(ROWS))
        assert await worker.stops() == STOPPED, worker.said
        assert {tuple(row["key"]): row["value"] for row in await scanned(fresh, "visits")} == dict.fromkeys(COUNTS, 104)
        assert "belongs to partition" not in fresh.told() + system.told()
