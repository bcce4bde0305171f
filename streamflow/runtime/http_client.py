"""HTTP GET between workers: h11 over anyio, with connections that are kept.

Cancelling a request, or its time-out, closes its connection and nothing else: a worker that is stopped in its tracks
holds up no thread.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias
from urllib.parse import urlsplit

import anyio
import h11
from anyio.abc import ByteStream

from streamflow.errors import RetriableError

_READ_BYTES = 64 * 1024
_MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_IDLE = 8
_IDLE_S = 30.0
_GONE = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, h11.RemoteProtocolError)


_Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host, port."""


class UnreachableError(RetriableError):
    """The other side does not answer, or not in HTTP."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer.

    Attributes:
        status: Its code.
        headers: By name in lower case.
        body: All of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class _Connection:
    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.used_s = 0.0
        self._state = h11.Connection(h11.CLIENT)

    async def exchange(self, target: str, headers: list[tuple[bytes, bytes]]) -> Response:
        request = h11.Request(method="GET", target=target, headers=headers)
        await self.stream.send(
            b"".join(filter(None, (self._state.send(request), self._state.send(h11.EndOfMessage()))))
        )
        head: h11.Response | None = None
        body = bytearray()
        while True:
            event = self._state.next_event()
            if event is h11.NEED_DATA:
                self._state.receive_data(await self._received())
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > _MAX_BODY_BYTES:
                    raise h11.RemoteProtocolError(f"it sends more than {_MAX_BODY_BYTES:,} bytes")
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                named = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
                return Response(head.status_code, named, bytes(body))
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise h11.RemoteProtocolError("it closed the connection before it had answered")

    async def _received(self) -> bytes:
        try:
            return await self.stream.receive(_READ_BYTES)
        except anyio.EndOfStream:
            return b""  # h11 says whether that is an end or an error

    def is_reusable(self) -> bool:
        """Make it ready for another request, where it can take one."""
        if self._state.our_state is h11.DONE and self._state.their_state is h11.DONE:
            self._state.start_next_cycle()
            return True
        return False


class HttpClient:
    """Asks other workers; use it as `async with`, which closes what it keeps."""

    def __init__(self) -> None:
        self._idle: dict[_Origin, list[_Connection]] = {}
        self._tls: ssl.SSLContext | None = None
        self._is_closed = False

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed = True
        await _close([each for kept in self._idle.values() for each in kept])
        self._idle.clear()

    async def get(self, url: str, headers: Mapping[str, str], *, timeout_s: float) -> Response:
        """Ask once; again where a connection that was kept turns out to be closed.

        Connections that were not used for 30 s are closed, and those to where nobody answers.

        Args:
            url: What to get, with its query.
            headers: Besides `host`.
            timeout_s: Seconds for all of it.

        Raises:
            UnreachableError: No answer; the message says why.

        Cancellation: gives up at once.
        """
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        origin = parts.scheme, parts.hostname or "", port
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # As they came in: a server, too, reads them as latin-1.
        sent = {"host": parts.netloc.rpartition("@")[2], **headers}
        named = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
        await self._close_old()
        try:
            with anyio.fail_after(timeout_s):
                return await self._ask(origin, target, named)
        except TimeoutError as exc:
            await _close(self._idle.pop(origin, []))
            raise UnreachableError(f"{parts.scheme}://{parts.netloc} does not answer") from exc
        except (*_GONE, h11.LocalProtocolError) as exc:
            await _close(self._idle.pop(origin, []))
            raise UnreachableError(f"{parts.scheme}://{parts.netloc} is not reached: {exc!r}") from exc

    async def _ask(self, origin: _Origin, target: str, headers: list[tuple[bytes, bytes]]) -> Response:
        while kept := self._idle.get(origin):
            try:
                return await self._exchange(kept.pop(), origin, target, headers)
            except _GONE:
                continue  # the other side has closed it meanwhile
        return await self._exchange(await self._connected(origin), origin, target, headers)

    async def _connected(self, origin: _Origin) -> _Connection:
        scheme, host, port = origin
        if scheme != "https":
            return _Connection(await anyio.connect_tcp(host, port))
        self._tls = self._tls or ssl.create_default_context()
        return _Connection(await anyio.connect_tcp(host, port, ssl_context=self._tls))

    async def _exchange(
        self, connection: _Connection, origin: _Origin, target: str, headers: list[tuple[bytes, bytes]]
    ) -> Response:
        is_kept = False
        try:
            response = await connection.exchange(target, headers)
            is_kept = connection.is_reusable() and not self._is_closed and len(self._idle.get(origin, ())) < _MAX_IDLE
            return response
        finally:
            if is_kept:
                connection.used_s = anyio.current_time()
                self._idle.setdefault(origin, []).append(connection)
            else:
                await anyio.aclose_forcefully(connection.stream)

    async def _close_old(self) -> None:
        """Workers come and go, with a port or an address of their own each time."""
        oldest_s = anyio.current_time() - _IDLE_S
        old = [each for kept in self._idle.values() for each in kept if each.used_s < oldest_s]
        if old:
            left = {origin: [each for each in kept if each not in old] for origin, kept in self._idle.items()}
            self._idle = {origin: kept for origin, kept in left.items() if kept}
            await _close(old)


async def _close(connections: Iterable[_Connection]) -> None:
    with anyio.CancelScope(shield=True):  # a cancelled wait for the first one would leave the others open
        for each in connections:
            await anyio.aclose_forcefully(each.stream)
