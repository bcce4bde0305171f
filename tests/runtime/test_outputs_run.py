"""What agents send: sinks, `sf.Out`, keys, partitions, times, headers, sizes, and sends that come too late."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

import streamflow as sf
from streamflow.errors import RecordError
from streamflow.testing import TestApp
from tests.runtime.machine import Machine


def numbers_app(name: str, **out: Any) -> tuple[sf.App, "sf.Topic[str, int]", "sf.Topic[str, int]"]:
    app = sf.App(name)
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    return app, numbers, app.topic("out", **{"key_type": str, "value_type": int, "partitions": 3, **out})


async def test_out_sets_every_field() -> None:
    app, numbers, out = numbers_app("outs", key_type=str | None, value_type=int | None)

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int | None]]:
        async for number in stream:
            yield sf.Out(number)
            yield sf.Out(number, key="other", timestamp_ms=5, headers=[("h", b"x")], partition=2)
            yield sf.Out(None, partition=1)
            yield sf.Out(number, key=None, partition=0)

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="a", timestamp_ms=77, headers=[("secret", b"s")])
        await test.settle()
        by_kind = {(event.key, event.value): event for event in test.records(out)}
        assert len(by_kind) == 4
        assert by_kind["a", 1].timestamp_ms == 77
        assert by_kind["a", 1].headers == []
        told = by_kind["other", 1]
        assert (told.timestamp_ms, told.partition, told.headers) == (5, 2, [("h", b"x")])
        assert by_kind["a", None].partition == 1
        assert by_kind[None, 1].partition == 0


async def test_only_trace_headers_propagate_and_only_to_their_record() -> None:
    app, numbers, out = numbers_app("traces")
    side = app.topic("side", key_type=str, value_type=int)
    trace = [("traceparent", b"00-1"), ("tracestate", b"t"), ("baggage", b"b")]

    @app.agent(numbers, sink=out, on_error=sf.Skip())
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int | sf.Out[int]]:
        async for number in stream:
            if number == 1:
                raise ValueError(number)
            await side.send(key="s", value=number, headers=[("own", b"1")])
            yield number
            yield sf.Out(number + 100)

    async with TestApp(app) as test:
        await test.send(numbers, 0, key="a", headers=[*trace, ("other", b"o")])
        await test.send(numbers, 1, key="a", headers=trace)
        await test.send(numbers, 2, key="a")
        await test.send_bytes(numbers, b"?", key=b"a", headers=trace, partition=0)
        await test.send(numbers, 3, key="a")
        await test.settle()
        headers = {event.value: event.headers for event in test.records(out)}
        assert headers == {0: trace, 100: trace, 2: [], 102: [], 3: [], 103: []}
        assert {event.value: event.headers for event in test.records(side)} == {
            0: [*trace, ("own", b"1")],
            2: [("own", b"1")],
            3: [("own", b"1")],
        }


async def test_null_keys_go_to_one_partition_per_batch() -> None:
    app, numbers, out = numbers_app("nulls", key_type=str | None, partitions=16)

    @app.agent(numbers, sink=out)
    def work(number: int) -> sf.Out[int]:
        return sf.Out(number, key=None)

    async with TestApp(app) as test:
        for number in range(20):
            await test.send(numbers, number, key="k")
        await test.settle()
        partitions = [event.partition for event in test.records(out)]
        assert len(partitions) == 20
        assert len(set(partitions)) < 10  # a batch is what was read at once


async def test_a_custom_partitioner_decides() -> None:
    def last(key: bytes, partitions: int) -> int:
        return partitions - 1

    app, numbers, out = numbers_app("partitioner", partitioner=last)

    @app.agent(numbers, sink=out)
    def work(number: int) -> int:
        return number

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        await test.settle()
        assert [event.partition for event in test.records(out)] == [2]


async def test_a_partitioner_that_errs_is_an_error_of_the_record() -> None:
    app, numbers, out = numbers_app("bad-partitioner", partitioner=lambda key, partitions: partitions)

    @app.agent(numbers, sink=out, on_error=sf.Skip())
    def work(number: int) -> int | None:
        return number or None

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        await test.settle()
        assert test.records(out) == []
        assert test.worker.status().tasks[0].partitions[0].position == 1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (sf.Out(1, key=5), "the key of topic 'out' takes str, not int 5"),
        (sf.Out(1, partition=3), r"partitions 0\.\.2, not 3"),
        ("text", "the value of topic 'out' takes int, not str 'text'"),
        (sf.Out(1, headers=[("h", b"x" * 2_000_000)]), "too large"),
        (sf.Out(1, headers=cast(Any, [("h", "text")])), r"\('h', 'text'\).* is no header"),
        (sf.Out(1, headers=cast(Any, {"h": b"x"})), "'h' is no header"),
        (sf.Out(1, headers=[("\ud800", b"x")]), "is no header"),
        (sf.Out(1, timestamp_ms=2**70), "milliseconds since the epoch, not 1180591620717411303424"),
        (sf.Out(1, timestamp_ms=cast(Any, "now")), "milliseconds since the epoch, not now"),
    ],
)
async def test_an_output_that_cannot_be_written_is_an_error_of_its_record(returned: Any, message: str) -> None:
    app, numbers, out = numbers_app("unwritable")
    side = app.topic("side", key_type=str, value_type=int)

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[Any]:
        async for number in stream:
            await side.send(key="s", value=number)
            yield returned if number == 1 else number

    async def run() -> None:
        async with TestApp(app) as test:
            tests.append(test)
            for number in range(3):
                await test.send(numbers, number, key="k")
            await test.settle()

    tests: list[TestApp] = []
    with pytest.raises(sf.ProductionError, match=message) as raised:
        await run()
    assert raised.value.position == "numbers-0-1"


async def test_an_output_that_cannot_be_written_leaves_nothing_of_its_record_whatever_was_made_before_it() -> None:
    app, numbers, out = numbers_app("traceless")
    counted = app.table("counted", key_type=str, value_type=int, default=int)

    @app.agent(numbers, sink=out, on_error=sf.Retry(2, backoff_s=0, then=sf.Skip()))
    async def work(stream: sf.Stream[int, str]) -> AsyncIterator[Any]:
        async for key, number in stream.items():
            counted[key] += 1
            yield counted[key]
            if number == 1:
                yield sf.Out(number, headers=cast(Any, [("trace", "text")]))

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert counted["k"] == 2
        assert [event.value for event in test.records(out)] == [1, 2]


async def test_a_dead_letter_of_an_error_that_is_no_text() -> None:
    app, numbers, out = numbers_app("surrogates")

    @app.agent(numbers, on_error=sf.DeadLetter(out))
    async def work(number: int) -> None:
        raise ValueError("no \ud800 text")

    async with TestApp(app) as test:
        await test.send(numbers, 7, key="k")
        await test.settle()
        (letter,) = test.records(out)
        assert b"no \\ud800 text" in dict(letter.headers)["streamflow-dead-letter-cause"]


def line_of(text: str) -> str:
    """`file:line` of the only line of this file that ends so."""
    (number,) = [n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith(text)]
    return f"{__file__}:{number}"


def unwritable_agents(case: str) -> sf.App:
    app = sf.App("placed")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    if case == "generator":

        @app.agent(numbers, sink=out)
        async def spoil(stream: sf.Stream[int]) -> AsyncIterator[Any]:
            async for _ in stream:
                yield sf.Out(1, partition=3)  # here it is yielded

    elif case == "record":

        @app.agent(numbers, sink=out, name="spoil")  # here it is declared
        def by_record(_: int) -> Any:
            return "text"

    elif case == "thread":

        @app.agent(numbers, sink=out, name="spoil", thread=True)  # here it runs in a thread
        def in_thread(_: int) -> Any:
            return "text"

    elif case == "send":

        @app.agent(numbers, name="spoil")
        async def sending(stream: sf.Stream[int]) -> None:
            async for _ in stream:
                await send_large(out)

    elif case == "undeclared":

        @app.agent(numbers, name="spoil")
        async def late(_: int) -> None:
            other = app.topic("too-late", value_type=int)
            await other.send(value=1)  # here to an undeclared topic

    return app


async def send_large(out: "sf.Topic[str, int]") -> None:
    await out.send(key="k", value=1, headers=[("h", b"x" * 2_000_000)])  # here it is sent


@pytest.mark.parametrize(
    ("case", "place", "message"),
    [
        ("generator", "# here it is yielded", r"topic 'out' has partitions 0\.\.0, not 3"),
        ("record", "# here it is declared", "the value of topic 'out' takes int, not str 'text'"),
        ("thread", "# here it runs in a thread", "the value of topic 'out' takes int, not str 'text'"),
        ("send", "# here it is sent", "too large for topic 'out'"),
        ("undeclared", "# here to an undeclared topic", "topic 'too-late' was not known when the worker started"),
    ],
)
async def test_an_output_that_cannot_be_written_names_agent_line_and_record(
    case: str, place: str, message: str
) -> None:
    app = unwritable_agents(case)

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send("numbers", 7, key="k")
            await test.settle()

    with pytest.raises(RecordError, match=message) as raised:
        await run()
    assert f"agent 'spoil' ({line_of(place)})" in str(raised.value)
    assert str(raised.value).count("agent 'spoil'") == 1
    assert raised.value.position == "numbers-0-0"


async def test_too_large_an_output_is_an_error_of_its_record() -> None:
    app = sf.App("large")
    sizes = app.topic("sizes", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=bytes, partitions=1, config={"max.message.bytes": 2000})

    @app.agent(sizes, sink=out, on_error=sf.Skip())
    def work(size: int) -> bytes:
        return b"x" * size

    async with TestApp(app) as test:
        for size in (10, 5000, 2000, 1999, 1800, 500):
            await test.send(sizes, size, key="k")
        await test.send(sizes, 100, key="k" * 1990)
        await test.settle()
        assert [len(event.value) for event in test.records(out)] == [10, 1800, 500]


async def test_keys_of_another_type_are_not_inherited() -> None:
    app = sf.App("keys")
    by_name = app.topic("by-name", key_type=str, value_type=int, partitions=1)
    by_number = app.topic("by-number", key_type=int, value_type=int, partitions=1)
    out = app.topic("out", key_type=int, value_type=int, partitions=1)

    @app.agent([by_number, by_name], sink=out, on_error=sf.Skip())
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for number in stream:
            yield number

    async with TestApp(app) as test:
        await test.send(by_number, 1, key=11)
        await test.send(by_name, 2, key="twelve")
        await test.send(by_number, 3, key=13)
        await test.settle()
        assert sorted((event.key, event.value) for event in test.records(out)) == [(11, 1), (13, 3)]


async def test_a_timestamp_out_of_the_value_is_the_time_of_events_and_outputs() -> None:
    class Reading(msgspec.Struct):
        at: int | None

    app = sf.App("times")
    readings = app.topic("readings", key_type=str, value_type=Reading, partitions=1, timestamp=Reading.at)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(readings, sink=out, on_error=sf.Skip())
    async def work(stream: sf.Stream[Reading]) -> AsyncIterator[int]:
        async for event in stream.events():
            yield event.timestamp_ms

    async with TestApp(app) as test:
        for at in (50, None, 60):  # None: the extractor fails, and the policy decides
            await test.send(readings, Reading(at), key="k", timestamp_ms=1)
        await test.settle()
        assert [(event.value, event.timestamp_ms) for event in test.records(out)] == [(50, 50), (60, 60)]


async def test_a_timestamp_out_of_the_value_is_read_once_per_record() -> None:
    read: list[int] = []

    def at(value: int) -> int:
        read.append(value)
        return value * 1000

    app = sf.App("times-once")
    readings = app.topic("readings", key_type=str, value_type=int, partitions=1, timestamp=at)
    out = app.topic("out", key_type=str, value_type=int, partitions=1)

    @app.agent(readings, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        async for event in stream.events():
            await out.send(key="k", value=-event.value)
            for number in range(3):
                yield event.value * 10 + number

    async with TestApp(app) as test:
        for number in (1, 2):
            await test.send(readings, number, key="k")
        await test.settle()
        assert read == [1, 2]
        outputs = [(event.value, event.timestamp_ms) for event in test.records(out)]
        assert outputs == [
            (value, ms) for n, ms in ((1, 1000), (2, 2000)) for value in (-n, *range(n * 10, n * 10 + 3))
        ]


async def test_a_head_that_waits_for_other_topics_has_its_timestamp_read_once_to_merge_them() -> None:
    read: list[int] = []

    def at(value: int) -> int:
        read.append(value)
        return value

    app = sf.App("times-merged")
    late = app.topic("late", key_type=str, value_type=int, partitions=1, timestamp=at)
    early = app.topic("early", key_type=str, value_type=int, partitions=1)
    seen: list[int] = []

    @app.agent([late, early])
    def work(value: int) -> None:
        seen.append(value)

    async with Machine(app) as machine:
        for number in (1000, 1001):
            await machine.send(late, number, key="k")
        for number in range(50):
            await machine.send(early, number, key="k", timestamp_ms=number)
        await machine.start()
        await machine.settle()
        assert seen == [*range(50), 1000, 1001]
        assert read == [1000, 1001]


async def test_sends_in_a_gather_inside_the_turn_join_it() -> None:
    app, numbers, out = numbers_app("gather")

    @app.agent(numbers)
    async def work(stream: sf.Stream[int]) -> None:
        async for number in stream:

            async def send(part: int, number: int = number) -> None:
                await asyncio.sleep(0)
                assert await out.send(key=str(part), value=number * 10 + part) is None

            await asyncio.gather(*(send(part) for part in range(3)))

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert sorted(event.value for event in test.records(out)) == [0, 1, 2, 10, 11, 12, 20, 21, 22]


async def test_a_task_that_outlived_its_turn_cannot_send() -> None:
    app, numbers, out = numbers_app("outlived")
    late: list[asyncio.Task[None]] = []
    gate = asyncio.Event()

    async def send_late(number: int) -> None:
        await gate.wait()
        out.send_nowait(key="k", value=number)

    @app.agent(numbers)
    async def work(stream: sf.Stream[int]) -> None:
        async for number in stream:
            late.append(asyncio.create_task(send_late(number)))
            if number == 2:
                gate.set()
                await late[2]

    async with TestApp(app) as test:
        for number in range(3):
            await test.send(numbers, number, key="k")
        await test.settle()
        for task in late[:2]:
            with pytest.raises(sf.ClosedError, match="after that record was done"):
                await task
        assert [event.value for event in test.records(out)] == [2]


async def test_a_task_of_a_failed_attempt_cannot_send_into_the_next() -> None:
    app, numbers, out = numbers_app("attempts")
    late: list[asyncio.Task[None]] = []
    gate = asyncio.Event()

    async def send_late() -> None:
        await gate.wait()
        out.send_nowait(key="k", value=-1)

    @app.agent(numbers, on_error=sf.Retry(1, backoff_s=0))
    async def work(number: int) -> None:
        if not late:
            late.append(asyncio.create_task(send_late()))
            raise ValueError(number)
        gate.set()
        with pytest.raises(sf.ClosedError):
            await late[0]

    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        await test.settle()
        assert late[0].done()
        assert test.records(out) == []


async def test_a_wrapper_that_reads_ahead_is_refused() -> None:
    app, numbers, out = numbers_app("ahead")

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[int]:
        queue: asyncio.Queue[int | Exception] = asyncio.Queue()

        async def read_ahead() -> None:
            try:
                async for number in stream:
                    queue.put_nowait(number)
            except sf.ClosedError as error:
                queue.put_nowait(error)

        reading = asyncio.create_task(read_ahead())
        while True:
            item = await queue.get()
            if isinstance(item, Exception):
                await reading
                raise item
            yield item

    async def run() -> None:
        async with TestApp(app) as test:
            await test.send(numbers, 1, key="k")
            await test.settle()

    with pytest.raises(sf.StreamFlowError, match="must not read ahead"):
        await run()


async def test_agents_can_be_sent_to() -> None:
    app, numbers, _ = numbers_app("to-agents")
    heard: list[int] = []

    @app.agent
    def listen(number: int) -> None:
        heard.append(number)

    @app.agent(numbers)
    async def work(number: int) -> None:
        assert await listen.cast(number) is None
        assert await listen.send(value=number + 10) is None
        listen.send_nowait(value=number + 20)
        if number == 1:
            raise ValueError("and none of it happened")

    work.on_error = sf.Skip()
    async with TestApp(app) as test:
        for number in (0, 1):
            await test.send(numbers, number, key="k")
        metadata = await listen.cast(99)
        assert metadata is not None
        assert metadata.topic == "to-agents-listen"
        await test.settle()
        assert sorted(heard) == [0, 10, 20, 99]


async def test_a_tiny_memory_budget_holds_the_agent_and_loses_nothing() -> None:
    app = sf.App("tiny")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    out = app.topic("out", key_type=str, value_type=bytes, partitions=1)

    @app.agent(numbers, sink=out)
    async def work(stream: sf.Stream[int]) -> AsyncIterator[bytes]:
        async for number in stream:
            yield number.to_bytes(4, "big") * 50_000

    async with TestApp(app, memory_budget_bytes=1 << 20, compression="none") as test:
        for number in range(30):
            await test.send(numbers, number, key="k")
        await test.settle()
        assert [event.value[:4] for event in test.records(out)] == [number.to_bytes(4, "big") for number in range(30)]
