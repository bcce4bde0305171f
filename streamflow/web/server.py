"""The web server beside the worker: uvicorn in the same loop, without its signal handlers and its logging."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from starlette.applications import Starlette

from streamflow.config import DEFAULT_WEB_PORT, Settings
from streamflow.errors import ConfigurationError

BACKLOG = 128


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


@asynccontextmanager
async def serving(site: Starlette, listener: socket.socket) -> AsyncGenerator[None]:
    """Serve a site while the block runs; the listener is closed at its end.

    Args:
        site: What to serve.
        listener: From `listen`.
    """
    config = uvicorn.Config(
        site,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener])
            try:
                yield
            finally:
                server.should_exit = True
    finally:
        listener.close()
