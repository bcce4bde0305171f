import asyncio
import contextlib
import logging
import signal

import anyio
import httpx
import pytest

import streamflow as sf
from streamflow.errors import ConfigurationError, ProductionError
from streamflow.testing import TestApp
from tests.ports import free_port


@pytest.fixture
def app(request, monkeypatch) -> sf.App:
    # A name of its own: memory:// lives as long as somebody has it open, and the name is the log.
    return sf.App("shop", broker=f"memory://{request.node.name}", commit_interval_ms=5)


def doubling(app: sf.App, *, fail: bool = False) -> asyncio.Queue[int]:
    numbers = app.topic("numbers", key_type=str, value_type=int)
    seen: asyncio.Queue[int] = asyncio.Queue()

    @app.agent(numbers)
    async def double(number: int) -> None:
        if fail:
            raise ValueError("it does not work")
        seen.put_nowait(number * 2)

    return seen


def test_an_app_is_only_a_description(app):
    assert repr(app) == "<app 'shop': 0 agents, 0 topics>"
    assert app.options == {"broker": app.options["broker"], "commit_interval_ms": 5}
    assert str(app.origin) == __file__


def test_a_subclass_is_where_it_is_made():
    class Mine(sf.App):
        def __init__(self) -> None:
            super().__init__("mine")

    assert str(Mine().origin) == __file__


def test_an_unknown_keyword_names_the_nearest():
    with pytest.raises(ConfigurationError, match="did you mean 'partitions'"):
        sf.App("shop", partitons=3)  # type: ignore[arg-type]


def test_settings(app, monkeypatch):
    monkeypatch.setenv("STREAMFLOW_PARTITIONS", "9")
    resolved = app.settings({"linger_ms": 0})
    assert (resolved.partitions, resolved.linger_ms, resolved.commit_interval_ms) == (9, 0, 5)


def test_kafka_options_from_the_environment(monkeypatch):
    monkeypatch.setenv("STREAMFLOW_KAFKA_CONNECT_TIMEOUT_MS", "123")
    broker = sf.App("shop", broker="kafka://a:1").settings().broker
    assert isinstance(broker, sf.Kafka)
    assert (broker.servers, broker.connect_timeout_ms) == ("a:1", 123)


def test_an_unknown_kafka_variable_is_a_warning(app, monkeypatch):
    monkeypatch.setenv("STREAMFLOW_KAFKA_SASL_PASWORD", "x")
    warnings: list[str] = []
    app.settings(warn=warnings.append)
    (warning,) = warnings
    assert "STREAMFLOW_KAFKA_SASL_PASWORD sets nothing; did you mean STREAMFLOW_KAFKA_SASL_PASSWORD?" in warning


async def test_hosting_a_worker(app):
    seen = doubling(app)
    handler = signal.getsignal(signal.SIGINT)
    handlers = logging.getLogger().handlers[:]
    async with app.running() as worker:
        assert worker.status().ready
        sent = await app.topics["numbers"].send(key="a", value=21)
        assert sent is not None
        assert sent.offset == 0
        assert await asyncio.wait_for(seen.get(), 5) == 42
        assert signal.getsignal(signal.SIGINT) is handler
        assert logging.getLogger().handlers == handlers
    assert worker.status().state == "stopped"


async def test_a_client_sends_to_a_worker(app):
    seen = doubling(app)
    async with app.running(), app.client() as client:
        sent = await client.send("numbers", key="a", value=4)
        assert sent.topic == "numbers"
        assert await asyncio.wait_for(seen.get(), 5) == 8
        with pytest.raises(ProductionError, match="takes int"):
            await client.send("numbers", key="a", value="x")


async def test_a_worker_that_fails_ends_the_block_with_its_error(app):
    doubling(app, fail=True)

    async def host() -> None:
        async with app.running():
            await app.topics["numbers"].send(key="a", value=1)
            await asyncio.sleep(30)

    with pytest.raises(sf.ProcessingError, match="it does not work"):
        await host()


async def test_a_worker_that_is_refused_never_enters_the_block(app):
    doubling(app)
    with pytest.raises(ConfigurationError, match="did you mean"):
        async with app.running(partitons=3):
            pytest.fail("entered")


async def test_a_worker_that_refuses_its_app_never_enters_the_block(app):
    app.topic("numbers", value_type=int).group_by(len, name="by-length", key_type=int)
    with pytest.raises(sf.TopologyError, match="by-length"):
        async with app.running():
            pytest.fail("entered")


async def test_an_app_is_run_once_at_a_time_in_a_process(app):
    doubling(app)
    async with app.running():
        with pytest.raises(
            sf.RefusedError, match=r"'\w+' runs in this process already, in app.running\(\), and is begun"
        ):
            async with app.running():
                pytest.fail("entered")
        with pytest.raises(sf.RefusedError, match="begun again in TestApp: use the one that runs"):
            async with TestApp(app):
                pytest.fail("entered")
        assert (await app.topics["numbers"].send(key="a", value=1)) is not None  # the first goes on
    async with TestApp(app) as test:
        with pytest.raises(sf.RefusedError, match="already, in TestApp"):
            async with TestApp(app):
                pytest.fail("entered")
        await test.send("numbers", 1, key="a")
        await test.settle()
    async with app.running():
        pass


async def test_an_error_in_the_block_comes_out_as_itself(app):
    doubling(app)
    with pytest.raises(KeyError, match="mine"):
        async with app.running() as worker:
            raise KeyError("mine")
    assert worker.status().state == "stopped"


async def test_of_two_errors_the_blocks_own_comes_out_and_the_other_is_its_note(app):
    doubling(app)

    @app.on_stop
    async def fail() -> None:
        raise sf.StreamFlowError("no clean end")

    async def host() -> None:
        async with app.running():
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        await host()
    assert [note for note in caught.value.__notes__ if "no clean end" in note]


async def test_an_agent_that_swallows_its_cancellation_does_not_hold_the_host(app):
    numbers = app.topic("numbers", value_type=int)
    hear = asyncio.Event()

    @app.agent(numbers)
    async def deaf(stream: sf.Stream[int]) -> None:
        while not hear.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                async for _ in stream:
                    pass

    with pytest.raises(sf.ClosedError, match="not agent 'deaf'"):
        async with app.running():
            pass
    hear.set()


@pytest.mark.parametrize("native", [True, False])
async def test_a_cancelled_block_still_commits(app, native):
    seen = doubling(app)
    working = asyncio.Event()

    async def host() -> None:
        async with app.running(commit_interval_ms=60_000):
            await app.topics["numbers"].send(key="a", value=1)
            assert await seen.get() == 2
            working.set()
            await asyncio.sleep(30)

    async with app.client():  # which keeps the memory log
        if native:
            task = asyncio.ensure_future(host())
            await working.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(host)
                await working.wait()
                tasks.cancel_scope.cancel()
        async with app.running():
            await app.topics["numbers"].send(key="a", value=2)
            assert await asyncio.wait_for(seen.get(), 5) == 4


async def test_the_web_server_runs_only_when_it_is_asked_for(app):
    doubling(app)
    async with app.running(web=True, web_port=0) as worker:
        assert worker.status().ready
    async with app.running(web=True, web_port=free_port()) as worker, httpx.AsyncClient() as client:
        port = worker.settings.web_port
        assert (await client.get(f"http://127.0.0.1:{port}/ready")).json() == {"ready": True}
    port = free_port()
    async with app.running(web_port=port), httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}/ready")


def test_no_main_while_a_command_imports_the_script(app, monkeypatch):
    from streamflow.cli import load

    monkeypatch.setattr(load, "loading", ["orders.py"])
    app.main()
