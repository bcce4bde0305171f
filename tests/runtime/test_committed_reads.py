"""What is committed while it is read: each page shows a partition as it was at one moment."""

import asyncio
from collections.abc import Callable
from typing import Any

import anyio.from_thread
import pytest

import streamflow as sf
from streamflow.state.overlay import Overlay
from tests.web.cluster import Cluster


def accounts() -> sf.App:
    """Each record moves money: what one account has more, the other has less."""
    app = sf.App("accounts", partitions=1)
    moves = app.topic("moves", key_type=str, value_type=int)
    balances = app.table("balances", key_type=str, value_type=int)

    @app.agent(moves, tables=[balances])
    async def move(stream: sf.Stream[int, str]) -> None:
        async for value in stream:
            balances["a"], balances["z"] = value, -value

    return app


def numbers() -> sf.App:
    app = sf.App("numbers", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("table", key_type=str, value_type=int)

    @app.agent(source, tables=[table])
    async def keep(stream: sf.Stream[int, str]) -> None:
        async for key, value in stream.items():
            if value:
                table[key] = value
            else:
                table.pop(key, None)

    return app


def on_pack(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    pack = Overlay._pack

    def packed(self: Overlay, held: Any) -> Any:
        act()
        return pack(self, held)

    monkeypatch.setattr(Overlay, "_pack", packed)


@pytest.mark.parametrize("commits_meanwhile", [1, 99])
async def test_a_page_never_has_half_of_a_commit(commits_meanwhile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(accounts, workers=1) as cluster:
        machine = cluster.machine
        moves = machine.app.topics["moves"]
        await machine.send(moves, 1, key="k")
        await machine.settle()
        loop, done = asyncio.get_running_loop(), 0

        async def transfer() -> None:
            await machine.send(moves, 1 + done, key="k")
            await machine.settle()

        def commit_between_two_keys() -> None:
            nonlocal done
            try:
                on_loop = asyncio.get_running_loop() is loop
            except RuntimeError:
                on_loop = False
            if not on_loop and done < commits_meanwhile:
                done += 1
                anyio.from_thread.run(transfer)

        on_pack(monkeypatch, commit_between_two_keys)
        rows = (await cluster.json("/tables/balances"))["items"]
        assert [row["key"] for row in rows] == ["a", "z"]
        assert done
        assert rows[0]["value"] + rows[1]["value"] == 0


async def test_a_page_looks_at_what_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand values that are not in the store yet are packed once or twice by pages of ten, not a hundred times."""
    async with Cluster(numbers, workers=1) as cluster:
        keys = [f"k{number:04}" for number in range(1_000)]
        source = cluster.machine.app.topics["source"]
        for key in keys:
            await cluster.machine.send(source, 1, key=key)
        await cluster.machine.settle()
        packed = 0

        def count() -> None:
            nonlocal packed
            packed += 1

        on_pack(monkeypatch, count)
        found, cursor = [], ""
        while cursor is not None:
            page = await cluster.json(f"/tables/table?limit=10{cursor and '&cursor=' + cursor}")
            found += [row["key"] for row in page["items"]]
            cursor = page["cursor"]
        assert found == keys
        assert len(keys) <= packed <= 2 * len(keys)


async def test_what_was_deleted_in_memory_ends_no_page() -> None:
    async with Cluster(numbers, workers=1) as cluster:
        source = cluster.machine.app.topics["source"]
        for value in (1, 0):
            for number in range(30):
                await cluster.machine.send(source, value, key=f"k{number:02}")
            await cluster.machine.send(source, 1, key="last")
            await cluster.machine.settle()
        page = await cluster.json("/tables/table?limit=3")
        assert page == {"items": [{"key": "last", "value": 1}], "cursor": None}
