"""`sf.testing.TestApp` itself: what it settles, what it moves, and what it says."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import streamflow as sf
from streamflow.testing import Records, TestApp


def app_of(name: str) -> tuple[sf.App, "sf.Topic[str, int]", "sf.Topic[str, int]"]:
    app = sf.App(name)
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    return app, numbers, app.topic("out", key_type=str, value_type=int, partitions=1)


async def test_settle_waits_for_the_whole_chain() -> None:
    app, numbers, out = app_of("chain")
    middle = app.topic("middle", key_type=str, value_type=int)

    @app.agent(numbers, sink=middle)
    async def first(number: int) -> int:
        await asyncio.sleep(0.002)
        return number + 1

    @app.agent(middle, sink=out)
    async def second(number: int) -> int:
        await asyncio.sleep(0.002)
        return number * 10

    async with TestApp(app) as test:
        metadata = await test.send(numbers, 1, key="k")
        assert (metadata.topic, metadata.partition, metadata.offset) == ("numbers", 0, 0)
        assert metadata.timestamp_ms == test.clock.now_ms() == 1_700_000_000_000
        await test.settle()
        records = test.records("out")
        assert isinstance(records, Records)
        assert [event.id for event in await test.records(out)] == ["out-0-0"]
        assert [(event.key, event.value) for event in records] == [("k", 20)]


async def test_settle_says_what_is_still_being_processed() -> None:
    app, numbers, _ = app_of("busy")
    gate = asyncio.Event()

    @app.agent(numbers)
    async def slow(number: int) -> None:
        await gate.wait()

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        with pytest.raises(TimeoutError, match=r"not settled after 0.05 s: agent 'slow' has numbers-0-0 in hand"):
            await test.settle(timeout_s=0.05)
        gate.set()
        await test.settle()


async def test_only_advance_moves_time_and_wakes_in_order() -> None:
    app, numbers, out = app_of("time")
    fired: list[tuple[str, float]] = []

    @app.timer(3)
    def three() -> None:
        fired.append(("three", test.clock.monotonic()))

    @app.timer(2)
    def two() -> None:
        fired.append(("two", test.clock.monotonic()))

    @app.agent(numbers, sink=out)
    async def unit(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
        async for numbers_ in stream.take(10, within_s=4):
            yield sf.Out(sum(numbers_), key="k")

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        await test.settle()
        await asyncio.sleep(0.01)
        assert fired == []
        await test.advance(3.5)
        assert fired == [("two", 2), ("three", 3)]
        assert test.records(out) == []
        await test.advance(0.5)
        assert [event.value for event in test.records(out)] == [1]
        assert fired[-1] == ("two", 4)


async def test_a_timer_does_not_fire_while_the_test_ends() -> None:
    app, _, _ = app_of("end")
    fired: list[int] = []

    @app.timer(0.001)
    def tick() -> None:
        fired.append(1)

    async with TestApp(app) as test:
        await test.settle()
    assert fired == []


async def test_what_stopped_the_worker_comes_out_of_send_settle_and_the_block() -> None:
    app, numbers, _ = app_of("stops")

    @app.agent(numbers)
    def fail(number: int) -> None:
        raise ValueError("no")

    async def run(*, then_send: bool, then_settle: bool) -> None:
        async with TestApp(app) as test:
            await test.send(numbers, 1, key="k")
            while then_send or not then_settle:
                if test.worker.state == "stopped":
                    break
                await asyncio.sleep(0.001)
            if then_send:
                await test.send(numbers, 2, key="k")
            if then_settle:
                await test.settle()

    for then_send, then_settle in ((True, False), (False, True), (False, False)):
        with pytest.raises(sf.ProcessingError, match=r"ValueError: no \(at numbers-0-0\)"):
            await run(then_send=then_send, then_settle=then_settle)


async def test_settle_waits_for_a_worker_that_is_stopping_over_an_error() -> None:
    app, numbers, _ = app_of("stopping")

    @app.agent(numbers)
    async def fail(number: int) -> None:
        raise ValueError("no")

    @app.on_stop
    async def slow() -> None:
        await asyncio.sleep(0.2)

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        with pytest.raises(sf.ProcessingError, match="ValueError: no"):
            await test.settle()


async def test_an_error_of_the_test_itself_is_not_hidden() -> None:
    app, numbers, _ = app_of("own")

    @app.agent(numbers)
    def fail(number: int) -> None:
        raise ValueError("of the agent")

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(numbers, 1, key="k")
            raise LookupError("of the test")

    with pytest.raises(LookupError, match="of the test"):
        await run()


async def test_a_start_that_is_refused_says_why() -> None:
    app, _, _ = app_of("refused")
    app.topic("nowhere", create=False)

    async def run() -> None:
        async with TestApp(app):
            pass

    with pytest.raises(sf.TopologyError, match="'nowhere' does not exist"):
        await run()


async def test_bytes_are_sent_as_they_are_and_read_back_when_asked_for() -> None:
    app, numbers, out = app_of("bytes")

    @app.agent(numbers, sink=out, on_error=sf.Skip())
    def work(number: int) -> int:
        return number

    async with TestApp(app) as test:
        metadata = await test.send_bytes(numbers, b"?", key=b"k", timestamp_ms=5, headers=[("h", None)])
        assert metadata == sf.RecordMetadata("numbers", 0, 0, 5)
        await test.send(work, 2, key="k")
        await test.settle()
        assert [event.value for event in test.records(out)] == [2]
        with pytest.raises(sf.DeserializationError, match="numbers-0-0"):
            test.records(numbers)


class Registry:
    """A serializer that knows no schema until one is loaded, and cannot load number 9."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def bind(self, type: Any, *, topic: str, part: str) -> "Registry":
        return self

    def encode(self, value: str, headers: Any) -> bytes:
        return b"\x01" + value.encode()

    def decode(self, data: bytes, headers: Any) -> str:
        if data[0] not in self.known:
            raise sf.NeedSchema(data[0])
        return data[1:].decode()

    async def load_schema(self, id: int | str) -> None:
        if id == 9:
            raise LookupError("no schema 9")
        self.known.add(int(id))


async def test_schemas_are_loaded_for_records_that_no_agent_read() -> None:
    app = sf.App("schemas")
    names = app.topic("names", value_type=str, partitions=1, key_serializer=Registry(), value_serializer=Registry())
    async with TestApp(app) as test:
        await test.send(names, "ann", key="k")
        await test.send_bytes(names, b"\x02bob", key=b"\x03k")
        await test.settle()
        assert [(event.key, event.value) for event in test.records(names)] == [("k", "ann"), ("k", "bob")]
        await test.send_bytes(names, b"\x09cid")
        await test.settle()
        with pytest.raises(sf.DeserializationError, match=r"no schema 9.*names-0-2"):
            test.records(names)


async def test_every_run_has_a_log_of_its_own_and_settings_may_be_given() -> None:
    app, numbers, out = app_of("own-log")

    @app.agent(numbers, sink=out)
    def work(number: int) -> int:
        return number

    for guarantee in ("exactly_once", "at_least_once"):
        async with TestApp(app, processing_guarantee=guarantee) as test:
            assert test.worker.status().guarantee == guarantee
            await test.send(numbers, 2, key="k")
            await test.settle()
            assert [event.value for event in test.records(out)] == [2]
    with pytest.raises(RuntimeError, match="async with TestApp"):
        TestApp(app).records(out)
