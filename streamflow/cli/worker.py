"""`streamflow worker APP`: run the agents until they are told to stop."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import time
from dataclasses import replace
from typing import Annotated

import typer

from streamflow.cli import child
from streamflow.cli.banner import announce
from streamflow.cli.child import Child
from streamflow.cli.conclusion import conclude
from streamflow.cli.errors import exit_code, report
from streamflow.cli.options import Session
from streamflow.cli.output import run_async
from streamflow.cli.progress import Reporter, progress
from streamflow.cli.signals import stopping
from streamflow.cli.supervisor import supervise
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.hosting import only_host, secrets_of, served
from streamflow.log_output import configure
from streamflow.metrics import PrometheusSensors
from streamflow.runtime.status import Progress
from streamflow.runtime.worker import Worker
from streamflow.web.overview import overview_of
from streamflow.web.server import address_of, listen

_STOP_MARGIN_S = 2.0
"""A stop takes this much longer at most than it may: then something blocks the event loop."""

logger = logging.getLogger("streamflow.worker")


def worker(
    session: Session,
    until_end: Annotated[
        bool,
        typer.Option("--until-end", help="Process up to the ends found at the start, with all that follows, and stop."),
    ] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Run so many worker processes and watch over them.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="With --until-end: print how it went, as one JSON object.")
    ] = False,
) -> None:
    """Run the app's agents until SIGTERM or Ctrl-C (a second one stops at once)."""
    settings = session.settings
    me = child.from_environment()
    configure(
        settings.log_level,
        settings.log_format,
        app=session.app.id,
        origin=session.origin,
        process_index=None if me is None else me.index,
        secrets=secrets_of(settings),
    )
    if me is None:
        for warning in session.warnings:
            logger.warning("%s", warning)
    try:
        if json and not until_end:
            raise ConfigurationError("--json says how a bounded run went: it goes with --until-end")
        if me is None and processes is not None:
            _check_processes(session, processes)
            code = supervise(session, processes, until_end=until_end, json=json)
        else:
            code = _run(session, me, until_end=until_end, json=json)
    except Exception as exc:
        # Into the structured log, or with the process's index; a lone worker on a terminal tells people instead.
        if me is None and settings.log_format == "console":
            code = report(exc)
        else:
            logger.critical("%s", exc, exc_info=None if isinstance(exc, StreamFlowError) else exc)
            code = exit_code(exc)
    raise typer.Exit(code)


def _check_processes(session: Session, processes: int) -> None:
    url = session.settings.advertised_url
    if processes > 1 and url is not None and "{port}" not in url:
        raise ConfigurationError(
            f"advertised_url={url!r}: each of {processes} processes has a port of its own: write {{port}} in it"
        )
    if str(session.settings.broker).startswith("memory://"):
        raise ConfigurationError("--processes: memory:// lives inside one process; use sqlite:///PATH or kafka://")


def _run(session: Session, me: Child | None, *, until_end: bool, json: bool) -> int:
    settings = session.settings
    if me is not None and settings.instance_id is not None:
        settings = replace(settings, instance_id=f"{settings.instance_id}-{me.index}")
    listener = _listener(session, me)
    web = "off" if listener is None else address_of(listener)
    sensors = PrometheusSensors()
    index = None if me is None else me.index
    reporters: list[Reporter] = []

    def on_progress(now: Progress) -> None:
        for reporter in reporters:
            reporter(now.done, now.total)

    running = Worker(session.app, settings, sensors=sensors, until_end=until_end, on_progress=on_progress)

    async def run() -> None:
        async with contextlib.AsyncExitStack() as around:
            if listener is not None:
                site = served(running, session.app, settings, sensors, listener, index=index)
                await around.enter_async_context(site)
            with only_host(session.app, "streamflow worker"):
                await running.run()

    _collect_garbage_less_often()
    quiet = not until_end or me is not None or settings.log_format == "json"
    within_s = settings.shutdown_timeout_s + _STOP_MARGIN_S
    with stopping(running.request_stop, within_s=within_s):
        if me is None:
            overview = overview_of(session.app, settings, running.address, running.guarantee)
            announce(overview, web, None, settings.log_format)
        else:
            me.watch_parent(running.request_stop, settings.shutdown_timeout_s)
        with progress("processing", quiet=quiet) as reporter:
            reporters.append(reporter)
            started_s = time.monotonic()
            run_async(run)
    # The supervisor of several processes speaks for all.
    if (outcome := running.outcome()) is not None and me is None:
        as_log = settings.log_format == "json"
        conclude(outcome, time.monotonic() - started_s, as_json_line=json, as_log=as_log)
    return 0


def _collect_garbage_less_often() -> None:
    """Spare the collector the modules, and most of the young records: a fifth of the CPU per record on the hot path.

    Records live for microseconds and form no cycles, yet each run of some hundred of them sets off a collection at
    CPython's default of 700 net allocations.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)


def _listener(session: Session, me: Child | None) -> socket.socket | None:
    if me is not None:
        return me.listener
    settings = session.settings
    return listen(settings.web_host, settings.web_port) if settings.web else None
