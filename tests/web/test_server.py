import asyncio
import contextlib
import signal
import socket

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from streamflow import config
from streamflow.config import resolve
from streamflow.errors import ConfigurationError
from streamflow.web import server
from streamflow.web.server import address_of, advertised_url, listen, serving
from tests.ports import free_port


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_that_is_asked_for_and_taken_is_refused(taken):
    with pytest.raises(ConfigurationError, match=rf"port {taken} on 127.0.0.1 is taken: .*--no-web"):
        listen("127.0.0.1", taken)


def test_the_default_port_gives_way_to_a_free_one(taken, monkeypatch):
    monkeypatch.setattr(server, "DEFAULT_WEB_PORT", taken)
    with listen("127.0.0.1", None) as listener:
        assert listener.getsockname()[1] not in {taken, 0}


def test_the_default_port(monkeypatch):
    assert config.DEFAULT_WEB_PORT == 6066
    free = free_port()
    monkeypatch.setattr(server, "DEFAULT_WEB_PORT", free)
    with listen("127.0.0.1", None) as listener:
        assert address_of(listener) == f"http://127.0.0.1:{free}"


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host):
    with pytest.raises(ConfigurationError, match=f"cannot listen on {host}"):
        listen(host, 0)


async def test_it_serves_and_stops():
    async def hello(_):
        return PlainTextResponse("hello")

    before = signal.getsignal(signal.SIGINT)
    listener = listen("127.0.0.1", 0)
    url = address_of(listener)
    async with serving(Starlette(routes=[Route("/", hello)]), listener), httpx.AsyncClient() as client:
        answer = await client.get(url)
        assert answer.text == "hello"
        assert "server" not in answer.headers
        assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(OSError, match=r"(?i)connect"):
        await asyncio.open_connection(*url.removeprefix("http://").split(":"))


class Failed(Exception):
    """Of a worker."""


@pytest.mark.parametrize("how", ["end", "error", "cancelled"])
async def test_what_is_under_way_at_the_end_is_answered(how, caplog):
    arrived, over = asyncio.Semaphore(0), asyncio.Event()
    left = 2

    async def waits(_):
        arrived.release()
        try:
            await asyncio.Event().wait()
        finally:
            nonlocal left
            left -= 1

    async def nearly_done(_):
        arrived.release()
        await over.wait()
        return PlainTextResponse("done")

    listener = listen("127.0.0.1", 0)
    url = address_of(listener)
    site = Starlette(routes=[Route("/waits", waits), Route("/done", nearly_done)])
    async with httpx.AsyncClient(timeout=20) as client:
        with contextlib.suppress(BaseExceptionGroup), anyio.CancelScope() as scope:
            async with serving(site, listener):
                asked = [asyncio.create_task(client.get(url + path)) for path in ("/waits", "/done", "/waits")]
                for _ in asked:
                    await arrived.acquire()
                over.set()
                if how == "error":
                    raise Failed
                if how == "cancelled":
                    scope.cancel()
                    await asyncio.sleep(0)
        assert left == 0  # the process may be gone now
        ended, done, _ = [await each for each in asked]
    assert (ended.status_code, ended.headers["retry-after"]) == (503, "1")
    assert ended.json() == {"error": "this process is stopping"}
    assert (done.status_code, done.text) == (200, "done")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_an_error_in_the_block_comes_out():
    with pytest.raises(BaseExceptionGroup) as caught:
        async with serving(Starlette(), listen("127.0.0.1", 0)):
            raise ValueError("mine")
    assert caught.group_contains(ValueError, match="mine")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "http://127.0.0.1:{port}"),
        ({"advertised_url": "http://orders-0:80/x/"}, "http://orders-0:80/x"),
        ({"advertised_url": "http://orders-0:{port}"}, "http://orders-0:{port}"),
        ({"serve_tables": False, "advertised_url": "http://orders-0:80"}, ""),
    ],
)
def test_where_other_workers_reach_it(given, expected, tmp_path):
    settings = resolve(given, environ={}, pyproject_path=None, root=tmp_path)
    with listen("127.0.0.1", 0) as listener:
        assert advertised_url(settings, listener) == expected.replace("{port}", str(listener.getsockname()[1]))
