"""`streamflow worker APP`: run the agents until they are told to stop."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from streamflow.cli import child
from streamflow.cli.errors import exit_code, messages_of, report
from streamflow.cli.options import Session
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.hosting import secrets_of
from streamflow.log_output import configure

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
        # Imported where they are needed: the other commands start in two thirds of the time without them.
        if me is None and processes is not None:
            _check_processes(session, processes)
            from streamflow.cli.supervisor import supervise

            code = supervise(session, processes, until_end=until_end, json=json)
        else:
            from streamflow.cli.running import run

            code = run(session, me, until_end=until_end, json=json)
    except Exception as exc:
        # Into the structured log, or with the process's index; a lone worker on a terminal tells people instead.
        if me is None and settings.log_format == "console":
            code = report(exc)
        else:
            told = "; ".join(messages_of(exc))
            logger.critical("%s", told, exc_info=None if isinstance(exc, StreamFlowError) else exc)
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
