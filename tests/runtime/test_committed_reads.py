"""What is committed while it is read: each page shows a partition as it was at one moment."""

import asyncio
from collections.abc import Callable
from typing import Any

import anyio.from_thread
import pytest

import streamflow as sf
from streamflow.runtime.committed_reads import CommittedReads, Misdirected, NotReadableYet
from streamflow.runtime.read_question import Answer, Question
from streamflow.runtime.task import Task
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


def numbers(partitions: int = 1) -> sf.App:
    app = sf.App("numbers", partitions=partitions)
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


async def test_partitions_that_can_be_read_are_answered_while_others_are_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only what is missing is asked for again."""
    async with Cluster(lambda: numbers(partitions=4)) as cluster:
        keys = [f"k{number:02}" for number in range(40)]
        for key in keys:
            await cluster.machine.send(cluster.machine.app.topics["source"], 1, key=key)
        await cluster.machine.settle()
        owner = cluster.workers[0]
        waits, other = sorted(task.partition for task in owner.tasks.values())
        asked: list[tuple[tuple[int, ...], set[int]]] = []
        is_readable, answer = Task.is_readable.fget, CommittedReads.answer
        assert is_readable is not None
        monkeypatch.setattr(
            Task,
            "is_readable",
            property(lambda self: is_readable(self) and (self.partition != waits or len(asked) > 0)),
        )

        async def noted(self: CommittedReads, question: Question) -> Answer:
            given = await answer(self, question)
            if self is owner.worker.table_reads.committed:  # type: ignore[union-attr]
                asked.append((question.partitions, set(given.without)))
            return given

        monkeypatch.setattr(CommittedReads, "answer", noted)
        for worker in (1, 0):
            asked.clear()
            table = cluster.table("table", worker)
            assert [key async for key, _ in table.scan_remote()] == keys
            assert asked == [((waits, other), {waits}), ((waits,), set())]


async def test_who_asks_for_all_or_nothing_gets_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker of the version before does, which does not look at what is left out."""
    async with Cluster(lambda: numbers(partitions=2), workers=1) as cluster:
        reads = cluster.workers[0].worker.table_reads
        assert reads is not None
        order = cluster.table("table").keys_in_order.name
        is_readable = Task.is_readable.fget
        assert is_readable is not None
        monkeypatch.setattr(Task, "is_readable", property(lambda self: is_readable(self) and self.partition == 1))
        with pytest.raises(NotReadableYet, match="partition 0 is being opened"):
            await reads.committed.answer(Question("table", (0, 1), order))
        answer = await reads.committed.answer(Question("table", (0, 1), order, partly=True))
        assert answer.without == {0: "partition 0 is being opened, restored or closed"}
        with pytest.raises(NotReadableYet, match="partition 0 is being opened"):
            await reads.committed.answer(Question("table", (0,), order, partly=True))
        late = await cluster.get("/tables/table?timeout_s=0")
        assert late.status_code == 503
        assert "partition 0 is being opened" in late.text


async def test_partitions_of_others_are_left_out_too_and_asked_there_at_once() -> None:
    async with Cluster(lambda: numbers(partitions=2)) as cluster:
        reads = cluster.workers[0].worker.table_reads
        assert reads is not None
        (mine,) = (task.partition for task in cluster.workers[0].tasks.values())
        order = cluster.table("table").keys_in_order.name
        answer = await reads.committed.answer(Question("table", (0, 1), order, partly=True))
        assert answer.without == {1 - mine: f"partition {1 - mine} is not this worker's"}
        for partly in (True, False):
            with pytest.raises(Misdirected):
                await reads.committed.answer(Question("table", (1 - mine,), order, timeout_s=60, partly=partly))
        with pytest.raises(Misdirected):
            await reads.committed.answer(Question("table", (0, 1), order, timeout_s=60))
