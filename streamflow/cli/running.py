"""One worker in this process: with its web server, its banner, its signals, and how a bounded run went."""

from __future__ import annotations

import contextlib
import gc
import socket
import time
from dataclasses import replace

from streamflow.cli.banner import announce
from streamflow.cli.child import Child
from streamflow.cli.conclusion import conclude
from streamflow.cli.options import Session
from streamflow.cli.output import run_async
from streamflow.cli.progress import Reporter, progress
from streamflow.cli.signals import stopping
from streamflow.error_groups import one_error
from streamflow.hosting import only_host, served
from streamflow.metrics import PrometheusSensors
from streamflow.runtime.status import Progress
from streamflow.runtime.worker import Worker
from streamflow.web.overview import overview_of
from streamflow.web.server import address_of, listen

_STOP_MARGIN_S = 2.0
"""A stop takes this much longer at most than it may: then something blocks the event loop."""


def run(session: Session, me: Child | None, *, until_end: bool, json: bool) -> int:
    """Run the session's app until it is told to stop, or is done.

    Args:
        session: The command's.
        me: Which of several worker processes this one is; None where it is the only one.
        until_end: Whether to stop at the ends found at the start.
        json: Whether to print how such a run went as one JSON object.

    Returns:
        The exit code.
    """
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

    async def until_told() -> None:
        with one_error():  # the web server's task group makes a group of it
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
            run_async(until_told)
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
