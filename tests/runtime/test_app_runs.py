"""Whole apps on the log in memory: the forms of agents, sinks, chains, error policies, units, lanes."""

import shutil
from collections.abc import AsyncIterator

import anyio
import msgspec
import pytest

import streamflow as sf
from streamflow.testing import TestApp


class Order(msgspec.Struct):
    user: str
    amount: float


class Total(msgspec.Struct):
    user: str
    total: float


async def test_generator_over_the_stream() -> None:
    app = sf.App("shop")
    orders = app.topic("orders", key_type=str, value_type=Order)
    totals = app.topic("totals", key_type=str, value_type=Total)

    @app.agent(orders, sink=totals)
    async def double(stream: sf.Stream[Order]) -> AsyncIterator[Total]:
        async for order in stream:
            yield Total(order.user, order.amount * 2)

    async with TestApp(app) as test:
        for number in range(10):
            await test.send(orders, Order(f"u{number % 3}", number), key=f"u{number % 3}")
        await test.settle()
        assert sorted(event.value.total for event in test.records(totals)) == [number * 2 for number in range(10)]
        assert all(event.key == event.value.user for event in test.records(totals))


async def test_a_hosted_worker_is_entered_when_its_tables_can_be_read(tmp_path) -> None:
    app = sf.App("warm", data_dir=str(tmp_path), partitions=8)
    words = app.topic("words", key_type=int, value_type=str)
    kept = app.table("kept", key_type=int, value_type=str)
    ended = anyio.Event()

    @app.agent(words)
    async def keep(stream: sf.Stream[str, int]) -> None:
        async for key, word in stream.items():
            kept[key] = word
            if len(word) == 5000:
                ended.set()

    async with app.running():
        for number in range(1, 401):
            await words.send(key=number, value="x" * number)
        await words.send(key=0, value="x" * 5000)
        with anyio.fail_after(20):
            await ended.wait()
    for directory in (tmp_path / "warm").iterdir():
        if directory.is_dir():
            shutil.rmtree(directory)  # so that there is something to restore
    async with app.running():
        assert kept.partitions == frozenset(range(8))
        assert len(kept) == 401
        assert kept[400] == "x" * 400


async def test_take_hands_out_units_by_size_and_by_time() -> None:
    app = sf.App("units")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    sums = app.topic("sums", key_type=str, value_type=list[int])

    @app.agent(numbers, sink=sums)
    async def batch(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[list[int]]]:
        async for unit in stream.take(3, within_s=5):
            yield sf.Out(unit, key="all")

    async with TestApp(app) as test:
        for number in range(5):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert [event.value for event in test.records(sums)] == [[0, 1, 2]]
        await test.advance(4.9)
        assert len(test.records(sums)) == 1
        await test.advance(0.2)
        assert [event.value for event in test.records(sums)] == [[0, 1, 2], [3, 4]]


async def test_a_record_that_raises_leaves_no_output_even_when_it_sent_before() -> None:
    app = sf.App("skips")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int)
    side = app.topic("side", key_type=str, value_type=int)

    @app.agent(numbers, sink=out, on_error=sf.Skip())
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            await side.send(key="s", value=number)
            yield number
            if number % 3 == 1:
                raise ValueError(number)

    async with TestApp(app) as test:
        for number in range(9):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert [event.value for event in test.records(out)] == [0, 2, 3, 5, 6, 8]
        assert [event.value for event in test.records(side)] == [0, 2, 3, 5, 6, 8]


async def test_stop_ends_the_worker_with_the_record() -> None:
    app = sf.App("stops")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int)

    @app.agent(numbers, sink=out)
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    async def run() -> None:
        async with TestApp(app) as test:
            for number in range(4):
                await test.send(numbers, number, key="k")
            await test.settle()

    with pytest.raises(sf.ProcessingError, match=r"two.*numbers-0-2"):
        await run()


async def test_retry_keeps_order_and_then_goes_to_the_dead_letters() -> None:
    app = sf.App("retries")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int)
    dead = app.topic("dead", key_type=str, value_type=bytes)
    tries: list[int] = []

    @app.agent(numbers, sink=out, on_error=sf.Retry(2, backoff_s=1, then=sf.DeadLetter(dead)))
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            tries.append(number)
            if number == 1:
                raise ValueError("one")
            yield number

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert [event.value for event in test.records(out)] == [0]
        await test.advance(60)
        assert [event.value for event in test.records(out)] == [0, 2]
        assert tries == [0, 1, 1, 1, 2]
        (letter,) = test.records(dead)
        headers = dict(letter.headers)
        assert headers["streamflow-dead-letter-attempts"] == b"3"
        assert headers["streamflow-dead-letter-offset"] == b"1"


async def test_concurrency_keeps_the_order_of_a_key() -> None:
    app = sf.App("lanes")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, sink=out, concurrency=4)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            await anyio.sleep(0.001 * (number % 5))
            yield number

    async with TestApp(app) as test:
        for number in range(40):
            await test.send(numbers, number, key=f"k{number % 7}")
        await test.settle()
        assert [event.value for event in test.records(out)] == list(range(40))


async def test_two_agents_on_one_topic_and_group_by() -> None:
    app = sf.App("pair")
    orders = app.topic("orders", key_type=str, value_type=Order)
    a = app.topic("a", key_type=str, value_type=float)
    b = app.topic("b", key_type=str, value_type=float)
    by_amount = app.topic("by-user", key_type=str, value_type=Order)

    @app.agent(orders, sink=a)
    def first(order: Order) -> float:
        return order.amount

    @app.agent(orders, sink=b)
    async def second(order: Order) -> float:
        return order.amount + 100

    @app.agent(orders.group_by(Order.user), sink=by_amount)
    async def third(stream: sf.Stream[Order]) -> AsyncIterator[Order]:
        async for key, order in stream.items():
            assert key == order.user
            yield order

    async with TestApp(app) as test:
        for number in range(12):
            await test.send(orders, Order(f"u{number % 4}", number), key="same")
        await test.settle()
        assert sorted(event.value for event in test.records(a)) == list(range(12))
        assert sorted(event.value for event in test.records(b)) == [number + 100 for number in range(12)]
        assert sorted(event.value.amount for event in test.records(by_amount)) == list(range(12))
        assert all(event.key == event.value.user for event in test.records(by_amount))


async def test_ask_returns_the_first_yield_or_the_error() -> None:
    app = sf.App("asks")

    @app.agent()
    async def double(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            if number < 0:
                continue
            yield number * 2

    @app.agent(on_error=sf.Skip())
    def broken(number: int) -> int:
        raise ValueError("no")

    async with TestApp(app) as test, anyio.create_task_group() as tasks:

        async def ask() -> None:
            assert await double.ask(21) == 42
            with pytest.raises(sf.AskError, match="without an answer"):
                await double.ask(-1)
            with pytest.raises(sf.AskError, match="no"):
                await broken.ask(1)
            tasks.cancel_scope.cancel()

        tasks.start_soon(ask)
        while True:
            await test.settle()
            await anyio.sleep(0.002)


async def test_timer_fires_with_the_clock() -> None:
    app = sf.App("ticks")
    ticks = app.topic("ticks", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int)
    count = 0

    @app.timer(10)
    async def tick() -> None:
        nonlocal count
        count += 1
        await ticks.send(key="t", value=count)

    @app.agent(ticks, sink=out)
    def copy(number: int) -> int:
        return number

    async with TestApp(app) as test:
        await test.advance(35)
        assert [event.value for event in test.records(out)] == [1, 2, 3]
