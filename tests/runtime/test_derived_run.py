"""`group_by` and `through` at work: keys, partition counts, restarts, and the purge behind them."""

from collections.abc import AsyncIterator

import msgspec
import pytest

import streamflow as sf
from streamflow.errors import LogUnavailableError
from streamflow.log.sqlite.admin import SqliteAdmin
from streamflow.model.partitioner import partition_for
from streamflow.testing import TestApp
from tests.runtime.machine import Machine

REPARTITION = "shop-orders-by-country-repartition"


class Order(msgspec.Struct):
    user: str
    country: str
    amount: int


def shop() -> tuple[sf.App, "sf.Topic[str, Order]", "sf.Topic[str, int]"]:
    app = sf.App("shop")
    orders = app.topic("orders", key_type=str, value_type=Order, partitions=3)
    sums = app.topic("sums", key_type=str, value_type=int, partitions=1)

    @app.agent(orders.group_by(Order.country), sink=sums)
    async def by_country(stream: sf.Stream[Order, str]) -> AsyncIterator[int]:
        async for key, order in stream.items():
            assert key == order.country
            yield order.amount

    return app, orders, sums


async def test_equal_keys_meet_in_one_partition_of_as_many_as_the_source_has() -> None:
    app, orders, sums = shop()
    partitions: dict[str, set[int]] = {}

    @app.agent(orders.group_by(Order.country))
    async def watch(stream: sf.Stream[Order, str]) -> None:
        async for event in stream.events():
            partitions.setdefault(event.key, set()).add(event.partition)

    async with TestApp(app) as test:
        for number in range(30):
            await test.send(orders, Order("u", f"c{number % 5}", number), key=f"u{number}")
        await test.settle()
        assert sorted(event.value for event in test.records(sums)) == list(range(30))
        assert partitions == {f"c{n}": {partition_for(f"c{n}".encode(), 3)} for n in range(5)}
        assert set(app.derived) == {"orders-by-country"}  # shared by both agents


async def test_chained_group_by_and_through() -> None:
    app = sf.App("chain")
    orders = app.topic("orders", key_type=str, value_type=Order, partitions=2)
    copies = app.topic("copies", key_type=str, value_type=Order, partitions=4)
    out = app.topic("out", key_type=int, value_type=int, partitions=1)

    @app.agent(orders.through(copies).group_by("country").group_by(Order.amount, key_type=int), sink=out)
    async def last(stream: sf.Stream[Order, int]) -> AsyncIterator[int]:
        async for key, order in stream.items():
            assert key == order.amount
            yield order.amount

    async with TestApp(app) as test:
        for number in range(10):
            await test.send(
                orders, Order("u", f"c{number % 3}", number), key="k", headers=[("h", b"1")], timestamp_ms=number
            )
        await test.settle()
        assert sorted((event.key, event.value) for event in test.records(out)) == [(n, n) for n in range(10)]
        assert [event.timestamp_ms for event in test.records(copies)] == list(range(10))
        assert all(event.key == "k" and event.headers == [("h", b"1")] for event in test.records(copies))


async def test_a_key_that_cannot_be_had_goes_to_the_policy_of_the_reader() -> None:
    app = sf.App("keys")
    orders = app.topic("orders", key_type=str, value_type=Order, partitions=1)
    dead = app.topic("dead")

    def key_of(order: Order) -> str:
        return ["a", "b"][order.amount]

    @app.agent(orders.group_by(key_of), on_error=sf.DeadLetter(dead))
    def work(order: Order) -> None:
        seen.append(order.amount)

    seen: list[int] = []
    async with TestApp(app) as test:
        for amount in (0, 5, 1):
            await test.send(orders, Order("u", "c", amount), key="k")
        await test.send_bytes(orders, b"?", key=b"k")
        await test.settle()
        assert sorted(seen) == [0, 1]
        assert sorted(
            dict(letter.headers)["streamflow-dead-letter-offset"] or b"" for letter in test.records(dead)
        ) == [
            b"1",
            b"3",
        ]


async def test_a_key_function_that_reads_a_table_is_told_where_one_may_be_read() -> None:
    app = sf.App("keys")
    orders = app.topic("orders", key_type=str, value_type=Order, partitions=1)
    countries = app.table("countries", key_type=str, value_type=str)
    prices = app.global_table("prices", key_type=str, value_type=str)

    def key_of(order: Order) -> str:
        return prices.get(order.user) or countries[order.user]

    @app.agent(orders.group_by(key_of), tables=[countries])
    def work(order: Order) -> None: ...

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(prices.source, "a price", key="known")
            await test.settle()
            await test.send(orders, Order("known", "c", 1), key="k")
            await test.settle()
            await test.send(orders, Order("u", "c", 1), key="k")
            await test.settle()

    with pytest.raises(sf.StreamFlowError, match="the key function of step 'orders-by-key_of'") as raised:
        await run()
    text = str(raised.value)
    assert "test_derived_run.py" in text
    assert "read the table in an agent before the step" in text
    assert "tables=[...]" not in text


async def test_a_restart_on_the_same_log_goes_on_where_it_was() -> None:
    app, orders, sums = shop()
    async with Machine(app) as machine:
        for part in range(3):
            running = await machine.start()
            for number in range(part * 10, part * 10 + 10):
                await machine.send(orders, Order("u", f"c{number % 4}", number), key=f"u{number}")
            await machine.settle()
            await (machine.crash if part == 1 else machine.stop)(running)
        assert sorted(machine.values(sums)) == list(range(30))


async def starts(machine: Machine, topic: str, count: int) -> dict[int, int]:
    found = await machine.log.admin.start_offsets([sf.TopicPartition(topic, number) for number in range(count)])
    return {tp.partition: offset for tp, offset in found.items()}


async def test_repartition_topics_are_purged_up_to_what_is_committed_and_others_are_not() -> None:
    app, orders, sums = shop()
    async with Machine(app) as machine:
        running = await machine.start()
        for number in range(12):
            await machine.send(orders, Order("u", "kr", number), key=f"u{number}")
        await machine.settle()
        assert set((await starts(machine, REPARTITION, 3)).values()) == {0}
        machine.clock.advance(31)
        partition = partition_for(b"kr", 3)

        async def purged() -> bool:
            return (await starts(machine, REPARTITION, 3))[partition] == 12

        await machine.until(purged)
        assert set((await starts(machine, "orders", 3)).values()) == {0}
        await machine.send(orders, Order("u", "kr", 99), key="u")
        await machine.settle()
        await machine.stop(running)  # a clean stop purges what is left
        assert (await starts(machine, REPARTITION, 3))[partition] == 13
        running = await machine.start()
        await machine.send(orders, Order("u", "kr", 100), key="u")
        await machine.settle()
        assert sorted(machine.values(sums)) == [*range(12), 99, 100]


async def test_what_is_not_committed_is_never_purged() -> None:
    app, orders, sums = shop()
    async with Machine(app) as machine:
        running = await machine.start()
        for number in range(5):
            await machine.send(orders, Order("u", "kr", number), key="u")
        await machine.settle()
        task = next(
            task for task in running.tasks.values() if REPARTITION in str(task.name) and max(task.committed.values())
        )
        for tp in task.committed:
            task.committed[tp] = 3  # as if the log had taken no more
        await machine.stop(running)
        assert (await starts(machine, REPARTITION, 3))[task.partition] in {3, 5}
        assert sorted(machine.values(sums)) == list(range(5))


async def test_a_purge_that_fails_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app, orders, _ = shop()
    delete_records = SqliteAdmin.delete_records
    failures = [LogUnavailableError("away")]

    async def fail(self: SqliteAdmin, before: dict[sf.TopicPartition, int]) -> None:
        if failures:
            raise failures.pop()
        await delete_records(self, before)

    monkeypatch.setattr(SqliteAdmin, "delete_records", fail)
    async with TestApp(app) as test:
        await test.send(orders, Order("u", "kr", 1), key="u")
        await test.advance(31)
        assert "away; trying again later" in caplog.text
        partition = sf.TopicPartition(REPARTITION, partition_for(b"kr", 3))
        log = test.worker._log
        assert await log.admin.start_offsets([partition]) == {partition: 0}
        await test.advance(30)
        assert await log.admin.start_offsets([partition]) == {partition: 1}
