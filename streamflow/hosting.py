"""A worker inside an event loop that is already there: what `app.running()` and the worker command share.

The runtime and the web server are imported when they are needed: an app is imported far more often than it is run.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import anyio

from streamflow.config import KAFKA_PREFIX, Settings, close_to, resolve_for
from streamflow.error_groups import main_error
from streamflow.errors import RefusedError
from streamflow.log.kafka.options import Kafka

logger = logging.getLogger("streamflow.web")

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

if TYPE_CHECKING:
    from streamflow.metrics import PrometheusSensors
    from streamflow.processing.declarations import Declarations
    from streamflow.runtime.worker import Worker
    from streamflow.web.site import ProcessView


def settings_of(
    options: Mapping[str, object],
    *,
    origin: Path,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    warn: Callable[[str], None],
) -> Settings:
    """Resolve an app's settings, the `STREAMFLOW_KAFKA_*` variables beside a `kafka://` address included.

    Args:
        options: What was given to `App(...)`.
        origin: The app's file.
        flags: What is stronger than all else.
        environ: The environment.
        warn: Told of unknown variables.

    Raises:
        ConfigurationError: A value does not fit; the message says where it was given.
    """
    settings = resolve_for(options, origin=origin, flags=flags, environ=environ, warn=warn)
    for message in _unknown_kafka_variables(environ):
        warn(message)
    if isinstance(settings.broker, str) and settings.broker.startswith("kafka://"):
        return replace(settings, broker=Kafka.from_environment(settings.broker, environ))
    return settings


def _unknown_kafka_variables(environ: Mapping[str, str]) -> Iterator[str]:
    known = {KAFKA_PREFIX + option.name.upper(): option for option in fields(Kafka)}
    for variable in sorted(environ):
        if variable.startswith(KAFKA_PREFIX) and variable not in known:
            yield f"the environment variable {variable} sets nothing{close_to(variable, known)}"


def secrets_of(settings: Settings) -> list[str]:
    """What must never be printed of an app's settings.

    Args:
        settings: Resolved.
    """
    broker = settings.broker
    return [text for text in (broker.sasl_password, broker.ssl_password) if text] if isinstance(broker, Kafka) else []


def address_of(settings: Settings) -> str:
    """The broker's absolute address, without secrets."""
    return settings.broker.address if isinstance(settings.broker, Kafka) else str(settings.broker)


class WorkerSource:
    """What the web server of one worker tells; a `web.site.Source`.

    Args:
        worker: The worker.
        sensors: Its counts.
        index: Its number among several processes; None for the only one.
    """

    def __init__(self, worker: Worker, sensors: PrometheusSensors, index: int | None = None) -> None:
        from streamflow.metrics import Exposition

        self._worker = worker
        self._index = index
        self._exposition = Exposition(sensors, worker.status)

    async def metrics(self) -> bytes:
        """Prometheus' text format."""
        return self._exposition.text()

    async def processes(self) -> Sequence[ProcessView]:
        """The worker's state."""
        from streamflow.web.site import ProcessView

        return [ProcessView(self._index, self._worker.status())]


@asynccontextmanager
async def served(
    worker: Worker,
    app: Declarations,
    settings: Settings,
    sensors: PrometheusSensors,
    listener: socket.socket,
    *,
    index: int | None = None,
) -> AsyncGenerator[None]:
    """Serve a worker's metrics, health and status page while the block runs.

    Args:
        worker: The worker, running or not.
        app: Its app.
        settings: Its settings.
        sensors: Its counts.
        listener: Where to; closed at the end.
        index: Its number among several processes.
    """
    from streamflow.web.overview import overview_of
    from streamflow.web.server import advertised_url, serving
    from streamflow.web.site import build_site
    from streamflow.web.tables import TableSite

    worker.url = advertised_url(settings, listener)
    tables = TableSite(app, lambda: worker.table_reads).routes() if settings.serve_tables else []
    if tables and index in {None, 0}:
        _warn_of_open_tables(app, settings)
    site = build_site(
        WorkerSource(worker, sensors, index),
        lambda: overview_of(app, settings, worker.address, worker.guarantee),
        tables,
    )
    async with serving(site, listener):
        yield


def _warn_of_open_tables(app: Declarations, settings: Settings) -> None:
    has_tables = bool(app.tables or app.global_tables)
    if has_tables and app.reads_guard is None and settings.web_host not in _LOOPBACK:
        logger.warning(
            "whoever reaches the web server (web_host=%s) can read the tables of app %s: say who may by "
            "`@app.authorize_reads`, or set serve_tables=False",
            settings.web_host,
            app.id,
        )


_hosts: WeakKeyDictionary[Declarations, str] = WeakKeyDictionary()


@contextlib.contextmanager
def only_host(app: Declarations, how: str) -> Generator[None]:
    """Be the one who runs an app in this process while the block runs.

    Two would share its tables, senders and partitions, and code outside of agents could not say which one it means.

    Args:
        app: The app.
        how: In what, for the error of whoever comes second.

    Raises:
        RefusedError: Somebody runs it already.
    """
    first = _hosts.get(app)
    if first is not None:
        raise RefusedError(
            f"app {app.id!r} runs in this process already, in {first}, and is begun again in {how}: use the one that "
            "runs, or leave its block first. Several workers of an app are several processes: "
            "`streamflow worker APP --processes N`"
        )
    _hosts[app] = how
    try:
        yield
    finally:
        del _hosts[app]


@asynccontextmanager
async def hosted(app: Declarations, settings: Settings, *, web: bool) -> AsyncGenerator[Worker]:
    """Run a worker while the block runs; see `App.running`.

    Args:
        app: What to run.
        settings: Resolved.
        web: Serve metrics and the status page, too.
    """
    from streamflow.metrics import PrometheusSensors
    from streamflow.runtime.worker import Worker

    sensors = PrometheusSensors()
    worker = Worker(app, settings, sensors=sensors)
    own: BaseException | None = None
    try:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(only_host(app, "app.running()"))
            if web:
                from streamflow.web.server import listen

                listener = listen(settings.web_host, settings.web_port)
                await stack.enter_async_context(served(worker, app, settings, sensors, listener))
            await stack.enter_async_context(_running(worker))
            try:
                yield worker
            except BaseException as error:
                own = error
                raise
    except BaseExceptionGroup as group:
        # The task groups are ours and not the caller's business; what the block raised is what its caller catches.
        if group is own:
            raise
        main = main_error(group, own)
        raise main from main.__cause__


@asynccontextmanager
async def _running(worker: Worker) -> AsyncGenerator[None]:
    finished = anyio.Event()
    failed = False

    async def run() -> None:
        nonlocal failed
        try:
            # Shielded: a cancelled block asks the worker to stop, so that it can still commit; it bounds that itself.
            with anyio.CancelScope(shield=True):
                await worker.run()
        except BaseException:
            failed = True
            raise
        finally:
            finished.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            await worker.wait_started()
            if worker.status().state == "stopped":
                await finished.wait()
                if failed:
                    await anyio.sleep_forever()  # until the group, which is about to, cancels us: no block to enter
            yield
        finally:
            worker.request_stop()
            with anyio.CancelScope(shield=True):
                await finished.wait()
