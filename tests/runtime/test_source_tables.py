"""Tables that a topic fills, in whole workers on a log in memory."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamflow as sf
from streamflow.errors import ConfigurationError, NotHeld, ProcessingError, TopologyError
from streamflow.log.api import NewTopic
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import NONE
from streamflow.metrics import PrometheusSensors
from streamflow.runtime.table_import import import_table
from streamflow.runtime.table_reader import TableLog
from streamflow.testing import TestApp
from tests.runtime.machine import Machine
from tests.runtime.waiting import until

COMPACT = {"cleanup.policy": "compact"}


class User(msgspec.Struct):
    name: str
    tags: list[str] = []


def shop(value_type: Any = str, **options: Any) -> tuple[sf.App, Any, Any, Any, Any]:
    """Orders are joined with the users that place them."""
    app = sf.App("shop", partitions=2)
    source = app.topic("users", key_type=str, value_type=value_type, compacting=True)
    users = app.table("people", source=source, **options)
    orders = app.topic("orders", key_type=str, value_type=int)
    joined = app.topic("joined", key_type=str, value_type=list[Any])

    @app.agent(orders, sink=joined)
    async def join(stream: sf.Stream[int, str]) -> AsyncIterator[list[Any]]:
        async for key, number in stream.items():
            yield [number, users.get(key)]

    return app, users, source, orders, joined


async def test_an_agent_finds_what_the_topic_says_at_the_time_of_its_record() -> None:
    app, _, source, orders, joined = shop()
    async with TestApp(app) as test:
        await test.send(orders, 1, key="ann", timestamp_ms=1)
        await test.send(source, "Ann", key="ann", timestamp_ms=2)
        await test.send(orders, 2, key="ann", timestamp_ms=3)
        await test.settle()
        await test.send(source, "Anna", key="ann", timestamp_ms=4)
        await test.send(orders, 3, key="ann", timestamp_ms=4)
        await test.settle()
        await test.send(source, None, key="ann", timestamp_ms=5)
        await test.send(orders, 4, key="ann", timestamp_ms=6)
        await test.settle()
        assert [event.value for event in test.records(joined)][-2:] == [[3, "Anna"], [4, None]]


async def test_everything_that_waits_is_merged_by_time() -> None:
    """Each order finds the value that was there before it, and none that came after, however runs are cut."""
    app, _, source, orders, joined = shop()
    dice = random.Random(3)
    expected: dict[str, list[Any]] = {}
    now: dict[str, str | None] = {}
    async with Machine(app) as machine:
        for at_ms in range(1, 600):
            key = f"k{dice.randrange(5)}"
            if dice.random() < 0.5:
                now[key] = None if dice.random() < 0.2 else f"v{at_ms}"
                await machine.send(source, now[key], key=key, timestamp_ms=at_ms)
            else:
                expected.setdefault(key, []).append([at_ms, now.get(key)])
                await machine.send(orders, at_ms, key=key, timestamp_ms=at_ms)
        running = await machine.start()
        await machine.settle()
        found: dict[str, list[Any]] = {}
        for event in machine.records(joined):
            found.setdefault(event.key, []).append(event.value)
        assert found == expected
        await machine.stop(running)


async def test_of_equal_times_the_table_comes_first() -> None:
    app, _, source, orders, joined = shop()
    async with Machine(app, partitions=1) as machine:
        builder = BatchBuilder(NONE, 10_000)  # in one batch, so that one run might have both
        for at_ms in (3, 5):
            assert builder.append(at_ms, b"ann", at_ms.to_bytes(8, "big"), [])
        async with machine.log.producer() as producer:
            await (await producer.enqueue(sf.TopicPartition(orders.name, 0), builder.seal()))
        await machine.send(source, "Ann", key="ann", timestamp_ms=5)
        running = await machine.start()
        await machine.settle()
        assert machine.values(joined) == [[3, None], [5, "Ann"]]
        await machine.stop(running)


@pytest.mark.parametrize("form", ["concurrent", "two agents", "thread", "reads the source too"])
async def test_the_order_holds_in_every_form_of_agent(form: str) -> None:
    app = sf.App("shop", partitions=1)
    source = app.topic("users", key_type=str, value_type=int, compacting=True)
    users = app.table("people", source=source, default=int)
    orders = app.topic("orders", key_type=str, value_type=int)
    seen: list[tuple[int, int]] = []

    if form == "thread":

        @app.agent(orders, thread=True)
        def blocking(number: int) -> None:
            seen.append((number, users["k"]))

    else:

        @app.agent(orders, concurrency=4 if form == "concurrent" else 1)
        async def read(number: int) -> None:
            seen.append((number, users["k"]))
            if number % 7 == 0:
                await asyncio.sleep(0.001)

    changes: list[tuple[int, int]] = []
    if form == "two agents":

        @app.agent(orders)
        async def other(number: int) -> None:
            await asyncio.sleep(0)

    elif form == "reads the source too":

        @app.agent(source)
        async def changed(stream: sf.Stream[int]) -> None:
            async for value in stream:
                held = users["k"]
                changes.append((value, held))

    dice, expected, now = random.Random(5), [], 0
    async with Machine(app) as machine:
        for at_ms in range(1, 400):
            if dice.random() < 0.5:
                now = at_ms
                await machine.send(source, at_ms, key="k", timestamp_ms=at_ms)
            else:
                expected.append((at_ms, now))
                await machine.send(orders, at_ms, key=f"o{dice.randrange(9)}", timestamp_ms=at_ms)
        running = await machine.start()
        await machine.settle()
        assert sorted(seen) == expected
        assert all(value == held for value, held in changes)
        assert bool(changes) is (form == "reads the source too")
        await machine.stop(running)


@pytest.mark.parametrize("agents", [1, 2])
async def test_a_unit_that_waits_holds_nothing_up_and_sees_the_newest(agents: int) -> None:
    app = sf.App("shop", partitions=1)
    source = app.topic("users", key_type=str, value_type=str, compacting=True)
    users = app.table("people", source=source)
    orders = app.topic("orders", key_type=str, value_type=int)
    seen: list[tuple[list[int], str | None]] = []

    @app.agent(orders)
    async def read(stream: sf.Stream[int]) -> None:
        async for numbers in stream.take(3, within_s=60):
            unit = list(numbers)
            seen.append((unit, users.get("k")))

    if agents == 2:

        @app.agent(orders)
        async def other(number: int) -> None:
            users.get("k")

    async with TestApp(app) as test:
        await test.send(orders, 1, key="a", timestamp_ms=1)
        await test.settle()
        await test.send(source, "first", key="k", timestamp_ms=2)
        await test.settle()
        await test.send(source, "second", key="k", timestamp_ms=3)
        await test.send(orders, 2, key="a", timestamp_ms=4)
        await test.send(orders, 3, key="a", timestamp_ms=5)
        await test.settle()
        assert seen == [([1, 2, 3], "second")]
        assert users["k"] == "second"


async def test_reading_from_outside_sees_what_is_committed() -> None:
    app, users, source, _, _ = shop(User)
    with pytest.raises(NotHeld):
        users["ann"]
    async with TestApp(app) as test:
        for name in ("ann", "bob", "cem", "dee"):
            await test.send(source, User(name), key=name)
        await test.settle()
        assert sorted(users) == ["ann", "bob", "cem", "dee"]
        assert users.partitions == {0, 1}
        users["ann"].tags.append("lost")
        assert users["ann"] == User("ann")
        await test.send(source, None, key="ann")
        await test.settle()
        assert users.get("ann") is None
        assert len(users) == 3


async def test_there_is_no_second_changelog() -> None:
    app, users, source, orders, _ = shop()
    assert users.changelog is source
    async with TestApp(app) as test:
        await test.send(source, "Ann", key="ann")
        await test.send(orders, 1, key="ann")
        await test.settle()
        assert not [name for name in await test.worker._log.admin.topics() if "changelog" in name]
        assert len(test.records(source)) == 1


async def test_writing_is_refused_with_the_way_to_do_it() -> None:
    app = sf.App("shop", partitions=1)
    source = app.topic("users", key_type=str, value_type=str, compacting=True)
    users = app.table("people", source=source)
    orders = app.topic("orders", key_type=str, value_type=int)
    errors: list[str] = []

    @app.agent(orders)
    async def read(stream: sf.Stream[int]) -> None:
        async for _ in stream:
            ways: list[Any] = [
                lambda: users.__setitem__("a", "b"),
                lambda: users.__delitem__("a"),
                lambda: users.pop("a"),
                lambda: users.setdefault("a", "b"),
                users.clear,
            ]
            for way in ways:
                try:
                    way()
                except TopologyError as error:
                    errors.append(str(error))
            with pytest.raises(TopologyError):
                await users.update_async("a", lambda _: "b")

    async with TestApp(app) as test:
        await test.send(orders, 1)
        await test.settle()
        with pytest.raises(TopologyError, match="send to the topic"):
            users["a"] = "b"
    assert len(errors) == 5
    assert all("await users.send(key=..., value=...)" in error for error in errors)


async def test_values_in_a_turn_are_copies_and_ranges_are_in_order() -> None:
    app = sf.App("shop", partitions=1)
    source = app.topic("users", key_type=str, value_type=User, compacting=True)
    users = app.table("people", source=source, default=lambda: User("nobody"))
    orders = app.topic("orders", key_type=str, value_type=int)
    seen: list[Any] = []

    @app.agent(orders)
    async def read(number: int) -> None:
        users["b"].tags.append("lost")
        users["missing"].tags.append("lost")
        next(iter(users.values())).tags.append("lost")
        seen.append((users["b"], users["missing"], list(users), "a" in users, "missing" in users, len(users)))

    async with TestApp(app) as test:
        for name in ("c", "a", "b"):
            await test.send(source, User(name), key=name)
        await test.settle()
        await test.send(orders, 1)
        await test.send(orders, 2)
        await test.settle()
    assert seen == [(User("b"), User("nobody"), ["a", "b", "c"], True, False, 3)] * 2


async def test_a_record_that_cannot_be_read_is_passed_over_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    app, users, source, orders, joined = shop(int)
    sensors = PrometheusSensors()
    async with Machine(app, partitions=1) as machine:
        running = await machine.start(sensors=sensors)
        await machine.send(source, 1, key="ann", timestamp_ms=1)
        async with machine.log.producer() as producer:
            builder = BatchBuilder(NONE, 10_000)
            for key, value in ((b"ann", b"x"), (None, b"\x00" * 8), (b"\xff", b"\x00" * 8)):
                assert builder.append(2, key, value, [])
            tp = sf.TopicPartition("users", 0)
            await (await producer.enqueue(tp, builder.seal()))
        await machine.send(orders, 5, key="ann", timestamp_ms=3)
        with caplog.at_level(logging.WARNING):
            await machine.settle()
        assert machine.values(joined) == [[5, 1]]
        assert sensors.errors["table people", "skip"] == 3
        assert len([one for one in caplog.records if "users-0-1 cannot be read" in one.getMessage()]) == 1
        await machine.crash(running)
        again = await machine.start()
        await machine.send(orders, 6, key="ann", timestamp_ms=4)
        await machine.settle()
        assert machine.values(joined)[-1] == [6, 1]
        assert users["ann"] == 1
        await machine.stop(again)


# --- restore --------------------------------------------------------------------------------------------------------


async def test_it_is_restored_from_its_source_up_to_the_commit_and_not_beyond() -> None:
    """What lies behind the committed offset is processed, in its order, and not restored."""
    app, users, source, orders, joined = shop()
    recovered: list[int] = []
    users.on_recover = recovered.append
    async with Machine(app, partitions=1) as machine:
        running = await machine.start()
        for number in range(300):
            await machine.send(source, f"v{number}", key=f"k{number % 50}", timestamp_ms=number)
        await machine.settle()
        await machine.crash(running)
        await machine.send(orders, 1, key="k7", timestamp_ms=1000)
        await machine.send(source, "later", key="k7", timestamp_ms=2000)
        await machine.send(orders, 2, key="k7", timestamp_ms=3000)
        again = await machine.start()
        await machine.settle()
        assert machine.values(joined) == [[1, "v257"], [2, "later"]]
        assert recovered == [0, 0]
        assert len(users) == 50
        await machine.stop(again)


@pytest.mark.parametrize("reset", ["earliest", "latest"])
async def test_a_new_app_finds_the_whole_topic(reset: str) -> None:
    """What the topic had before is there from the first record, wherever the app starts in its other sources."""
    app, _, source, orders, joined = shop()
    async with Machine(app, auto_offset_reset=reset, partitions=1) as machine:
        for number in range(20):
            await machine.send(source, f"v{number}", key=f"k{number}", timestamp_ms=number)
        running = await machine.start()
        await machine.send(orders, 1, key="k3", timestamp_ms=100)
        await machine.settle()
        assert machine.values(joined) == [[1, "v3"]]
        await machine.stop(running)


async def test_uncommitted_changes_of_a_crash_are_not_in_the_table() -> None:
    app, users, source, *_ = shop()
    async with Machine(app, partitions=1) as machine:
        running = await machine.start()
        await machine.send(source, "old", key="ann", timestamp_ms=1)
        await machine.settle()
        await machine.send(source, "new", key="ann", timestamp_ms=5)
        task = running.tasks["orders-0"]
        await until(lambda: task.tables.overlays["people"].find("ann") == "new")
        assert users["ann"] == "old"
        await machine.crash(running)
        again = await machine.start()
        await machine.until(lambda: _is(users, "ann", "new"))
        await machine.stop(again)


async def _is(table: Any, key: str, value: str) -> bool:
    return bool(table.get(key) == value)


async def test_a_task_that_moves_takes_its_part_along() -> None:
    app, _, source, orders, joined = shop()
    async with Machine(app, partitions=4) as machine:
        first = await machine.start()
        for number in range(100):
            await machine.send(source, f"v{number}", key=f"k{number}", timestamp_ms=number)
        await machine.settle()
        second = await machine.start()
        await machine.until(lambda: _shared(first, second))
        for number in range(100):
            await machine.send(orders, number, key=f"k{number}", timestamp_ms=1000 + number)
        await machine.settle()
        assert sorted(machine.values(joined)) == [[number, f"v{number}"] for number in range(100)]
        await machine.stop(first)
        await machine.stop(second)


async def _shared(*workers: Any) -> bool:
    return all(len(worker.tasks) == 2 for worker in workers)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 7), st.integers(0, 1000)),
        st.tuples(st.just("delete"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("order"), st.integers(0, 7), st.just(0)),
        st.tuples(st.sampled_from(["crash", "stop", "commit"]), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=actions)
def test_it_equals_a_dict_whatever_happens(steps: list[tuple[str, int, int]]) -> None:
    asyncio.run(_equals_a_dict(steps))


async def _equals_a_dict(steps: list[tuple[str, int, int]]) -> None:
    app, users, source, orders, joined = shop(int)
    expected: dict[str, int] = {}
    lookups: list[list[Any]] = []
    async with Machine(app) as machine:
        running = await machine.start()
        for at_ms, (action, number, value) in enumerate(steps, start=1):
            key = f"k{number}"
            if action == "put":
                expected[key] = value
                await machine.send(source, value, key=key, timestamp_ms=at_ms)
            elif action == "delete":
                expected.pop(key, None)
                await machine.send(source, None, key=key, timestamp_ms=at_ms)
            elif action == "order":
                await machine.settle()
                lookups.append([at_ms, expected.get(key)])
                await machine.send(orders, at_ms, key=key, timestamp_ms=at_ms)
                await machine.settle()
            elif action == "commit":
                await machine.commit(running)
            else:
                await (machine.crash(running) if action == "crash" else machine.stop(running))
                running = await machine.start()
        await machine.settle()
        assert dict(users.items()) == expected
        assert sorted(machine.values(joined)) == lookups
        await machine.stop(running)


async def test_what_is_read_beside_a_worker_is_what_is_committed() -> None:
    app, _, source, *_ = shop()
    async with Machine(app, partitions=1) as machine:
        running = await machine.start()
        await machine.send(source, "Ann", key="ann")
        await machine.settle()
        await machine.stop(running)
        await machine.send(source, "Bob", key="bob")
        table = await TableLog.find(app, "people", machine.log.admin)
        (mark,) = table.marks(await machine.log.admin.group_offsets(app.id))
        (fold,) = await table.fold(machine.log, {0: mark})
        assert fold.live(None) == {b"ann": b"Ann"}
        assert set(fold.uncommitted) == {b"bob"}


async def test_an_import_is_refused_with_the_way_to_do_it() -> None:
    app, *_ = shop()
    async with Machine(app) as machine:
        with pytest.raises(ConfigurationError, match="`streamflow send`"):
            await import_table(machine.log, app, machine.settings, "people", {b"ann": b"Ann"})


# --- declaration -----------------------------------------------------------------------------------------------------


def test_the_topology_joins_the_source_to_whoever_reads_the_table() -> None:
    app, users, _, _, _ = shop()
    topology = app.topology()
    (sub,) = topology.sub_topologies
    assert (sub.topics, sub.tables, sub.agents) == (("orders", "users"), ("people",), ("join",))
    (table,) = topology.tables
    assert (table.kind, table.changelog) == ("source", "users")
    assert ("topic:users", "table:people", "fills") in {
        (edge.source, edge.target, edge.kind) for edge in topology.edges
    }
    assert "table people (str: str), filled from topic users (str: str)" in topology.to_text()
    assert users is app.table("people", source=app.topics["users"])


def test_what_does_not_fit_is_refused_where_it_is_declared() -> None:
    app, _, source, orders, _ = shop()
    with pytest.raises(ConfigurationError, match="types and serializers are those of its source"):
        app.table("more", source=source, value_type=str)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="ttl_s= is for tables that agents write"):
        app.table("more", source=source, ttl_s=5)  # type: ignore[call-overload]
    with pytest.raises(TopologyError, match="another source="):
        app.table("people", source=orders)
    app.table("unused", source=source)
    with pytest.raises(TopologyError, match=r"named by no agent.*is an `app\.global_table`"):
        app.topology()


@pytest.mark.parametrize(
    ("what", "options"),
    [("partition counts", {"partitions": 3}), ("partitioners", {"partitioner": lambda key, count: 0})],
)
async def test_sources_that_are_partitioned_unlike_are_refused(what: str, options: Any) -> None:
    app = sf.App("shop", partitions=2)
    users = app.table("people", source=app.topic("users", key_type=str, value_type=str, compacting=True, **options))

    @app.agent(app.topic("orders", key_type=str, value_type=int))
    async def read(number: int) -> None:
        users.get("a")

    with pytest.raises(TopologyError, match=f"{what} differ"):
        async with TestApp(app):
            pass


async def test_a_source_that_forgets_is_refused() -> None:
    app, _, _, _, _ = shop()
    async with Machine(sf.App("other")) as machine:
        await machine.log.admin.create([NewTopic("users", 2, config={"retention.ms": "5000"})])
        running = await machine.start(app=app)
        with pytest.raises(TopologyError, match=r"table 'people' .*retention\.ms=5000"):
            await machine.ended(running)


async def test_an_agent_that_does_not_name_the_table_may_not_touch_it() -> None:
    app, users, _, _, _ = shop()
    hidden = {"people": users}
    returns = app.topic("returns", key_type=str, value_type=int)

    @app.agent(returns, tables=[])
    async def read(number: int) -> None:
        hidden["people"].get("a")

    async with Machine(app) as machine:
        running = await machine.start()
        await machine.send(returns, 1)
        with pytest.raises(ProcessingError, match="which its code does not name"):
            await machine.ended(running)
