"""The client between workers, against servers that misbehave."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from streamflow.runtime import http_client
from streamflow.runtime.http_client import HttpClient, UnreachableError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Some: thing\r\n\r\nhi"


@asynccontextmanager
async def serving(answer: Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], object]) -> AsyncIterator[str]:
    """A server whose `answer` is called with the number of each connection, after its request's head was read."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        number = connections
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                if answer(number, reader, writer) is False:
                    return
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_a_connection_is_used_again() -> None:
    seen: list[int] = []

    def answer(number: int, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(number)
        writer.write(OK)

    async with serving(answer) as url, HttpClient() as client:
        for _ in range(3):
            response = await client.get(url + "/x?y=1", {"a": "b"}, timeout_s=5)
            assert (response.status, response.body, response.headers["x-some"]) == (200, b"hi", "thing")
    assert seen == [1, 1, 1]


async def test_one_that_was_closed_meanwhile_is_no_error() -> None:
    def answer(number: int, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        return number > 1  # the first is closed without a word

    async with serving(answer) as url, HttpClient() as client:
        for _ in range(3):
            assert (await client.get(url, {}, timeout_s=5)).status == 200


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that keeps connections open, and whether its client has closed one."""
    closed = asyncio.Event()

    def answer(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        feed_eof = reader.feed_eof

        def fed() -> None:
            closed.set()
            feed_eof()

        reader.feed_eof = fed  # type: ignore[method-assign]

    async with serving(answer) as url:
        yield url, closed


async def test_what_was_not_used_for_long_is_closed_by_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = serving(lambda _, __, writer: writer.write(OK))
    async with watched() as (url, closed), plain as other, HttpClient() as client:
        await client.get(url, {}, timeout_s=5)
        await client.get(other, {}, timeout_s=5)
        await asyncio.sleep(0.05)
        assert not closed.is_set()
        monkeypatch.setattr(http_client, "_IDLE_S", 0.0)
        await client.get(other, {}, timeout_s=5)
        await asyncio.wait_for(closed.wait(), 5)
        assert len(client._idle) == 1


async def test_connections_to_where_nobody_answers_are_closed() -> None:
    async with watched() as (url, closed), HttpClient() as client:
        gets = [client.get(url, {}, timeout_s=5) for _ in range(2)]
        await asyncio.gather(*gets)
        assert len(client._idle) == 1
        with pytest.raises(UnreachableError):
            await client.get(url, {}, timeout_s=0)
        await asyncio.wait_for(closed.wait(), 5)
        assert not client._idle


@pytest.mark.parametrize("nonsense", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", b"SSH-2.0-server\r\n"])
async def test_what_is_no_answer_is_unreachable(nonsense: bytes) -> None:
    def answer(_: int, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(nonsense)
        return False

    async with serving(answer) as url, HttpClient() as client:
        with pytest.raises(UnreachableError, match="is not reached"):
            await client.get(url, {}, timeout_s=5)


async def test_silence_is_unreachable_after_its_time() -> None:
    async with serving(lambda *_: None) as url, HttpClient() as client:
        with pytest.raises(UnreachableError, match="does not answer"):
            await client.get(url, {}, timeout_s=0.05)


async def test_nobody_there_is_unreachable() -> None:
    async with HttpClient() as client:
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9"):
            await client.get("http://127.0.0.1:9/x", {}, timeout_s=5)
