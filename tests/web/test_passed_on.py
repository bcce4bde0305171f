"""Reads at the common port of several processes, of which some cannot answer."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette

from streamflow.runtime.http_client import HttpClient
from streamflow.web.passed_on import PassedOn

Answer = tuple[int, bytes] | None
"""Status and body; None for a process that is stopped in its tracks: its connections are taken, and that is all."""


@asynccontextmanager
async def passed_on(*processes: Answer) -> AsyncIterator[tuple[httpx.AsyncClient, list[int]]]:
    """The common port of these, and which of them were asked."""
    asked: list[int] = []
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(_process(number, each, asked)) for number, each in enumerate(processes)]
        client = await stack.enter_async_context(HttpClient())
        site = Starlette(routes=PassedOn(lambda: urls, client).routes())
        transport = httpx.ASGITransport(app=site)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://all")), asked


@asynccontextmanager
async def _process(number: int, answer: Answer, asked: list[int]) -> AsyncIterator[str]:
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            asked.append(number)
            if answer is None:
                await over.wait()
                return
            status, body = answer
            writer.write(
                b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body
            )
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        over.set()
        server.close()


@pytest.mark.parametrize(
    ("processes", "asked"),
    [
        ([None, (200, b"it")], [0, 1]),
        ([(503, b"starting"), (200, b"it")], [0, 1]),
        ([None, (503, b"starting"), (200, b"it")], [0, 1, 2]),
        ([(200, b"it"), None], [0]),
    ],
)
async def test_who_cannot_answer_holds_up_nobody(processes: Sequence[Answer], asked: list[int]) -> None:
    async with passed_on(*processes) as (http, were_asked):
        answer = await http.get("/tables/stock/tea?timeout_s=60")
        assert (answer.status_code, answer.text) == (200, "it")
        assert were_asked == asked


async def test_another_answer_than_unavailable_is_the_answer() -> None:
    async with passed_on((404, b"no"), (200, b"it")) as (http, asked):
        assert [(await http.get("/tables/stock/tea")).text for _ in range(4)] == ["no", "it", "no", "it"]
        assert asked == [0, 1, 0, 1]


async def test_where_nobody_can_the_last_one_says_why() -> None:
    async with passed_on((503, b"a"), (503, b"b")) as (http, asked):
        answer = await http.get("/tables/stock/tea")
        assert (answer.status_code, answer.text, asked) == (503, "b", [0, 1])
    async with passed_on() as (http, _):
        assert (await http.get("/tables/stock/tea")).json() == {"error": "no process runs at present"}


async def test_a_read_ends_when_its_time_is_over() -> None:
    async with passed_on(None, None) as (http, asked), asyncio.timeout(20):  # not the minute that a read may take
        answer = await http.get("/tables/stock/tea?timeout_s=0")
        assert answer.status_code == 503
        assert "answer" in answer.json()["error"]
        assert asked == [0, 1]
