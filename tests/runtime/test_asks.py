"""`agent.ask`: answers, errors, time-outs, and who may ask whom."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

import streamflow as sf
from streamflow.testing import TestApp
from tests.runtime.waiting import until


async def asked(test: TestApp, question: Callable[[], Awaitable[Any]]) -> Any:
    """Ask from outside, and let the app answer."""
    asking = asyncio.ensure_future(question())
    while not asking.done():
        await test.settle()
        await asyncio.sleep(0)
    return await asking


async def test_values_none_and_errors_come_back() -> None:
    app = sf.App("answers")

    @app.agent
    async def half(stream: sf.Stream[int]) -> AsyncIterator[int | None]:
        async for number in stream:
            yield number // 2 if number % 2 == 0 else None
            yield -1  # only the first counts

    @app.agent(on_error=sf.Skip())
    def fail(number: int) -> int:
        raise ValueError("no such number")

    @app.agent
    def silent(number: int) -> None: ...

    async with TestApp(app) as test:
        assert await asked(test, lambda: half.ask(8)) == 4
        assert await asked(test, lambda: half.ask(7)) is None
        with pytest.raises(sf.AskError, match="agent 'fail' failed: ValueError: no such number"):
            await asked(test, lambda: fail.ask(1))
        assert await asked(test, lambda: silent.ask(1)) is None


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_an_agent_that_fails_after_its_answer_answers_its_error(concurrency: int) -> None:
    app = sf.App("after")
    basket = app.table("basket", key_type=str, value_type=list[str], default=list)

    @app.agent(
        app.topic("asked", key_type=str, value_type=int), on_error=sf.Skip(), concurrency=concurrency, tables=[basket]
    )
    async def work(stream: sf.Stream[int, str]) -> AsyncIterator[int]:
        async for key, number in stream.items():
            yield number
            if number == 1:
                raise ValueError("after the answer")
            if number == 2:
                basket[key].append(5)  # type: ignore[arg-type]

    async with TestApp(app) as test:
        with pytest.raises(sf.AskError, match="ValueError: after the answer"):
            await asked(test, lambda: work.ask(1, key="k"))
        with pytest.raises(sf.AskError, match="expected `str`, got `int` at"):
            await asked(test, lambda: work.ask(2, key="k"))
        assert await asked(test, lambda: work.ask(3, key="k")) == 3
        assert dict(basket) == {}


async def test_the_error_of_a_record_that_stops_the_worker_is_answered() -> None:
    app = sf.App("fatal")

    @app.agent
    def fail(number: int) -> int:
        raise ValueError("the end")

    answers: list[BaseException] = []

    async def run() -> None:
        async with TestApp(app) as test:
            asking = asyncio.ensure_future(fail.ask(1))
            try:
                while not asking.done():
                    await test.settle()
                    await asyncio.sleep(0)
            finally:
                answers.extend(await asyncio.gather(asking, return_exceptions=True))

    with pytest.raises(sf.ProcessingError, match="the end"):
        await run()
    assert isinstance(answers[0], sf.AskError | asyncio.CancelledError | sf.ClosedError)


async def test_nobody_answers_in_time() -> None:
    app = sf.App("late")
    begun, never = asyncio.Event(), asyncio.Event()

    @app.agent
    async def wait(number: int) -> None:
        begun.set()
        await never.wait()

    async with TestApp(app) as test:
        asking = asyncio.ensure_future(wait.ask(1, timeout_s=7))
        await until(lambda: test.clock.next_wake_s() == 7)
        await begun.wait()
        test.clock.advance(6.9)
        await asyncio.sleep(0.01)
        assert not asking.done()
        test.clock.advance(0.2)
        with pytest.raises(TimeoutError, match=r"'wait' did not answer within 7 s"):
            await asking
        never.set()
        await test.settle()


async def test_only_the_agent_that_was_asked_answers() -> None:
    app = sf.App("shared")
    numbers = app.topic("numbers", key_type=str, value_type=int)

    @app.agent(numbers)
    async def counts(number: int) -> None: ...

    @app.agent(numbers)
    async def squares(number: int) -> int:
        await asyncio.sleep(0)
        return number * number

    async with TestApp(app) as test:
        for number in range(5):
            assert await asked(test, lambda number=number: squares.ask(number, key="k")) == number * number


async def test_asking_with_take_concurrency_and_a_decode_error_in_the_unit() -> None:
    app = sf.App("units")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)

    @app.agent(numbers, on_error=sf.Skip())
    async def batch(stream: sf.Stream[int]) -> AsyncIterator[sf.Out[int]]:
        async for unit in stream.take(2):
            yield sf.Out(sum(unit), key="k")

    @app.agent(concurrency=3)
    async def lanes(number: int) -> int:
        await asyncio.sleep(0)
        return number + 1

    async with TestApp(app) as test:
        first = asyncio.ensure_future(batch.ask(1, key="a"))
        manager = test.worker.manager
        assert manager is not None
        await until(lambda: any(task.waits_for_time() for task in manager.running()))
        assert await asked(test, lambda: batch.ask(2, key="b")) == 3
        assert await asked(test, lambda: first) == 3
        both = asyncio.gather(*(lanes.ask(number) for number in range(10)))
        assert await asked(test, lambda: both) == list(range(1, 11))


async def test_a_timer_and_another_agent_may_ask_but_not_the_same_sub_topology() -> None:
    app = sf.App("who")
    numbers = app.topic("numbers", key_type=str, value_type=int, partitions=1)
    answers: list[Any] = []

    @app.agent
    def double(number: int) -> int:
        return number * 2

    @app.agent(numbers, on_error=sf.Skip())
    async def asks(number: int) -> None:
        answers.append(await (double if number else asks).ask(number))

    @app.timer(10)
    async def tick() -> None:
        answers.append(await double.ask(50))

    errors: list[tuple[str, str]] = []
    async with TestApp(app) as test:
        await test.send(numbers, 1, key="k")
        await test.send(numbers, 0, key="k")
        await test.settle()
        assert answers == [2]
        await test.advance(10)
        assert answers == [2, 100]
    assert errors == []


async def test_a_question_outside_a_running_app_is_refused() -> None:
    app = sf.App("closed")

    @app.agent
    def double(number: int) -> int:
        return number * 2

    with pytest.raises(sf.ClosedError, match="is not running in this process"):
        await double.ask(1)
    with pytest.raises(sf.ConfigurationError, match="above 0"):
        await double.ask(1, timeout_s=0)


async def test_a_question_that_the_log_does_not_take_times_out(tmp_path: Path) -> None:
    app = sf.App("locked", data_dir=tmp_path)

    @app.agent
    def same(number: int) -> int:
        return number

    async with app.running():
        assert await same.ask(3) == 3
        other = sqlite3.connect(tmp_path / "log.db", isolation_level=None, timeout=5)
        other.execute("BEGIN IMMEDIATE")
        try:
            with anyio.fail_after(10), pytest.raises(TimeoutError, match=r"did not take the question within 0\.2 s"):
                await same.ask(3, timeout_s=0.2)
        finally:
            other.execute("ROLLBACK")
            other.close()


class Visit(msgspec.Struct):
    user: str
    page: str


def grouping(steps: Callable[[sf.Topic[str, Visit]], Any]) -> tuple[sf.App, sf.Agent[str, Visit, int]]:
    app = sf.App("grouping")
    visits = app.topic("visits", key_type=str, value_type=Visit, partitions=4)
    counts = app.table("counts", key_type=str, value_type=int, default=int)

    @app.agent(steps(visits), tables=[counts])
    async def count(stream: sf.Stream[Visit]) -> AsyncIterator[int]:
        async for visit in stream:
            counts[visit.page] += 1
            yield counts[visit.page]

    return app, count


@pytest.mark.parametrize(
    "steps",
    [
        lambda visits: visits.group_by(Visit.page),
        lambda visits: visits.group_by(Visit.page).through(
            visits.app.topic("copies", key_type=str, value_type=Visit, partitions=4)
        ),
    ],
)
async def test_who_asks_a_grouping_agent_gives_no_key_or_the_one_it_groups_by(
    steps: Callable[[sf.Topic[str, Visit]], Any],
) -> None:
    app, count = grouping(steps)
    async with TestApp(app) as test:
        for number in range(1, 5):  # from users whose own keys lie in other partitions
            assert await asked(test, lambda n=number: count.ask(Visit(f"user {n}", "p1"))) == number
        assert await asked(test, lambda: count.ask(Visit("ann", "p1"), key="p1")) == 5
        await count.cast(Visit("bob", "p1"))
        await test.send(count, Visit("cid", "p1"))
        await test.settle()
        with pytest.raises(sf.ProductionError, match=r"agent 'count' reads .* the key 'p1', and key='ann' was given"):
            await count.ask(Visit("ann", "p1"), key="ann")
        with pytest.raises(sf.ProductionError, match="leave key= out"):
            count.send_nowait(key="ann", value=Visit("ann", "p1"))
        assert await asked(test, lambda: count.ask(Visit("dan", "p1"))) == 8


async def test_a_grouping_agent_is_no_sink() -> None:
    app, count = grouping(lambda visits: visits.group_by(Visit.page))
    with pytest.raises(sf.TopologyError, match=r"its sink 'count' reads .* topic before it, 'visits'"):

        @app.agent(app.topic("lines", key_type=str, value_type=str), sink=count)
        def parse(line: str) -> Visit:
            return Visit(line, line)
