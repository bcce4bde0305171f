"""Tables of running apps: reads and writes elsewhere, conflicts, expiry, set tables, visits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any
from uuid import UUID
from zlib import crc32

import msgspec
import pytest

import streamflow as sf
from streamflow.state.values import MISSING
from streamflow.testing import TestApp
from tests.runtime.waiting import until


def fold(test: TestApp, table: Any) -> dict[Any, Any]:
    """What a table's changelog holds."""
    found: dict[Any, Any] = {}
    for event in test.records(table.changelog):
        found.pop(event.key, None)
        if event.value is not None:
            found[event.key] = event.value
    return found


async def process_one(app: sf.App, source: Any) -> None:
    """Run an app over one record."""
    async with TestApp(app) as test:
        await test.send(source, 1, key="a")
        await test.settle()


def counting(partitions: int = 4, **options: Any) -> tuple[sf.App, Any, Any]:
    """An app that counts per key."""
    app = sf.App("t", partitions=partitions)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int, default=int, **options)

    @app.agent(source, tables=[table])
    async def count(stream: sf.Stream[int, str]) -> None:
        async for key, value in stream.items():
            table[key] += value

    return app, source, table


# --- elsewhere -----------------------------------------------------------------------------------------------------


async def test_elsewhere_committed_values_of_all_partitions_are_read():
    app, source, table = counting()
    async with TestApp(app) as test:
        for key in "abcdef":
            await test.send(source, 2, key=key)
        await test.settle()
        assert dict(table.items()) == dict.fromkeys("abcdef", 2)
        assert table.partitions == frozenset(range(4))
        assert len(table) == 6
        assert table["nobody"] == 0
        assert table.get("nobody") is None
        assert ("nobody", 0) not in table.items()
        assert ("a", 2) in table.items()
        assert await asyncio.to_thread(lambda: table["a"]) == 2


async def test_a_write_elsewhere_names_update_async():
    app, _, table = counting()
    async with TestApp(app):
        for write in (lambda: table.update(a=1), lambda: table.pop("a"), table.clear, lambda: table.__delitem__("a")):
            with pytest.raises(sf.ClosedError, match="update_async"):
                write()


async def test_without_a_running_app_nothing_is_held():
    _, _, table = counting()
    for read in (lambda: table["a"], lambda: "a" in table, lambda: list(table), lambda: len(table)):
        with pytest.raises(sf.NotHeld, match="is not running in this process"):
            read()
    with pytest.raises(sf.NotHeld):
        await table.update_async("a", lambda value: 1)


async def test_update_async_is_committed_when_it_returns():
    app, source, table = counting()
    async with TestApp(app) as test:
        await test.send(source, 2, key="a")
        await test.settle()
        assert await table.update_async("a", lambda value: value + 40) == 42
        assert table["a"] == 42
        assert await table.update_async("a", lambda value: None) is None
        assert "a" not in table
        with pytest.raises(ZeroDivisionError):
            await table.update_async("a", lambda value: 1 // 0)
        with pytest.raises(sf.ProductionError, match="takes int"):
            await table.update_async("a", lambda value: "no")
        await test.settle()
        assert fold(test, table) == {}


def holding(value_type: Any, **options: Any) -> tuple[sf.App, Any]:
    """An app with a table of values that can be changed in place."""
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("held", key_type=str, value_type=value_type, **options)

    @app.agent(source, tables=[table])
    async def look(stream: sf.Stream[int, str]) -> None:
        async for _ in stream:
            pass

    return app, table


async def test_update_async_that_changes_a_value_in_place_has_to_return_it():
    app, table = holding(list[int])
    async with TestApp(app) as test:
        assert await table.update_async("a", lambda _: [1]) == [1]
        with pytest.raises(sf.ProductionError, match=r"of the key 'a': .* in place .* return the value"):
            await table.update_async("a", lambda value: value.append(2))
        assert table["a"] == [1]

        def both(value: list[int]) -> list[int]:
            value.append(2)
            return value

        assert await table.update_async("a", both) == [1, 2]
        assert await table.update_async("a", lambda value: None) is None
        assert "a" not in table
        assert await table.update_async("a", lambda value: None) is None
        await test.settle()
        assert fold(test, table) == {}


async def test_update_async_that_changes_a_default_in_place_has_to_return_it():
    app, table = holding(list[int], default=list)
    async with TestApp(app):
        with pytest.raises(sf.ProductionError, match="return the value"):
            await table.update_async("a", lambda value: value.append(2))
        assert await table.update_async("a", lambda value: None) is None
        assert "a" not in table
        assert await table.update_async("a", lambda value: [*value, 3]) == [3]


async def test_update_async_deletes_an_unchanged_value_that_an_older_type_wrote(tmp_path):
    class Old(msgspec.Struct):
        a: int

    class New(msgspec.Struct):
        a: int
        b: int = 0

    for value_type, change in ((Old, lambda _: Old(1)), (New, lambda value: None if value == New(1) else value)):
        app, table = holding(value_type)
        async with app.running(data_dir=str(tmp_path), web=False):
            await table.update_async("a", change)
            assert ("a" in table) == (value_type is Old)


async def test_update_async_says_what_does_not_fit():
    app, table = holding(list[int])
    awaited = []

    async def slow(value: Any) -> Any:
        awaited.append(value)

    async with TestApp(app):
        with pytest.raises(sf.ProductionError, match=r"^table 'held': its key takes str, not int 5$"):
            await table.update_async(5, lambda _: [])
        with pytest.raises(sf.ProductionError, match=r"table 'held': a value .*; its key is 'a'$"):
            await table.update_async("a", lambda _: ["no"])
        with pytest.raises(sf.ProductionError, match=r"table 'held': .* give a plain function"):
            await table.update_async("a", slow)
    assert awaited == []


@pytest.mark.parametrize(
    ("value_type", "write"),
    [
        (int, lambda table, key: table.update({key: "no"})),
        (list[int], lambda table, key: table.update({key: ["no"]})),
        (list[int], lambda table, key: table.update({key: []}) or table[key].append("no")),
        (list[int], lambda table, key: table[key].append("no")),
    ],
    ids=["written", "written as bytes", "changed in place", "default changed in place"],
)
async def test_a_wrong_value_in_a_turn_names_its_key(value_type, write):
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("held", key_type=str, value_type=value_type, default=value_type)

    @app.agent(source, tables=[table])
    async def write_wrong(stream: sf.Stream[int, str]) -> None:
        async for event in stream.events():
            write(table, event.key)

    with pytest.raises((sf.ProcessingError, sf.ProductionError), match=r"table 'held': .*; its key is 'a'"):
        await process_one(app, source)


@pytest.mark.parametrize(
    "wait",
    [lambda change: change, lambda change: asyncio.wait_for(change, 15), asyncio.gather, asyncio.create_task],
    ids=["await", "wait_for", "gather", "task"],
)
async def test_on_recover_may_not_wait_for_a_change(wait: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]):
    async def change(_: int) -> None:
        await wait(table.update_async("a", lambda value: 1))

    app, source, table = counting(partitions=1, on_recover=change)
    async with asyncio.timeout(20):
        with pytest.raises(sf.FatalError, match=r"changed in on_recover.*`@app\.task`"):
            await process_one(app, source)


async def test_a_task_that_on_recover_starts_may_change_tables():
    begun: list[asyncio.Task[Any]] = []

    async def begin(_: int) -> None:
        begun.append(asyncio.create_task(table.update_async("a", lambda value: value + 40)))

    app, _, table = counting(partitions=1, on_recover=begin)
    async with asyncio.timeout(20), TestApp(app):
        assert await begun[0] == 40


async def test_a_change_is_made_while_an_agent_waits_for_the_rest_of_a_unit():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int, default=int)

    @app.agent(source, tables=[table])
    async def units(stream: sf.Stream[int]) -> None:
        async for unit in stream.take(3):
            table["k"] += sum(unit)

    @app.agent(source)
    async def other(stream: sf.Stream[int]) -> None:
        async for _ in stream:
            pass

    async with TestApp(app) as test, asyncio.timeout(20):
        await test.send(source, 1, key="k")
        await until(lambda: any(run.feed.lacking for task in test.worker.manager.running() for run in task._runs))
        assert await table.update_async("k", lambda value: value + 100) == 100
        await test.send(source, 1, key="k")
        await test.send(source, 1, key="k")
        await test.settle()
        assert table["k"] == 103


async def test_an_agent_may_not_wait_for_its_own_turn():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int)

    @app.agent(source, tables=[table])
    async def waits(stream: sf.Stream[int]) -> None:
        async for _ in stream:
            await table.update_async("k", lambda value: 1)

    with pytest.raises(sf.ProcessingError, match="update_async is for code outside of agents"):
        await process_one(app, source)


async def test_an_agent_that_writes_without_a_record_is_told_so():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int)

    @app.agent(source, tables=[table])
    async def early(stream: sf.Stream[int]) -> None:
        table["k"] = 1
        async for _ in stream:
            pass

    with pytest.raises(sf.StreamFlowError, match="while it had no record in hand"):
        async with TestApp(app) as test:
            await test.settle()


async def test_a_change_whose_task_closes_before_its_commit_is_not_held():
    app, _, _ = counting(partitions=1)
    async with TestApp(app) as test:
        manager = test.worker.manager
        assert manager is not None
        (task,) = manager.running()
        task.lost = True  # as when another worker has taken the partition
        with pytest.raises(sf.NotHeld):
            await task.change("counts", lambda stage: stage.set("a", 1))
        task.lost = False
        async with task.delivery._one_at_a_time:  # type: ignore[attr-defined]  # no commit meanwhile
            asked = asyncio.create_task(task.change("counts", lambda stage: stage.set("a", 1)))
            await until(lambda: task.changes._owed)
            task.seal()
            task.lost = True
            await task.close_tables()
            with pytest.raises(sf.NotHeld, match="closed before the change was committed"):
                await asked


# --- several at once -----------------------------------------------------------------------------------------------


async def test_records_in_progress_at_once_never_lose_an_update():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=str)
    table = app.table("counts", key_type=str, value_type=int, default=int)
    letters = app.topic("letters")
    gate = asyncio.Event()

    @app.agent(source, concurrency=2, on_error=sf.DeadLetter(letters), tables=[table])
    async def count(stream: sf.Stream[str]) -> None:
        async for value in stream:
            if value == "slow":
                await gate.wait()
            table["k"] += 1

    other = next(key for key in "bcdefg" if crc32(key.encode()) % 2 != crc32(b"a") % 2)
    async with TestApp(app) as test:
        await test.send(source, "slow", key="a")
        await test.send(source, "fast", key=other)
        (task,) = test.worker.manager.running()  # type: ignore[union-attr]
        await until(lambda: bool(task.tables._waiting["counts"].done))  # type: ignore[union-attr]
        gate.set()
        await test.settle()
        assert table["k"] == 1
        (letter,) = test.records(letters)
        assert "two records in progress at once write the key 'k'" in str(letter.headers)


@pytest.mark.parametrize("order", ["slow first", "fast first"])
async def test_agents_that_share_a_table_take_each_record_one_after_the_other(order):
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    sink = app.topic("sink", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int, default=int)

    async def slow(stream: sf.Stream[int]) -> None:
        async for _ in stream:
            before = table["k"]
            await asyncio.sleep(0.001)
            table["k"] = before + 1
            sink.send_nowait(key="k", value=table["k"])

    async def fast(stream: sf.Stream[int]) -> None:
        async for _ in stream:
            table["k"] += 1
            sink.send_nowait(key="k", value=table["k"])

    for one in (slow, fast) if order == "slow first" else (fast, slow):
        app.agent(source, tables=[table])(one)
    async with TestApp(app) as test:
        for number in range(40):
            source.send_nowait(key="k", value=number)
        await test.settle()
        assert table["k"] == 80
        assert [event.value for event in test.records(sink)] == list(range(1, 81))


# --- expiry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl_s", [0, -1, "5", True, float("nan"), float("inf"), 0.0001])
def test_ttl_is_a_number_above_0(ttl_s):
    with pytest.raises(sf.ConfigurationError, match="ttl_s="):
        sf.App("t").table("x", key_type=str, value_type=int, ttl_s=ttl_s)


async def test_expired_values_leave_the_store_and_the_changelog():
    app, source, table = counting(partitions=1, ttl_s=10)
    async with TestApp(app) as test:
        for key, at_s in [("old", 0), ("new", 8)]:
            await test.send(source, 1, key=key, timestamp_ms=1_000_000 + at_s * 1000)
        await test.settle()
        (task,) = test.worker.manager.running()  # type: ignore[union-attr]
        await task.tables.write_store()  # type: ignore[union-attr]
        await test.send(source, 1, key="now", timestamp_ms=1_011_000)
        await test.settle()
        assert sorted(table) == ["new", "now"]
        await until(lambda: not task.changes and task.tables.overlays["counts"]._newest_committed("old") is MISSING)  # type: ignore[union-attr]
        await test.settle()
        assert fold(test, table) == {"new": 1, "now": 1}
        await test.send(source, 5, key="old", timestamp_ms=1_011_000)
        await test.settle()
        assert table["old"] == 5


async def test_a_failing_record_does_not_move_expiry():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int, ttl_s=10)

    @app.agent(source, on_error=sf.Skip(), tables=[table])
    async def write(stream: sf.Stream[int]) -> None:
        async for value in stream:
            table["k"] = 10 // value

    async with TestApp(app) as test:
        await test.send(source, 1, key="k", timestamp_ms=1_000_000)
        await test.send(source, 0, key="k", timestamp_ms=9_000_000)
        await test.settle()
        assert table["k"] == 10


async def test_a_change_before_any_record_lives_from_the_clocks_time():
    app, source, table = counting(partitions=1, ttl_s=10)
    async with TestApp(app) as test:
        await table.update_async("k", lambda value: 7)
        await test.send(source, 1, key="other")
        await test.settle()
        assert table["k"] == 7


# --- keys of other partitions --------------------------------------------------------------------------------------


async def test_a_key_of_another_partition_is_refused_and_group_by_is_named():
    app = sf.App("t", partitions=4)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("counts", key_type=str, value_type=int)

    @app.agent(source, tables=[table])
    async def write(stream: sf.Stream[int]) -> None:
        async for value in stream:
            for number in range(10):
                table[f"fixed{number}"] = value

    with pytest.raises(sf.ProductionError, match="group_by"):
        await process_one(app, source)


# --- set tables ----------------------------------------------------------------------------------------------------


def tagging(partitions: int = 4) -> tuple[sf.App, Any, sf.SetTable[str, int]]:
    """An app that runs programs over a set table."""
    app = sf.App("t", partitions=partitions)
    source = app.topic("source", key_type=str, value_type=list[str])
    tags = app.set_table("tags", key_type=str, member_type=int)

    @app.agent(source, on_error=sf.Skip())
    async def run(stream: sf.Stream[list[str], str]) -> None:
        async for key, lines in stream.items():
            for line in lines:
                exec(line, {"tags": tags, "key": key})

    return app, source, tags


async def test_members_are_added_and_taken_out_one_by_one():
    app, source, tags = tagging()
    async with TestApp(app) as test:
        await test.send(source, ["tags[key].update([3, 1, 2])", "tags[key].add(1)", "assert 2 in tags[key]"], key="a")
        await test.send(source, ["tags[key] |= {5}", "assert list(tags[key]) == [5]", "assert key in tags"], key="b")
        await test.settle()
        before = len(test.records(tags.pairs.changelog))
        await test.send(source, ["tags[key].remove(1)", "assert len(tags[key]) == 2", "tags[key].add(3)"], key="a")
        await test.settle()
        assert len(test.records(tags.pairs.changelog)) == before + 1
        assert {key: list(tags[key]) for key in tags} == {"a": [2, 3], "b": [5]}
        assert len(tags) == 2
        assert "a" in tags
        assert "c" not in tags
        assert 2 in tags["a"]
        assert not tags["c"]
        assert tags["a"] & {2, 9} == {2}
        assert fold(test, tags.pairs) == {("a", 2): b"", ("a", 3): b"", ("b", 5): b""}


async def test_a_set_is_deleted_replaced_and_cleared():
    app, source, tags = tagging()
    async with TestApp(app) as test:
        for key in "abc":
            await test.send(source, ["tags[key].update([1, 2])"], key=key)
        await test.send(source, ["del tags[key]", "assert key not in tags", "tags[key].discard(7)"], key="a")
        await test.send(source, ["tags[key] = {2, 3}", "assert set(tags[key]) == {2, 3}"], key="b")
        await test.send(source, ["tags[key].clear()", "tags[key].add(9)", "raise ValueError"], key="c")
        await test.send(source, ["del tags['nobody']"], key="a")
        await test.settle()
        assert {key: set(tags[key]) for key in tags} == {"b": {2, 3}, "c": {1, 2}}


async def test_a_set_of_another_partition_or_type_is_refused():
    app, source, tags = tagging()
    async with TestApp(app) as test:
        await test.send(source, [f"tags['k{number}'].add(1)" for number in range(10)], key="a")
        await test.send(source, ["tags[key].add('no number')"], key="a")
        await test.settle()
        assert list(tags) == []
        with pytest.raises(sf.ClosedError, match="update_async"):
            tags["a"].add(1)


async def test_a_set_is_changed_from_elsewhere():
    app, _, tags = tagging()
    async with TestApp(app):
        await tags.update_async("a", lambda members: members.update([1, 2]))
        await tags.update_async("a", lambda members: members.discard(1))
        assert set(tags["a"]) == {2}


async def test_a_function_that_returns_a_set_which_would_be_lost_is_refused():
    app, _, tags = tagging()

    async def slow(members: Any) -> None:
        members.add(5)

    def or_in_place(members: Any) -> Any:
        members |= {3}
        return members

    async with TestApp(app):
        await tags.update_async("a", lambda members: members.add(1))
        with pytest.raises(
            sf.ProductionError, match=r"set table 'tags': update_async of the key 'a': .* would be lost"
        ):
            await tags.update_async("a", lambda members: members | {2})
        with pytest.raises(sf.ProductionError, match="give a plain function"):
            await tags.update_async("a", slow)
        with pytest.raises(sf.ProductionError, match="table 'tags': its key takes str, not int 5"):
            await tags.update_async(5, lambda members: members.add(1))
        await tags.update_async("a", or_in_place)
        assert set(tags["a"]) == {1, 3}


@pytest.mark.parametrize("given", [5, "ab"])
def test_what_is_no_set_is_refused_with_the_tables_name(given):
    _, _, tags = tagging()
    with pytest.raises(
        sf.ProductionError, match=r"set table 'tags': .*; its key is 'a'. .* `tags\[key\].add\(member\)`"
    ):
        tags["a"] = given


def test_members_need_an_order():
    with pytest.raises(sf.SchemaError, match="have no order"):
        sf.App("t").set_table("x", key_type=str, member_type=dict[str, int])


def test_a_set_table_is_declared_once():
    app = sf.App("t")
    tags = app.set_table("x", key_type=str, member_type=int)
    assert app.set_table("x", key_type=str, member_type=int) is tags
    with pytest.raises(sf.TopologyError, match="declared twice, with another key_serializer="):
        app.set_table("x", key_type=str, member_type=int, key_serializer="json")
    with pytest.raises(sf.TopologyError, match="declared twice"):
        app.table("x", key_type=tuple[str, int], value_type=bytes)


async def test_a_set_table_is_a_mapping_of_the_keys_that_have_members():
    app, source, tags = tagging()
    program = [
        "tags[key].update([2, 1])",
        "assert tags.get(key) == {1, 2} and tags.get('none') is None and tags.get('none', 7) == 7",
        "assert [(k, set(v)) for k, v in tags.items() if k == key] == [(key, {1, 2})]",
        "assert key in tags.keys() and (key, {1, 2}) in tags.items() and ('none', set()) not in tags.items()",
        "assert key not in tags.items()",
        "assert {1, 2} in tags.values()",
        "for k, members in tags.items(): members.add(9) or members.discard(9)",
    ]
    async with TestApp(app) as test:
        for key in "abc":
            await test.send(source, program, key=key)
        await test.send(source, ["tags['d'].add(1)", "raise ValueError"], key="d")
        await test.send(source, ["tags[key].clear()"], key="c")
        await test.settle()
        assert {key: set(members) for key, members in tags.items()} == {"a": {1, 2}, "b": {1, 2}}
        assert sorted(tags.keys()) == sorted(tags) == ["a", "b"]
        assert [sorted(members) for members in tags.values()] == [[1, 2], [1, 2]]
        assert len(tags) == len(tags.items()) == 2
        assert tags.get("a") == {1, 2}
        assert tags.get("c") is None
        assert tags.get("c", frozenset[int]()) == frozenset()
        assert tags == tags
        assert tags != {"a": {1, 2}, "b": {1, 2}}
        assert {tags: 1}[tags] == 1
        with pytest.raises(sf.ClosedError, match="update_async"):
            tags.get("a", set()).add(3)


async def test_asking_for_a_set_that_is_held_elsewhere_raises():
    _, _, tags = tagging()
    for ask in (lambda: tags.get("a"), lambda: "a" in tags, lambda: list(tags.items()), lambda: len(tags)):
        with pytest.raises(sf.NotHeld):
            ask()


# --- what is declared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value_type", "instead"),
    [
        (int | None, "value_type=int"),
        (None | str | int, "value_type=str | int"),
        (type(None), "the type that values have"),
    ],
)
def test_a_value_type_with_none_in_it_is_refused(value_type, instead):
    with pytest.raises(sf.SchemaError, match=r"table 'x' \(.*test_tables_run.py:\d+\): value_type=") as raised:
        sf.App("t").table("x", key_type=str, value_type=value_type)
    assert f"Declare {instead}, write `del table[key]`" in str(raised.value)


def test_a_topics_nulls_are_deletions_in_the_table_it_fills():
    app = sf.App("t")
    source = app.topic("source", key_type=str, value_type=int | None, compacting=True)
    assert app.table("x", source=source).value_type == int | None


async def test_types_that_are_left_out_are_bytes_as_in_topics():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=bytes)
    table = app.table("x")
    named = app.table("named", key_serializer="str", value_serializer="json")
    errors: list[str] = []

    @app.agent(source)
    async def write(stream: sf.Stream[bytes, bytes]) -> None:
        async for event in stream.events():
            table[event.key + b"!"] = event.value
            named[event.key.decode()] = {"value": [1, None]}
            for key, value in ((b"k", 1), ("k", b"v")):
                try:
                    table[key] = value
                except sf.ProductionError as error:
                    errors.append(str(error))

    assert (table.key_type, table.value_type, named.key_type, named.value_type) == (bytes, bytes, str, Any)
    async with TestApp(app) as test:
        await test.send(source, b"v", key=b"k")
        await test.settle()
        assert dict(table.scan(prefix=b"k")) == {b"k!": b"v"}
        assert dict(named.items()) == {"k": {"value": [1, None]}}
    assert (
        "table 'x': the value of topic 't-x-changelog' takes bytes (value_type= was left out), not int 1" in errors[0]
    )
    assert "takes keys of type bytes, not str 'k'" in errors[1]
    assert "table 'x'" in errors[1]


class Point(msgspec.Struct):
    x: int


LOOSE = {
    7: ("a", {1}),
    "moment": datetime(2026, 3, 1, 12, tzinfo=UTC),
    "bytes": b"x",
    "struct": Point(3),
    "id": UUID(int=1),
    "no number": math.nan,
}


@pytest.mark.parametrize(
    ("value_type", "serializer", "later"),
    [
        (
            Any,
            None,
            {
                "7": ["a", [1]],
                "moment": "2026-03-01T12:00:00Z",
                "bytes": "eA==",
                "struct": {"x": 3},
                "id": "00000000-0000-0000-0000-000000000001",
                "no number": None,
            },
        ),
        (
            dict,
            "msgpack",
            {
                7: ["a", [1]],
                "moment": datetime(2026, 3, 1, 12, tzinfo=UTC),
                "bytes": b"x",
                "struct": {"x": 3},
                "id": "00000000-0000-0000-0000-000000000001",
            },
        ),
        (dict[int, tuple[str, set[int]]], None, {7: ("a", {1})}),
    ],
)
async def test_a_value_comes_back_as_its_type_and_serializer_have_it(value_type, serializer, later):
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("x", key_type=str, value_type=value_type, value_serializer=serializer)
    written: dict[Any, Any] = {key: value for key, value in LOOSE.items() if key in later or str(key) in later}
    seen: list[Any] = []

    @app.agent(source, tables=[table])
    async def write(stream: sf.Stream[int, str]) -> None:
        async for key, number in stream.items():
            if number == 1:
                table[key] = written
            seen.append(table[key])

    async with TestApp(app) as test:
        for number in (1, 2):
            await test.send(source, number, key="k")
        await test.settle()
        assert seen == [written, later]
        assert table["k"] == later
        assert len(test.records(table.changelog)) == 1  # what was only read is not written again


async def _async_default() -> int:
    return 1


@pytest.mark.parametrize(
    ("value_type", "default", "says"),
    [
        (
            int,
            str,
            r"default= makes str '', and value_type=int: the value of topic 't-x-changelog' takes int, not str ''",
        ),
        (list[int], lambda: ["a"], r"default= makes list \['a'\], and value_type=list\[int\]: a value is not of the"),
        (int, lambda: 1 // 0, r"default= is called without arguments to make a value, and raised ZeroDivisionError"),
        (dict, lambda key: {}, r"is called without arguments"),
        (int, lambda: None, r"default= makes None; leave it out"),
        (int, _async_default, r"cannot be async"),
        (int, 3, r"default= is a function that makes the value, such as `default=int`"),
    ],
)
def test_a_default_that_makes_no_value_of_the_table_is_refused_at_once(value_type, default, says):
    with pytest.raises(sf.ConfigurationError, match=says) as raised:
        sf.App("t").table("x", key_type=str, value_type=value_type, default=default)
    assert "table 'x' (" in str(raised.value)
    assert "test_tables_run.py" in str(raised.value)


# --- visits --------------------------------------------------------------------------------------------------------


async def test_a_visit_goes_through_every_key_of_every_partition():
    app, source, table = counting()
    async with TestApp(app) as test:
        keys = [f"k{number}" for number in range(1500)]
        for number, key in enumerate(keys):
            source.send_nowait(key=key, value=number)
        await test.settle()

        def fn(key: str, value: int) -> int | None:
            if value % 3 == 0:
                table.pop(key)
                return None
            return value * 2 if value % 3 == 1 else None

        done = await app.visit(table, fn)
        assert (done.keys, done.written, done.deleted) == (1500, 500, 500)
        assert (done.partitions, done.left) == (frozenset(range(4)), frozenset())
        wanted = {key: n * 2 if n % 3 == 1 else n for n, key in enumerate(keys) if n % 3}
        assert dict(table.items()) == wanted
        await test.settle()
        assert fold(test, table) == wanted


async def test_a_visit_notices_what_is_changed_in_place():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    table = app.table("lists", key_type=str, value_type=list[int])

    @app.agent(source, tables=[table])
    async def write(stream: sf.Stream[int, str]) -> None:
        async for key, value in stream.items():
            table[key] = [value]

    async with TestApp(app) as test:
        await test.send(source, 1, key="a")
        await test.send(source, 2, key="b")
        await test.settle()
        done = await app.visit(table, lambda key, value: value.append(9) if key == "a" else None)
        assert (done.keys, done.written) == (2, 1)
        assert dict(table.items()) == {"a": [1, 9], "b": [2]}


async def test_a_set_table_is_visited_by_its_pairs_and_a_global_one_not_at_all():
    app = sf.App("t", partitions=1)
    source = app.topic("source", key_type=str, value_type=str)
    tags = app.set_table("tags", key_type=str, member_type=str)
    names = app.global_table("names", source=app.topic("named", key_type=str, value_type=str, compacting=True))

    @app.agent(source, tables=[tags.pairs])
    async def write(stream: sf.Stream[str, str]) -> None:
        async for key, value in stream.items():
            tags[key].add(value)

    async with TestApp(app) as test:
        for tag in ("x", "y"):
            await test.send(source, tag, key="a")
        await test.settle()
        for unfit, said in (
            (tags, r"app\.visit\(tags\.pairs, fn\)"),
            (names, r"its source 'named'.*names\.source\.send"),
        ):
            with pytest.raises(sf.TopologyError, match=said):
                await app.visit(unfit, lambda key, value: None)  # type: ignore[arg-type]
        done = await app.visit(tags.pairs, lambda pair, _: tags.pairs.pop(pair) and None if pair[1] == "x" else None)
        assert (done.keys, done.deleted) == (2, 1)
        assert tags["a"] == {"y"}


async def test_a_visit_that_raises_says_where_and_drops_its_slice():
    app, source, table = counting(partitions=1)
    async with TestApp(app) as test:
        for key in "abc":
            await test.send(source, 1, key=key)
        await test.settle()
        with pytest.raises(sf.ProcessingError, match="for the key 'b' of table 'counts'"):
            await app.visit(table, lambda key, value: 5 if key == "a" else 1 // 0)
        assert set(table.values()) == {1}


async def test_a_task_visits_what_is_still_to_be_assigned():
    app, _, table = counting()
    found: list[Any] = []

    @app.task
    async def migrate() -> None:
        found.append(await app.visit(table, lambda key, value: None))

    async with TestApp(app) as test:
        await test.settle()
        await until(lambda: bool(found))
    assert found[0].partitions == frozenset(range(4))


async def test_a_partition_that_leaves_is_named():
    app, source, table = counting(partitions=2)
    async with TestApp(app) as test:
        for number in range(50):
            await test.send(source, 1, key=f"k{number}")
        await test.settle()
        tasks = {task.partition: task for task in test.worker.manager.running()}  # type: ignore[union-attr]

        def fn(key: str, value: int) -> None:
            tasks[1].lost = True  # as when the group says so while partition 0 is visited

        done = await app.visit(table, fn)
        tasks[1].lost = False
        assert done.partitions == frozenset({0})
        assert done.left <= frozenset({1})


async def test_a_visit_that_a_stop_ends_names_the_partitions_that_were_not_restored_yet():
    app, source, table = counting(partitions=3)
    async with TestApp(app) as test:
        for number in range(50):
            await test.send(source, 1, key=f"k{number}")
        await test.settle()
        manager = test.worker.manager
        assert manager is not None
        late = next(task for task in manager.running() if task.partition == 1)
        assert late.tables is not None
        late.tables.is_level, late.state = False, "restoring"

        def fn(key: str, value: int) -> None:
            manager.is_finishing, late.state = True, "finishing"  # as when a stop comes while partition 0 is visited

        done = await app.visit(table, fn)
        manager.is_finishing, late.tables.is_level, late.state = False, True, "running"
    assert (done.partitions, done.left) == (frozenset({0, 2}), frozenset({1}))


async def test_without_a_running_app_there_is_nothing_to_visit():
    app, _, table = counting()
    with pytest.raises(sf.NotHeld, match="visit it from a task"):
        await app.visit(table, lambda key, value: None)


# --- across restarts, threads and logs -----------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_its_state", [True, False])
async def test_expiry_goes_on_after_a_restart(tmp_path, keeps_its_state):
    def settings(run: str) -> dict[str, Any]:
        folder = tmp_path / ("state" if keeps_its_state else run)
        return {"broker": f"sqlite:///{tmp_path}/log.db", "data_dir": str(folder), "commit_interval_ms": 20}

    app, source, table = counting(partitions=1, ttl_s=10)
    async with app.running(**settings("first")):
        await source.send(key="early", value=1, timestamp_ms=1_000_000)
        await source.send(key="late", value=2, timestamp_ms=1_008_000)
        await until(lambda: "late" in table, within_s=20)
    app, source, table = counting(partitions=1, ttl_s=10)
    async with app.running(**settings("second")):
        assert dict(table.items()) == {"early": 1, "late": 2}
        await source.send(key="later", value=3, timestamp_ms=1_012_000)
        await until(lambda: "later" in table, within_s=20)
        assert dict(table.items()) == {"late": 2, "later": 3}
    app, source, table = counting(partitions=1, ttl_s=10)
    async with app.running(**settings("third")):
        assert dict(table.items()) == {"late": 2, "later": 3}  # stream time was not forgotten


@pytest.mark.parametrize("keeps_its_state", [True, False])
async def test_values_from_before_ttl_s_was_added_expire_whatever_became_of_the_local_state(tmp_path, keeps_its_state):
    def settings(run: str) -> dict[str, Any]:
        folder = tmp_path / ("state" if keeps_its_state else run)
        return {"broker": f"sqlite:///{tmp_path}/log.db", "data_dir": str(folder), "commit_interval_ms": 20}

    now_ms = round(time.time() * 1000)
    app, source, table = counting(partitions=1)
    async with app.running(**settings("first")):
        await source.send(key="early", value=1, timestamp_ms=now_ms)
        await until(lambda: "early" in table, within_s=20)
    app, source, table = counting(partitions=1, ttl_s=600)
    async with app.running(**settings("second")):
        await source.send(key="now", value=2, timestamp_ms=now_ms)
        await until(lambda: "now" in table, within_s=20)
        assert dict(table.items()) == {"early": 1, "now": 2}
        await source.send(key="later", value=3, timestamp_ms=now_ms + 700_000)
        await until(lambda: "later" in table, within_s=20)
        assert dict(table.items()) == {"later": 3}


async def test_another_loop_is_told_where_to_change_tables():
    app, _, table = counting()
    async with TestApp(app):

        def elsewhere() -> None:
            asyncio.run(table.update_async("a", lambda value: 1))

        with pytest.raises(sf.ClosedError, match="another event loop"):
            await asyncio.to_thread(elsewhere)


async def test_a_change_whose_caller_was_cancelled_before_it_began_is_not_made():
    app, _, table = counting(partitions=1)
    async with TestApp(app) as test:
        asked = asyncio.create_task(table.update_async("a", lambda value: 1))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await test.settle()
        assert "a" not in table


async def test_a_table_that_only_looks_like_the_changed_one_is_refused_within_a_change():
    app, source, table = counting(partitions=1)
    other = app.table("other", key_type=str, value_type=int)
    app.agent(source, name="second", tables=[other])(_ignore)
    async with TestApp(app):

        def change(value: int | None) -> int:
            other["a"] = 1
            return 1

        with pytest.raises(sf.ClosedError, match="changes another one"):
            await table.update_async("a", change)


@pytest.mark.parametrize("value_type", [int, list[int]])
async def test_a_table_of_another_app_is_not_the_agents_own_of_the_same_name(value_type):
    app, other = sf.App("one", partitions=1), sf.App("other", partitions=1)
    source = app.topic("source", key_type=str, value_type=int)
    own = app.table("t", key_type=str, value_type=value_type)
    foreign = other.table("t", key_type=str, value_type=value_type)
    refused: list[str] = []

    @app.agent(source, tables=[own])
    async def run(number: int) -> None:
        for touch in (lambda: foreign.get("k"), lambda: foreign["k"], lambda: foreign.update(k=own["k"])):
            own["k"] = 5 if value_type is int else [5]
            try:
                touch()
            except sf.TopologyError as error:
                refused.append(str(error))

    async with TestApp(app) as test:
        await test.send(source, 1, key="k")
        await test.settle()
    assert len(refused) == 3
    assert all("touches table 't', which its code does not name" in text for text in refused)


async def _ignore(stream: sf.Stream[int]) -> None:
    async for _ in stream:
        pass


async def test_a_time_after_which_nothing_could_expire_fails_its_record():
    app = sf.App("far", partitions=1)
    numbers = app.topic("numbers", key_type=str, value_type=int)
    sums = app.table("sums", key_type=str, value_type=int, default=int, ttl_s=60)

    @app.agent(numbers, on_error=sf.Skip())
    async def add(stream: sf.Stream[int, str]) -> None:
        async for key, number in stream.items():
            sums[key] += number

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="a")
        await test.send(numbers, 10, key="a", timestamp_ms=2**60)
        await test.send(numbers, 100, key="a")
        await test.settle()
        assert dict(sums) == {"a": 101}
