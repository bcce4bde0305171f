"""A TCP proxy in front of a broker: cuts connections, swallows requests and answers, holds bytes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Literal, TypeAlias

_ARRIVE_S = 0.2
_LENGTH = 4

Verdict: TypeAlias = Literal["pass", "cut", "lose answer", "fall silent"] | asyncio.Event
"""About a request: pass it on; cut the connection instead; pass it on and cut the connection when its answer comes;
pass it on and hand on nothing more that comes from the broker, the connection stays open; pass it on once the event is
set."""
Direction: TypeAlias = Literal["requests", "answers"]
BOTH: tuple[Direction, ...] = ("requests", "answers")


def api_key(request: bytes) -> int:
    """Which request it is."""
    return int.from_bytes(request[4:6], "big")


class Proxy:
    """Forwards `port` to `target`, frame by frame of Kafka's protocol (so: no TLS).

    `on_answer(frame)` decides about each answer from the broker: True cuts the connection instead of handing it on, so
    that the request was carried out and its answer is lost. `on_request(frame)` decides about each request of the
    client.
    """

    def __init__(
        self,
        port: int,
        target: int,
        on_answer: Callable[[bytes], bool] = lambda frame: False,
        on_request: Callable[[bytes], Verdict] = lambda frame: "pass",
    ) -> None:
        self.port = port
        self.on_answer = on_answer
        self.on_request = on_request
        self.cut_connections = 0
        self._target = target
        self._connections: set[_Connection] = set()
        self._open: dict[Direction, asyncio.Event] = {each: asyncio.Event() for each in BOTH}
        self.release()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0.05)

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._connections)

    def cut(self) -> None:
        """Close every connection now."""
        for connection in list(self._connections):
            connection.abort()
            self.cut_connections += 1

    def hold(self, *directions: Direction) -> None:
        """Pass nothing on in these directions (both by default), until `release`: the connections stay open."""
        for each in directions or BOTH:
            self._open[each].clear()

    def release(self) -> None:
        for event in self._open.values():
            event.set()

    def forget(self) -> None:
        """Pass nothing on any more on the connections there are; they stay open, and new ones work.

        What a firewall does that has lost its table, and so answers to nobody.
        """
        for connection in self._connections:
            connection.is_forgotten = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, to_broker)
        self._connections.add(connection)
        requests = asyncio.create_task(self._pump_requests(reader, to_broker, connection))
        answers = asyncio.create_task(self._pump_answers(from_broker, writer, connection))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([requests, answers], return_when=asyncio.FIRST_COMPLETED)
            if connection.is_holding:  # the client has gone; what it sent arrives all the same
                await asyncio.wait([requests])
        for pump in (requests, answers):
            pump.cancel()
        connection.abort()
        self._connections.discard(connection)

    async def _pump_requests(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(source)
                await self._open["requests"].wait()
                if connection.is_forgotten:
                    continue
                verdict = self.on_request(frame)
                if verdict == "cut":
                    self.cut_connections += 1
                    return
                if verdict == "lose answer":
                    connection.loses.add(frame[8:12])  # the correlation id
                connection.is_silent |= verdict == "fall silent"
                if isinstance(verdict, asyncio.Event):
                    connection.is_holding = True
                    await verdict.wait()
                sink.write(frame)
                await sink.drain()
                if connection.is_holding:
                    await asyncio.sleep(_ARRIVE_S)  # the client may have gone: an abort would overtake the request
                connection.is_holding = False

    async def _pump_answers(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(source)
                await self._open["answers"].wait()
                if connection.is_silent or connection.is_forgotten:
                    continue
                if frame[4:8] in connection.loses or self.on_answer(frame):
                    self.cut_connections += 1
                    return
                sink.write(frame)
                await sink.drain()


async def _frame(source: asyncio.StreamReader) -> bytes:
    """One request or answer, with its length in front."""
    head = await source.readexactly(_LENGTH)
    return head + await source.readexactly(int.from_bytes(head, "big"))


class _Connection:
    """One connection and what was decided about it."""

    def __init__(self, to_client: asyncio.StreamWriter, to_broker: asyncio.StreamWriter) -> None:
        self._ends = (to_client, to_broker)
        self.loses: set[bytes] = set()
        self.is_silent = False
        self.is_forgotten = False
        self.is_holding = False

    def abort(self) -> None:
        for end in self._ends:
            end.transport.abort()
