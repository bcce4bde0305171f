"""Tables whose keys have the record's key as a part: written, read, changed and visited in the record's partition."""

from __future__ import annotations

import asyncio
import operator
from datetime import date, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamflow as sf
from streamflow.model.partitioner import partition_for
from streamflow.testing import TestApp

PARTITIONS = 4
DAY = date(2026, 3, 1)


def visiting(source_type: Any = str, **options: Any) -> tuple[sf.App, Any, Any, sf.SetTable[Any, str]]:
    """An app that counts a user's visits by day, and keeps which pages they were to."""
    app = sf.App("t", partitions=PARTITIONS)
    source = app.topic("source", key_type=source_type, value_type=tuple[int, str])
    first = operator.itemgetter(0)
    visits = app.table(
        "visits", key_type=tuple[source_type, date], value_type=int, default=int, partition_by=first, **options
    )
    pages = app.set_table("pages", key_type=tuple[source_type, date], member_type=str, partition_by=first)

    @app.agent(source)
    async def count(stream: sf.Stream[tuple[int, str], Any]) -> None:
        async for user, (day, page) in stream.items():
            key = user, DAY + timedelta(day)
            visits[key] += 1
            pages[key].add(page)

    return app, source, visits, pages


USERS = {
    str: st.text(max_size=4),
    int: st.integers(-3, 300),
    tuple[str, int]: st.tuples(st.text(max_size=2), st.integers(0, 9)),
}


@pytest.mark.parametrize("source_type", list(USERS), ids=str)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_key_is_found_where_its_record_was_whoever_asks(source_type, data):
    record = st.tuples(USERS[source_type], st.integers(0, 3), st.sampled_from(["home", "shop"]))
    records = data.draw(st.lists(record, max_size=30))

    async def run() -> None:
        app, source, visits, pages = visiting(source_type)
        wanted: dict[Any, int] = {}
        seen: dict[Any, set[str]] = {}
        lies: dict[Any, int] = {}
        async with asyncio.timeout(20), TestApp(app) as test:
            for user, day, page in records:
                key = user, DAY + timedelta(day)
                wanted[key] = wanted.get(key, 0) + 1
                seen.setdefault(key, set()).add(page)
                lies[key] = (await test.send(source, (day, page), key=user)).partition
            await test.settle()
            assert dict(visits.items()) == wanted
            for key in wanted:
                assert visits[key] == visits.get(key) == wanted[key]
                assert key in visits
                assert set(pages[key]) == seen[key]
                assert await visits.update_async(key, lambda count: count + 10) == wanted[key] + 10
                await pages.update_async(key, lambda members: members.add("new"))
            done = await app.visit(visits, lambda key, count: count - 10)
            assert (done.keys, done.partitions) == (len(wanted), frozenset(range(PARTITIONS)))
            await test.settle()
            assert dict(visits.items()) == wanted
            assert {key: set(pages[key]) for key in pages} == {key: found | {"new"} for key, found in seen.items()}
            written = {event.key: event.partition for event in test.records(visits.changelog)}
            assert written == lies
            assert {event.key[0]: event.partition for event in test.records(pages.pairs.changelog)} == lies

    asyncio.run(run())


async def test_a_visit_may_write_and_delete():
    app, source, visits, _ = visiting()
    async with TestApp(app) as test:
        users = [f"user {number}" for number in range(40)]
        for user in users:
            await test.send(source, (1, "home"), key=user)
        await test.settle()

        def fn(key: Any, count: int) -> int | None:
            if key[0] < "user 2":
                visits.pop(key)
                visits[key[0], DAY] = count
            return None

        await app.visit(visits, fn)
        assert {key[0]: key[1] for key in visits} == {user: DAY + timedelta(user >= "user 2") for user in users}


async def test_a_key_of_another_users_record_is_refused():
    app = sf.App("t", partitions=PARTITIONS)
    source = app.topic("source", key_type=str, value_type=str)
    visits = app.table("visits", key_type=tuple[str, str], value_type=int, partition_by=lambda key: key[0])

    @app.agent(source, on_error=sf.Skip())
    async def write(stream: sf.Stream[str, str]) -> None:
        async for other in stream:
            visits[other, "x"] = 1

    async with TestApp(app) as test:
        for number in range(20):
            await test.send(source, str(number), key="ann")
        await test.settle()
        home = partition_for(b"ann", PARTITIONS)
        assert {key[0] for key in visits} == {
            str(number) for number in range(20) if partition_for(str(number).encode(), PARTITIONS) == home
        }


async def test_by_way_of_group_by_it_is_the_new_key():
    app = sf.App("t", partitions=PARTITIONS)
    source = app.topic("source", key_type=int, value_type=str)
    visits = app.table("visits", key_type=tuple[str, int], value_type=int, partition_by=lambda key: key[0])

    @app.agent(source.group_by(str.lower, name="lower", key_type=str))
    async def write(stream: sf.Stream[str, str]) -> None:
        async for event in stream.events():
            visits[event.key, len(event.value)] = 1

    async with TestApp(app) as test:
        for number in range(20):
            await test.send(source, f"USER{number}", key=number)
        await test.settle()
        assert sorted(visits) == sorted((f"user{number}", len(f"USER{number}")) for number in range(20))
        assert all(visits[key] == 1 for key in visits)


@pytest.mark.parametrize("wrong", [lambda key: key[1], lambda key: key[9]])
async def test_a_wrong_function_fails_the_record_and_the_read(wrong):
    app = sf.App("t", partitions=1)  # with one partition, too
    source = app.topic("source", key_type=str, value_type=int)
    visits = app.table("visits", key_type=tuple[str, int], value_type=int, partition_by=wrong)

    @app.agent(source, on_error=sf.Skip())
    async def write(stream: sf.Stream[int, str]) -> None:
        async for user, value in stream.items():
            visits[user, value] = 1

    async with TestApp(app) as test:
        await test.send(source, 1, key="ann")
        await test.settle()
        assert not visits
        for ask in (lambda: visits["ann", 1], lambda: visits.get(("ann", 1)), lambda: ("ann", 1) in visits):
            with pytest.raises(sf.ProductionError, match=r"table 'visits': partition_by=.*\('ann', 1\)"):
                ask()
        with pytest.raises(sf.ProductionError, match="table 'visits': partition_by="):
            await visits.update_async(("ann", 1), lambda value: 1)
