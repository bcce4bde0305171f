"""The web server beside the worker: uvicorn in the same loop, without its signal handlers and its logging."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamflow.config import DEFAULT_WEB_PORT, Settings
from streamflow.errors import ConfigurationError

BACKLOG = 128
_ENDING_S = 0.5
_CANCELLED_S = 2
"""When uvicorn would cancel what is still under way: those who ask would get 500, and the log a traceback of each."""


def listen(host: str, port: int | None) -> socket.socket:
    """Bind the web port.

    Args:
        host: Address or name to listen on.
        port: None for the default one, or any free one when that is taken.

    Returns:
        A listening socket; `address_of` says where.

    Raises:
        ConfigurationError: The port was asked for and is taken, or the address is not this machine's.
    """
    try:
        return _listen(host, DEFAULT_WEB_PORT if port is None else port)
    except OSError as exc:
        if port is None and exc.errno == errno.EADDRINUSE:
            return _listen(host, 0)
        if exc.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"port {port} on {host} is taken: give another --web-port (0 for any free one), or --no-web"
            ) from exc
        raise ConfigurationError(
            f"the web server cannot listen on {host}, port {DEFAULT_WEB_PORT if port is None else port}: "
            f"{exc.strerror or exc}; change --web-host or --web-port, or say --no-web"
        ) from exc


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL under which a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    if host in {"0.0.0.0", "::"}:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def advertised_url(settings: Settings, listener: socket.socket) -> str:
    """Where other workers reach a web server; empty where it answers no reads of tables.

    Args:
        settings: The worker's.
        listener: What it listens on.
    """
    if not settings.serve_tables:
        return ""
    port = listener.getsockname()[1]
    return (settings.advertised_url or address_of(listener)).replace("{port}", str(port))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone: they belong to the command, or to the program that hosts the worker."""
        yield


class _Ended:
    """Requests that end with 503 some time after the server was told to stop, if they are not answered by then.

    Args:
        site: Answers them.
    """

    def __init__(self, site: ASGIApp) -> None:
        self._site = site
        self._under_way: set[anyio.CancelScope] = set()
        self._end_s = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def sent(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        with anyio.CancelScope(deadline=self._end_s) as limit:
            self._under_way.add(limit)
            try:
                await self._site(scope, receive, sent)
            finally:
                self._under_way.discard(limit)
        if limit.cancelled_caught and not has_begun:
            told = Response(b'{"error":"this process is stopping"}', 503, {"retry-after": "1"}, "application/json")
            await told(scope, receive, send)

    def end(self) -> None:
        """Give them a moment, and end them."""
        self._end_s = anyio.current_time() + _ENDING_S
        for limit in self._under_way:
            limit.deadline = self._end_s


@asynccontextmanager
async def serving(site: Starlette, listener: socket.socket) -> AsyncGenerator[None]:
    """Serve a site while the block runs; the listener is closed at its end.

    Requests that are under way then have half a second, and get 503 with `Retry-After` after that.

    Args:
        site: What to serve.
        listener: From `listen`.
    """
    requests = _Ended(site)
    config = uvicorn.Config(
        requests,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CANCELLED_S,
    )
    server = _Server(config)

    async def serve() -> None:
        # It ends by itself, once it is told to: cancelled, by an error in the block, it would give those who ask 500.
        with anyio.CancelScope(shield=True):
            await server.serve([listener])

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            try:
                yield
            finally:
                server.should_exit = True
                requests.end()
    finally:
        listener.close()
