# ruff: noqa: PERF401 - an agent's own loop is what is tested
"""Every form of an agent and every view of a stream, over the log in memory."""

import threading
import time
from collections.abc import AsyncIterator

import pytest

import streamflow as sf
from streamflow.testing import TestApp
from tests.runtime.waiting import until


def numbers_app(name: str, *, partitions: int = 1) -> tuple[sf.App, "sf.Topic[str, int]", "sf.Topic[str, int]"]:
    app = sf.App(name)
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=partitions)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)
    return app, numbers, out


async def sent(test: TestApp, topic: "sf.Topic[str, int]", count: int, *, keys: int = 1) -> None:
    for number in range(count):
        await test.send(topic, number, key=f"k{number % keys}")
    await test.settle()


def values(test: TestApp, topic: "sf.Topic[str, int]") -> list[int]:
    return [event.value for event in test.records(topic)]


async def test_coroutine_over_the_stream() -> None:
    app, numbers, out = numbers_app("coroutine")

    @app.agent(numbers)
    async def work(stream: sf.Stream[int]) -> None:
        async for number in stream:
            await out.send(key="k", value=number + 1)

    async with TestApp(app) as test:
        await sent(test, numbers, 3)
        assert values(test, out) == [1, 2, 3]


async def test_def_and_async_def_per_record() -> None:
    app, numbers, out = numbers_app("records")
    more = app.topic("more", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, sink=out)
    def plain(number: int) -> int | None:
        return None if number == 1 else number

    @app.agent(out, sink=more)
    async def awaited(number: int) -> int:
        return number * 10

    async with TestApp(app) as test:
        await sent(test, numbers, 4)
        assert values(test, out) == [0, 2, 3]
        assert values(test, more) == [0, 20, 30]


async def test_bare_decorator_has_a_topic_of_its_own() -> None:
    app = sf.App("bare")
    seen: list[str] = []

    @app.agent
    def listen(name: str) -> None:
        seen.append(name)

    assert list(app.topics) == ["bare-listen"]
    async with TestApp(app) as test:
        await test.send(listen, "ann")
        await test.send("bare-listen", "bob")
        await test.settle()
        assert sorted(seen) == ["ann", "bob"]


async def test_thread_runs_off_the_loop_and_keeps_order_and_sends() -> None:
    app, numbers, out = numbers_app("threads")
    side = app.topic("side", key_type=str, value_type=int, partitions=1)
    threads: set[int] = set()

    @app.agent(numbers, sink=out, thread=True)
    def work(number: int) -> int:
        threads.add(threading.get_ident())
        side.send_nowait(key="s", value=-number)
        return number

    async with TestApp(app) as test:
        await sent(test, numbers, 700)
        assert values(test, out) == list(range(700))
        assert values(test, side) == [-number for number in range(700)]
    assert threading.get_ident() not in threads


async def test_thread_error_in_the_middle_of_a_batch_drops_that_record_only() -> None:
    app, numbers, out = numbers_app("thread-errors")
    side = app.topic("side", key_type=str, value_type=int, partitions=1)
    tries: list[int] = []

    @app.agent(numbers, sink=out, thread=True, on_error=sf.Retry(1, backoff_s=0, then=sf.Skip()))
    def work(number: int) -> int:
        tries.append(number)
        side.send_nowait(key="s", value=number)
        if number in {5, 6, 19}:
            raise ValueError(number)
        return number

    async with TestApp(app) as test:
        await sent(test, numbers, 20)
        expected = [number for number in range(20) if number not in {5, 6, 19}]
        assert values(test, out) == values(test, side) == expected
    assert tries == sorted([*range(20), 5, 6, 19])


async def test_thread_passes_over_a_record_that_does_not_decode_in_the_middle_of_a_batch() -> None:
    app, numbers, out = numbers_app("thread-decode")
    all_sent = threading.Event()

    @app.agent(numbers, sink=out, thread=True, on_error=sf.Skip())
    def work(number: int) -> int:
        assert all_sent.wait(5)
        return number

    async with TestApp(app) as test:
        for number in range(20):
            if number == 9:
                await test.send_bytes(numbers, b"xx", key=b"k", partition=0)
            await test.send(numbers, number, key="k")
        all_sent.set()
        await test.settle()
        assert values(test, out) == list(range(20))


async def test_thread_batch_that_takes_long_comes_back_in_between() -> None:
    app, numbers, out = numbers_app("thread-slices")
    all_sent = threading.Event()

    @app.agent(numbers, sink=out, thread=True)
    def work(number: int) -> int:
        assert all_sent.wait(5)
        time.sleep(0.02)
        return number

    async with TestApp(app) as test:
        for number in range(8):
            await test.send(numbers, number, key="k")
        all_sent.set()
        await test.settle()
        assert values(test, out) == list(range(8))


async def test_thread_batch_ends_at_a_stop() -> None:
    app, numbers, out = numbers_app("thread-stop")
    begun, go_on = threading.Event(), threading.Event()

    @app.agent(numbers, sink=out, thread=True)
    def work(number: int) -> int:
        begun.set()
        assert go_on.wait(5)
        return number

    async with TestApp(app) as test:
        worker = test.worker
        for number in range(50):
            await test.send(numbers, number, key="k")
        await until(begun.is_set)
        worker.request_stop()
        await until(lambda: worker.state == "stopping")
        go_on.set()
        await until(lambda: worker.state == "stopped")
        await test.settle()
        done = values(test, out)
        assert 1 <= len(done) < 50
        assert done == list(range(len(done)))


async def test_events_carry_everything() -> None:
    app, numbers, _ = numbers_app("events")
    seen: list[sf.Event[int, str]] = []

    @app.agent(numbers)
    async def work(stream: sf.Stream[int, str]) -> None:
        async for event in stream.events():
            seen.append(event)

    async with TestApp(app) as test:
        await test.send(numbers, 7, key="a", timestamp_ms=123, headers=[("h", b"1"), ("n", None)])
        await test.settle()
        (event,) = seen
        assert (event.key, event.value, event.timestamp_ms, event.topic, event.partition, event.offset) == (
            ("a", 7, 123, "numbers", 0, 0)
        )
        assert event.id == "numbers-0-0"
        assert list(event.headers) == [("h", b"1"), ("n", None)]


async def test_items_filter_map_and_enumerate() -> None:
    app, numbers, out = numbers_app("views")

    async def is_even(item: tuple[str, int]) -> bool:
        return item[1] % 2 == 0

    async def tenfold(item: tuple[str, int]) -> tuple[str, int]:
        return item[0], item[1] * 10

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int, str]) -> AsyncIterator[sf.Out[int]]:
        async for key, value in stream.items().filter(is_even).map(tenfold).filter(lambda item: item[1] != 40):
            yield sf.Out(value, key=key)

    @app.agent(out)
    async def count(stream: sf.Stream[int]) -> None:
        async for number, value in stream.enumerate(start=1):
            counted.append((number, value))

    counted: list[tuple[int, int]] = []
    async with TestApp(app) as test:
        await sent(test, numbers, 8)
        assert values(test, out) == [0, 20, 60]
        assert counted == [(1, 0), (2, 20), (3, 60)]


async def test_a_filter_that_raises_is_an_error_of_its_record() -> None:
    app, numbers, out = numbers_app("filter-errors")

    def check(number: int) -> bool:
        if number == 2:
            raise ValueError("two")
        return number != 1

    @app.agent(numbers, sink=out, on_error=sf.Skip())
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream.filter(check):
            yield number

    async with TestApp(app) as test:
        await sent(test, numbers, 5)
        assert values(test, out) == [0, 3, 4]


async def test_several_topics_per_agent_are_merged_by_timestamp() -> None:
    app = sf.App("merge")
    a = app.topic("a", key_type=str, value_type=int, partitions=1)
    b = app.topic("b", key_type=str, value_type=int, partitions=1)
    seen: list[tuple[str, int]] = []

    @app.agent([a, b])
    async def work(stream: sf.Stream[int]) -> None:
        async for event in stream.events():
            seen.append((event.topic, event.timestamp_ms))

    async with TestApp(app, max_task_idle_ms=1000) as test:
        for time in (1, 3, 5, 9):
            await test.send(a, time, key="k", timestamp_ms=time)
        await test.settle()
        assert seen == []  # b is empty, and is waited for
        for time in (2, 4, 6):
            await test.send(b, time, key="k", timestamp_ms=time)
        await test.settle()
        assert [time for _, time in seen] == [1, 2, 3, 4, 5, 6]
        assert {topic for topic, time in seen if time % 2 == 0} == {"b"}
        await test.advance(1.1)
        assert seen[-1] == ("a", 9)


async def test_an_input_that_was_waited_for_once_does_not_slow_every_record() -> None:
    app = sf.App("idle")
    a = app.topic("a", key_type=str, value_type=int, partitions=1)
    b = app.topic("b", key_type=str, value_type=int, partitions=1)
    seen: list[int] = []

    @app.agent([a, b])
    async def work(number: int) -> None:
        seen.append(number)

    async with TestApp(app, max_task_idle_ms=1000) as test:
        for number in range(50):
            await test.send(a, number, key="k", timestamp_ms=number)
        await test.advance(1.1)
        assert seen == list(range(50))


async def test_several_agents_on_one_topic_each_see_every_record() -> None:
    app, numbers, out = numbers_app("several", partitions=2)
    units = app.topic("units", key_type=str, value_type=list[int], partitions=1)
    other = app.topic("other", key_type=str, value_type=int, partitions=2)
    heard: list[int] = []

    @app.agent(numbers, sink=out)
    def one(number: int) -> int:
        return number

    @app.agent(numbers, sink=units)
    async def two(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[list[int]]]:
        async for unit in stream.take(3, within_s=1):
            yield sf.Out(unit, key="u")

    @app.agent([numbers, other])
    async def three(stream: sf.Stream[int]) -> None:
        async for number in stream:
            heard.append(number)

    @app.agent(other)
    def four(number: int) -> None:
        assert number >= 100

    async with TestApp(app) as test:
        for number in range(10):
            await test.send(numbers, number, key="k")
            await test.send(other, number + 100, key="k")
        await test.advance(2)
        assert values(test, out) == list(range(10))
        assert [event.value for event in test.records(units)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
        assert sorted(heard) == [*range(10), *range(100, 110)]


async def test_a_unit_may_be_larger_than_what_is_in_flight() -> None:
    app, numbers, _ = numbers_app("large-units")
    units: list[int] = []
    seen: list[int] = []

    @app.agent(numbers)
    async def batch(stream: sf.Stream[int]) -> None:
        async for unit in stream.take(500):
            units.append(len(unit))

    @app.agent(numbers)
    def each(number: int) -> None:
        seen.append(number)

    async with TestApp(app) as test:
        await sent(test, numbers, 1000)
        assert units == [500, 500]
        assert seen == list(range(1000))


async def test_agents_are_sinks_and_there_may_be_several() -> None:
    app, numbers, out = numbers_app("sinks")
    heard: list[int] = []

    @app.agent
    async def listen(stream: sf.Stream[int, str]) -> None:
        async for event in stream.events():
            assert (event.key, event.headers) == ("k", [("n", b"1")])
            heard.append(event.value)

    @app.agent(numbers, sink=[out, listen])
    def work(number: int) -> sf.Out[int]:
        return sf.Out(number, key="k", headers=(("n", b"1"),))

    async with TestApp(app) as test:
        await sent(test, numbers, 3)
        assert sorted(values(test, out)) == [0, 1, 2]
        assert sorted(heard) == [0, 1, 2]


async def test_an_agent_that_returns_early_is_an_error_of_the_record_in_hand() -> None:
    app, numbers, out = numbers_app("early")

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            yield number
            if number == 1:
                return

    with pytest.raises(sf.ProcessingError, match=r"returned before its stream ended.*numbers-0-1"):
        await run_until_stopped(app, numbers)


async def test_an_error_before_the_first_record_stops_the_worker() -> None:
    app, numbers, out = numbers_app("first")

    @app.agent(numbers, sink=out, on_error=sf.Skip())
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        raise ValueError("not today")
        async for number in stream:
            yield number

    with pytest.raises(sf.ProcessingError, match="not today"):
        await run_until_stopped(app, numbers)


async def test_take_excludes_concurrency_at_the_first_record() -> None:
    app, numbers, _ = numbers_app("take-concurrency")

    def take(stream: sf.Stream[int]) -> AsyncIterator[list[int]]:
        return stream.take(2)

    @app.agent(numbers, concurrency=2)
    async def work(stream: sf.Stream[int]) -> None:
        async for _ in take(stream):
            pass

    with pytest.raises(sf.StreamFlowError, match="exclude each other"):
        await run_until_stopped(app, numbers)


async def run_until_stopped(app: sf.App, topic: "sf.Topic[str, int]") -> None:
    async with TestApp(app) as test:
        await sent(test, topic, 4)
