"""A TCP proxy in front of a broker: cuts connections, swallows requests and answers, holds bytes back."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Literal, TypeAlias

_ARRIVE_S = 0.2

Verdict: TypeAlias = Literal["pass", "cut", "lose answer"] | asyncio.Event
"""About a request: pass it on; cut the connection instead; pass it on and cut the connection when its answer comes;
pass it on once the event is set."""


def api_key(request: bytes) -> int:
    """Which request a chunk begins with."""
    return int.from_bytes(request[4:6], "big")


class Proxy:
    """Forwards `port` to `target`.

    `on_answer(chunk)` decides about each chunk from the broker: True cuts the connection instead of handing the chunk
    on, so that the request was carried out and its answer is lost. `on_request(chunk)` decides about each chunk from
    the client, which as a rule is one request.
    """

    def __init__(
        self,
        port: int,
        target: int,
        on_answer: Callable[[bytes], bool] = lambda chunk: False,
        on_request: Callable[[bytes], Verdict] = lambda chunk: "pass",
    ) -> None:
        self.port = port
        self.on_answer = on_answer
        self.on_request = on_request
        self.cut_connections = 0
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0.05)

    def cut(self) -> None:
        """Close every connection now."""
        for writer in list(self._writers):
            writer.transport.abort()

    def hold(self) -> None:
        """Pass nothing on, until `release`: the connections stay open."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_broker}
        connection = _Connection()
        requests = asyncio.create_task(self._pump_requests(reader, to_broker, connection))
        answers = asyncio.create_task(self._pump_answers(from_broker, writer, connection))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([requests, answers], return_when=asyncio.FIRST_COMPLETED)
            if connection.is_holding:  # the client has gone; what it sent arrives all the same
                await asyncio.wait([requests])
        for pump in (requests, answers):
            pump.cancel()
        for end in (writer, to_broker):
            end.transport.abort()
            self._writers.discard(end)

    async def _pump_requests(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: "_Connection"
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(1 << 16):
                await self._open.wait()
                verdict = self.on_request(chunk)
                if verdict == "cut":
                    self.cut_connections += 1
                    return
                connection.loses_answer |= verdict == "lose answer"
                if isinstance(verdict, asyncio.Event):
                    connection.is_holding = True
                    await verdict.wait()
                sink.write(chunk)
                await sink.drain()
                if connection.is_holding:
                    await asyncio.sleep(_ARRIVE_S)  # the client may have gone: an abort would overtake the request
                connection.is_holding = False

    async def _pump_answers(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: "_Connection"
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(1 << 16):
                await self._open.wait()
                if connection.loses_answer or self.on_answer(chunk):
                    self.cut_connections += 1
                    return
                sink.write(chunk)
                await sink.drain()


class _Connection:
    """What was decided about one connection."""

    def __init__(self) -> None:
        self.loses_answer = False
        self.is_holding = False
