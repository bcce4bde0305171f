"""A table whose type of today has other bytes than that of yesterday is refused, and never read as other values."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.clock import SystemClock
from streamflow.errors import TopologyError
from streamflow.log.connect import connect
from streamflow.runtime.table_import import import_table
from streamflow.runtime.worker import Worker


class Version:
    """The app with a type of its own for values and keys."""

    def __init__(self, folder: Path, guarantee: str, value_type: Any, key_type: Any = str) -> None:
        self.app = app = sf.App(
            "versions", data_dir=str(folder), partitions=1, processing_guarantee=guarantee, web=False
        )
        numbers = app.topic("numbers", key_type=str, value_type=int)
        self.counts = counts = app.table("counts", key_type=key_type, value_type=value_type, default=value_type)

        @app.agent(numbers)
        async def add(stream: sf.Stream[int, str]):
            async for key, number in stream.items():
                counts[key] += number
                yield counts[key]

        self.add = add

    async def run(self, number: int) -> Any:
        async with self.app.running():
            return await self.add.ask(number, key="k", timeout_s=20)

    async def stay(self) -> None:
        """Ask nothing: a question may or may not be stored before a start is refused."""
        async with self.app.running():
            await asyncio.sleep(20)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
@pytest.mark.parametrize("is_wiped", [False, True])
async def test_values_of_other_bytes_are_never_read_as_other_values(
    tmp_path: Path, guarantee: str, is_wiped: bool
) -> None:
    def version(value_type: Any, key_type: Any = str) -> Version:
        if is_wiped:
            shutil.rmtree(tmp_path / "versions", ignore_errors=True)
        return Version(tmp_path, guarantee, value_type, key_type)

    assert await version(int).run(1) == 1
    with pytest.raises(
        TopologyError, match="its values were written by int, and its type of today is written by float"
    ):
        await version(float).stay()
    with pytest.raises(TopologyError, match="its keys were written by str, and its type of today is written by raw"):
        await version(int, bytes).stay()
    assert await version(int).run(1) == 2


async def test_an_import_that_replaces_all_values_changes_the_type(tmp_path: Path) -> None:
    old, new = Version(tmp_path, "exactly_once", int), Version(tmp_path, "exactly_once", float)
    assert await old.run(1) == 1
    settings = new.app.settings({})
    rows = {b"k": new.counts.changelog.value_codec.encode(1.5) or b""}
    async with connect(settings.broker, clock=SystemClock(), client_id="test") as log:
        with pytest.raises(TopologyError, match="--replace"):
            await import_table(log, new.app, settings, "counts", rows)
        await import_table(log, new.app, settings, "counts", rows, replace=True)
    assert await new.run(1) == 2.5
    with pytest.raises(TopologyError, match="written by float"):
        await old.run(1)


async def test_an_empty_part_changes_its_type_by_an_import(tmp_path: Path) -> None:
    old, new = Version(tmp_path, "exactly_once", int), Version(tmp_path, "exactly_once", float)
    async with old.app.running():
        await old.add.ask(1, key="k", timeout_s=20)
        await old.counts.update_async("k", lambda _: None)
    settings = new.app.settings({})
    async with connect(settings.broker, clock=SystemClock(), client_id="test") as log:
        await import_table(log, new.app, settings, "counts", {}, replace=True)
    assert await new.run(1) == 1.0


def kept(folder: Path) -> list[str]:
    """The local stores of all slots, those that were set aside among them."""
    found = sorted(str(path.relative_to(folder)) for path in folder.glob("versions/*/*") if path.is_dir())
    assert found
    return found


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_start_that_is_refused_leaves_the_store_and_is_so_in_a_run_to_the_end_too(
    tmp_path: Path, guarantee: str
) -> None:
    assert await Version(tmp_path, guarantee, int).run(1) == 1
    stores = kept(tmp_path)
    for _ in range(3):
        refused = Version(tmp_path, guarantee, float).app
        with pytest.raises(TopologyError, match="its type of today is written by float"):
            await Worker(refused, refused.settings({}), until_end=True).run()
    assert kept(tmp_path) == stores
    assert await Version(tmp_path, guarantee, int).run(1) == 2
    assert kept(tmp_path) == stores
