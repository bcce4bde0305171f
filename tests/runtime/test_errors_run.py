# ruff: noqa: PERF401 - an agent's own loop is what is tested
"""Records that fail: the policies, decode errors, what is committed past them and what is not."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

import streamflow as sf
from streamflow.model.serde import NeedSchema
from streamflow.runtime.worker import Worker
from streamflow.sensors import Sensors
from streamflow.testing import TestApp
from tests.runtime.waiting import until


class Order(msgspec.Struct):
    user: str
    amount: int


class Counting(Sensors):
    """Counts what was done about failed records."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []

    def record_error(self, agent: str, policy: str) -> None:
        self.errors.append((agent, policy))


def numbers_app(name: str, *, partitions: int = 1) -> tuple[sf.App, "sf.Topic[str, int]", "sf.Topic[str, int]"]:
    app = sf.App(name)
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=partitions)
    return app, numbers, app.topic("out", key_type=str, value_type=int, partitions=1)


def values(test: TestApp, topic: "sf.Topic[Any, Any]") -> list[Any]:
    return [event.value for event in test.records(topic)]


def committed(test: TestApp) -> dict[str, int]:
    """Committed position per partition, as the tasks of the running worker know it."""
    manager = test.worker.manager
    assert manager is not None
    return {str(tp): offset for task in manager.running() for tp, offset in task.committed.items()}


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["generator", "record", "thread", "lanes", "two agents", "take"])
async def test_a_record_that_raises_leaves_no_output_in_any_form(form: str) -> None:
    app, numbers, out = numbers_app("no-output")
    side = app.topic("side", key_type=str, value_type=int, partitions=1)
    skip = sf.Skip()

    def fail(number: int) -> int:
        side.send_nowait(key="s", value=number)
        if number % 4 == 1:
            raise ValueError(number)
        return number

    declare_failing(app, form, numbers, out, skip, fail)
    async with TestApp(app) as test:
        for number in range(12):
            await test.send(numbers, number, key=f"k{number % 3}")
        await test.settle()
        passed = [number for number in range(12) if number % 4 != 1]
        if form == "take":  # units of two: the neighbour of a failed record goes with it
            passed = [number for number in range(12) if number % 4 > 1]
        assert values(test, out) == passed
        assert values(test, side) == passed
        assert committed(test) == {"numbers-0": 12}


def declare_failing(
    app: sf.App,
    form: str,
    numbers: "sf.Topic[str, int]",
    out: "sf.Topic[str, int]",
    policy: Any,
    work: Callable[[int], int],
) -> None:
    if form == "thread":

        @app.agent(numbers, sink=out, on_error=policy, thread=True)
        def in_thread(number: int) -> int:
            return work(number)
    elif form == "record":

        @app.agent(numbers, sink=out, on_error=policy)
        def record(number: int) -> int:
            return work(number)
    elif form == "take":

        @app.agent(numbers, sink=out, on_error=policy)
        async def take(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
            async for unit in stream.take(2):
                for number in unit:
                    yield sf.Out(work(number), key="k")
    else:

        @app.agent(numbers, sink=out, on_error=policy, concurrency=4 if form == "lanes" else 1)
        async def generator(stream: sf.Stream[int]) -> AsyncIterator[int]:
            async for number in stream:
                await asyncio.sleep(0)
                yield work(number)

        if form == "two agents":

            @app.agent(numbers)
            async def other(number: int) -> None:
                await asyncio.sleep(0)


@pytest.mark.parametrize("form", ["generator", "thread", "lanes", "two agents", "take"])
async def test_stop_commits_nothing_past_the_record_and_all_before_it(form: str) -> None:
    app, numbers, out = numbers_app("stop", partitions=2)

    def work(number: int) -> int:
        if number == 4:
            raise ValueError("four")
        return number

    declare_failing(app, form, numbers, out, sf.Stop(), work)
    test = TestApp(app)
    with pytest.raises(sf.ProcessingError, match=r"four.*numbers-0-4"):
        await send_to_both(test, numbers)
    done = await read_again(test, out)
    first, second = (sorted(number for number in done if number // 100 == part) for part in (0, 1))
    assert first == [0, 1, 2, 3]
    assert second == list(range(100, 100 + len(second)))


async def send_to_both(test: TestApp, numbers: "sf.Topic[str, int]") -> None:
    async with test:
        for number in range(8):
            for part in (0, 1):  # past the worker, which stops while they arrive
                value = (number + part * 100).to_bytes(8, "big")
                await test.send_bytes(numbers, value, key=b"k", partition=part)
        try:
            await test.settle()
        finally:
            seen[id(test)] = await look(test)


seen: dict[int, list[int]] = {}


async def look(test: TestApp) -> list[int]:
    """What is in `out` after the worker has ended."""
    await until(lambda: test.worker.state == "stopped")
    observer = test._observing()
    await observer.look()
    return [event.value for event in observer.records("out")]


async def read_again(test: TestApp, _: object) -> list[int]:
    return seen.pop(id(test))


async def test_stop_says_the_place_and_the_way_past(caplog: pytest.LogCaptureFixture) -> None:
    app, numbers, _ = numbers_app("says")

    @app.agent(numbers)
    def work(number: int) -> None:
        raise ValueError("no luck")

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(numbers, 1, key="k")
            await test.settle()

    with caplog.at_level(logging.ERROR), pytest.raises(sf.ProcessingError):
        await run()
    told = caplog.text
    for part in ("'work'", "numbers-0-0", "ValueError", "no luck", "on_error=sf.Skip()", "sf.DeadLetter(topic)"):
        assert part in told


async def test_retry_holds_only_its_partition() -> None:
    app, numbers, out = numbers_app("holds", partitions=2)

    @app.agent(numbers, sink=out, on_error=sf.Retry(3, backoff_s=10))
    async def work(number: int) -> int:
        if number == 1 and len(tries) < 2:
            tries.append(number)
            raise ValueError(number)
        return number

    tries: list[int] = []
    async with TestApp(app) as test:
        for number in range(4):
            await test.send(numbers, number, key="k", partition=0)
            await test.send(numbers, number + 100, key="k", partition=1)
        await test.settle()
        assert sorted(values(test, out)) == [0, 100, 101, 102, 103]
        assert committed(test) == {"numbers-0": 1, "numbers-1": 4}
        await test.advance(10)
        assert 1 not in values(test, out)
        await test.advance(20)
        assert [number for number in values(test, out) if number < 100] == [0, 1, 2, 3]


async def test_attempts_are_counted_per_record_and_told_to_the_sensors() -> None:
    app, numbers, out = numbers_app("attempts")
    dead = app.topic("dead", key_type=str)

    @app.agent(numbers, sink=out, on_error=sf.Retry(1, backoff_s=0, then=sf.DeadLetter(dead)))
    async def work(number: int) -> int:
        tries.append(number)
        if tries.count(number) == 1 or number == 2:
            raise ValueError(number)
        return number

    tries: list[int] = []
    counting = Counting()
    async with TestApp(app, sensors=counting) as test:
        for number in range(4):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert values(test, out) == [0, 1, 3]
    assert tries == [0, 0, 1, 1, 2, 2, 3, 3]
    assert counting.errors == [("work", "retry")] * 3 + [("work", "dead_letter")] + [("work", "retry")]


async def test_a_dead_letter_is_the_raw_record_with_its_cause() -> None:
    app, numbers, out = numbers_app("letters")
    dead = app.topic("dead")

    @app.agent(numbers, sink=out, on_error=sf.DeadLetter(dead))
    def work(number: int) -> int:
        raise KeyError("missing")

    async with TestApp(app) as test:
        await test.send(numbers, 3, key="k", timestamp_ms=9, headers=[("mine", b"m")])
        await test.settle()
        (letter,) = test.records(dead)
        assert (letter.key, letter.value, letter.timestamp_ms) == (b"k", (3).to_bytes(8, "big"), 9)
        headers = dict(letter.headers)
        assert headers["mine"] == b"m"
        assert b"KeyError: 'missing'" in (headers.pop("streamflow-dead-letter-traceback") or b"")
        assert b"missing" in (headers.pop("streamflow-dead-letter-cause") or b"")
        assert {name.removeprefix("streamflow-dead-letter-"): value for name, value in headers.items()} == {
            "mine": b"m",
            "error": b"KeyError",
            "topic": b"numbers",
            "partition": b"0",
            "offset": b"0",
            "timestamp-ms": b"9",
            "agent": b"work",
            "attempts": b"1",
        }
        assert committed(test) == {"numbers-0": 1}


async def test_a_dead_letter_that_is_too_large_stops_the_worker_and_says_so() -> None:
    app, numbers, out = numbers_app("too-large")
    dead = app.topic("dead", config={"max.message.bytes": 200})
    counting = Counting()

    @app.agent(numbers, sink=out, on_error=sf.DeadLetter(dead))
    def work(number: int) -> int:
        raise ValueError("original")

    async def run() -> None:
        async with TestApp(app, sensors=counting) as test:
            await test.send(numbers, 1, key="k")
            await test.settle()

    with pytest.raises(sf.ProductionError, match=r"too large for topic 'dead'.*numbers-0-0") as raised:
        await run()
    assert "original" in str(raised.value.__cause__)
    assert counting.errors == [("work", "dead_letter"), ("work", "stop")]


async def test_a_unit_is_retried_and_dead_lettered_whole() -> None:
    app, numbers, _ = numbers_app("units")
    sums = app.topic("sums", key_type=str, value_type=int, partitions=1)
    dead = app.topic("dead", key_type=str, value_type=int)
    units: list[list[int]] = []

    @app.agent(numbers, sink=sums, on_error=sf.Retry(1, backoff_s=1, then=sf.DeadLetter(dead)))
    async def work(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
        async for unit in stream.take(3):
            units.append(unit)
            yield sf.Out(sum(unit), key="sum")
            if 4 in unit:
                raise ValueError(unit)

    async with TestApp(app) as test:
        for number in range(9):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert values(test, sums) == [3]
        assert committed(test) == {"numbers-0": 3}
        await test.advance(1)
        assert values(test, sums) == [3, 21]
        assert values(test, dead) == [3, 4, 5]
    assert units == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6, 7, 8]]


async def test_a_unit_over_several_topics_is_retried_as_it_was() -> None:
    app = sf.App("mixed-units")
    a = app.topic("a", key_type=str, value_type=int, partitions=1)
    b = app.topic("b", key_type=str, value_type=str, partitions=1)
    seen: list[list[tuple[str, int, Any]]] = []

    @app.agent([a, b], on_error=sf.Retry(1, backoff_s=0))
    async def work(stream: sf.Stream[Any]) -> None:
        async for unit in stream.events().take(4):
            seen.append([(event.topic, event.offset, event.value) for event in unit])
            if len(seen) == 1:
                raise ValueError("once")

    async with TestApp(app, max_task_idle_ms=1000) as test:
        for number in range(4):
            await test.send(a, number, key="k", timestamp_ms=number * 2)
            await test.send(b, str(number), key="k", timestamp_ms=number * 2 + 1)
        await test.advance(2)
        assert committed(test) == {"a-0": 4, "b-0": 4}
    assert seen[0] == [("a", 0, 0), ("b", 0, "0"), ("a", 1, 1), ("b", 1, "1")]
    assert seen[1] == seen[0]
    assert len(seen) == 3


# --- records that do not decode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["values", "events", "items", "take", "lanes", "two agents"])
@pytest.mark.parametrize("part", ["key", "value"])
async def test_a_record_that_does_not_decode_never_reaches_the_agent(form: str, part: str) -> None:
    app = sf.App("undecodable")
    orders = app.topic("orders", key_type=int, value_type=Order, partitions=1)
    dead = app.topic("dead")
    reached: list[Any] = []
    caught: list[BaseException] = []

    async def work(stream: sf.Stream[Order, int]) -> None:
        try:
            if form == "take":
                async for unit in units(stream.items()):
                    reached.extend(order.amount for _, order in unit)
            elif form == "events":
                async for event in stream.events():
                    reached.append(event.value.amount)
            elif form == "values":
                async for order in stream:
                    reached.append(order.amount)
            else:
                async for _, order in stream.items():  # noqa: PERF102 - not a dict
                    reached.append(order.amount)
        except Exception as error:
            caught.append(error)
            raise

    def units(stream: sf.Stream[Any]) -> AsyncIterator[list[Any]]:
        return stream.take(2, within_s=1)

    app.agent(orders, on_error=sf.DeadLetter(dead), concurrency=3 if form == "lanes" else 1)(work)
    if form == "two agents":

        @app.agent(orders, on_error=sf.Skip())
        def other(order: Order) -> None:
            assert order.user == "u"

    good = msgspec.json.encode(Order("u", 1))
    key = (7).to_bytes(8, "big")
    bad = (b"short", good) if part == "key" else (key, b'{"user":"u","amount":"much"}')
    async with TestApp(app) as test:
        for number in range(5):
            await test.send(orders, Order("u", number), key=number, partition=0)
            await test.send_bytes(orders, bad[1], key=bad[0], partition=0)
        await test.send(orders, Order("u", 5), key=5, partition=0)
        await test.advance(1)
        assert caught == []
        reads_keys = form != "values" and not (form == "two agents" and part == "value")
        letters = test.records(dead)
        if part == "value" or reads_keys:
            assert sorted(reached) == [0, 1, 2, 3, 4, 5]
            assert [letter.value for letter in letters] == [bad[1]] * 5
            cause = dict(letters[0].headers)["streamflow-dead-letter-cause"] or b""
            expected = (b"key of topic 'orders'", b"8 bytes") if part == "key" else (b"expected `int`", b"`$.amount`")
            assert all(words in cause for words in expected)
        else:  # nobody looks at the keys
            assert letters == []
        assert committed(test) == {"orders-0": 11}


async def test_a_decode_error_that_stops_names_everything() -> None:
    app = sf.App("named")
    orders = app.topic("orders", key_type=str, value_type=Order, partitions=2)

    @app.agent(orders)
    async def work(stream: sf.Stream[Order]) -> None:
        async for _ in stream:
            pass

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(orders, Order("u", 1), key="k", partition=1)
            await test.send_bytes(orders, b'{"user":"u"}', key=b"k", partition=1)
            await test.settle()

    with pytest.raises(sf.DeserializationError) as raised:
        await run()
    error = raised.value
    assert (error.topic, error.partition, error.offset) == ("orders", 1, 1)
    assert "orders-1-1" in str(error)
    assert "missing required field `amount`" in str(error)


async def test_null_values_are_none_where_the_type_allows_it_else_decode_errors() -> None:
    app = sf.App("null-values")
    maybe = app.topic("maybe", key_type=str | None, value_type=int | None, partitions=1)
    never = app.topic("never", key_type=str, value_type=int, partitions=1)
    got: list[int | None] = []

    @app.agent(maybe)
    def take(number: int | None) -> None:
        got.append(number)

    @app.agent(never, on_error=sf.Skip())
    def refuse(number: int) -> None:
        got.append(number)

    async with TestApp(app) as test:
        await test.send(maybe, None, key="k")
        await test.send(maybe, 1, key=None)
        await test.send_bytes(never, None, key=b"k")
        await test.send(never, 2, key="k")
        await test.settle()
        assert sorted(got, key=str) == [1, 2, None]


class Registry:
    """A serializer whose schemas have to be loaded first."""

    def __init__(self, *, knows: bool = True) -> None:
        self.loaded: set[int] = set()
        self.knows = knows

    def bind(self, type: Any, *, topic: str, part: str) -> "Registry":
        return self

    def encode(self, value: str, headers: Any) -> bytes:
        return b"\x01" + value.encode()

    def decode(self, data: bytes, headers: Any) -> str:
        if data[0] not in self.loaded:
            raise NeedSchema(data[0])
        return data[1:].decode()

    async def load_schema(self, id: int) -> None:
        await asyncio.sleep(0)
        if not self.knows:
            raise LookupError(f"no schema {id}")
        self.loaded.add(id)


@pytest.mark.parametrize("thread", [False, True])
async def test_schemas_are_loaded_off_the_turn(thread: bool) -> None:
    app = sf.App("schemas")
    names = app.topic(
        "names", key_type=str, value_type=str, partitions=1, key_serializer=Registry(), value_serializer=Registry()
    )
    got: list[str] = []
    events: list[Any] = []

    if thread:

        @app.agent(names, thread=True)
        def work(name: str) -> None:
            got.append(name)
    else:

        @app.agent(names)
        async def look(stream: sf.Stream[str, str]) -> None:
            async for event in stream.events():
                events.append(event.key)
                got.append(event.value)

    async with TestApp(app) as test:
        for name in ("ann", "bob"):
            await test.send(names, name, key="k")
        await test.send_bytes(names, b"\x02cid", key=b"\x02k")
        await test.settle()
        assert got == ["ann", "bob", "cid"]
        assert thread or events == ["k", "k", "k"]


async def test_a_schema_that_cannot_be_loaded_is_an_error_of_its_record() -> None:
    app = sf.App("no-schema")
    names = app.topic("names", key_type=str, value_type=str, partitions=1, value_serializer=Registry(knows=False))

    @app.agent(names)
    async def work(name: str) -> None: ...

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(names, "ann", key="k")
            await test.settle()

    with pytest.raises(sf.DeserializationError, match=r"no schema 1.*names-0-0"):
        await run()


# --- stopping while something fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_stop_does_not_wait_for_a_back_off(concurrency: int) -> None:
    app, numbers, out = numbers_app("cut")

    @app.agent(numbers, sink=out, on_error=sf.Retry(9, backoff_s=3600, max_backoff_s=3600), concurrency=concurrency)
    async def work(number: int) -> int:
        if number == 1:
            raise ValueError(number)
        return number

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await test.settle()
        worker: Worker = test.worker
        worker.request_stop()
        await until(lambda: worker.state == "stopped", within_s=2)
        assert (await look(test)) == [0]
        assert test.clock.monotonic() == 0


async def test_a_record_in_hand_is_finished_at_a_stop_and_its_policy_still_holds() -> None:
    app, numbers, out = numbers_app("in-hand")
    dead = app.topic("dead", key_type=str, value_type=int)
    begun, go_on = asyncio.Event(), asyncio.Event()

    @app.agent(numbers, sink=out, on_error=sf.DeadLetter(dead))
    async def work(number: int) -> int:
        begun.set()
        await go_on.wait()
        raise ValueError(number)

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await begun.wait()
        test.worker.request_stop()
        await until(lambda: test.worker.state == "stopping")
        go_on.set()
        await until(lambda: test.worker.state == "stopped")
        await test.settle()
        assert values(test, dead) == [0]


async def test_an_agent_that_swallows_its_cancellation_does_not_fail_a_clean_stop() -> None:
    app, numbers, out = numbers_app("swallows")
    ended: list[str] = []

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        try:
            async for number in stream:
                yield number
        except asyncio.CancelledError:
            ended.append("swallowed")

    @app.agent(out)
    async def raises(stream: sf.Stream[int]) -> None:
        try:
            async for _ in stream:
                pass
        finally:
            ended.append("raised")
            raise RuntimeError("in a finally")

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        await test.settle()
    assert sorted(ended) == ["raised", "swallowed"]
