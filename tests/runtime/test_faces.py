"""What newcomers met: errors come out as they are, an ask in a test answers by itself, misuse is refused at once."""

import asyncio
import uuid

import pytest

import streamflow as sf
from streamflow.testing import TestApp


def doubling() -> tuple[sf.App, sf.Agent[object, int, int]]:
    app = sf.App("faces", broker=f"memory://{uuid.uuid4().hex}")

    @app.agent
    def double(number: int) -> int:
        return number * 2

    return app, double


async def test_a_client_lets_errors_of_its_block_through_as_they_are() -> None:
    app, double = doubling()
    with pytest.raises(KeyError, match="mine"):
        async with app.client():
            raise KeyError("mine")
    with pytest.raises(TimeoutError, match="did not answer"):
        async with app.client() as client:
            await client.ask(double, 1, timeout_s=0.05)


async def test_a_client_sends_to_an_agent_by_its_topic() -> None:
    app, double = doubling()
    async with app.client() as client:
        assert (await client.send(double, value=2)).topic == "faces-double"


async def test_an_ask_in_a_test_needs_no_settling() -> None:
    app, double = doubling()
    async with TestApp(app):
        assert await asyncio.wait_for(double.ask(21), 5) == 42


async def test_a_mistyped_topic_has_no_records_to_be_mistaken_for_none() -> None:
    app, _ = doubling()
    async with TestApp(app) as test:
        with pytest.raises(sf.ConfigurationError, match="did you mean 'faces-double'"):
            test.records("faces-doubel")


def test_dead_letters_do_not_go_where_they_come_from() -> None:
    app = sf.App("loop")
    source = app.topic("source", value_type=int)
    with pytest.raises(sf.TopologyError, match="a topic of their own"):

        @app.agent(source, on_error=sf.Retry(1, then=sf.DeadLetter(source)))
        def work(number: int) -> None:
            """Does nothing."""


async def test_an_app_may_run_on_two_loops_of_a_process() -> None:
    app, double = doubling()

    async def ask() -> int:
        async with app.running(web=False):
            return await double.ask(4, timeout_s=10)

    answers = await asyncio.gather(asyncio.to_thread(lambda: asyncio.run(ask())))
    assert answers == [8]
    async with TestApp(app):
        assert await double.ask(5) == 10
