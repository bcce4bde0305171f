"""The command line: `streamflow COMMAND APP ...`, or `python orders.py COMMAND ...` by `app.main()`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from streamflow.cli import agents, reset, send, table, table_files, tables, tail, topics, topology, version, worker
from streamflow.cli.errors import open_missing_streams
from streamflow.cli.load import LoadedApp
from streamflow.cli.options import CONNECTION, as_command
from streamflow.config import TABLE
from streamflow.processing.declarations import Declarations

_COMMANDS = (
    ("worker", worker.worker, tuple(TABLE), None),
    ("send", send.send, CONNECTION, send.SendCommand),
    ("tail", tail.tail, CONNECTION, None),
    ("topics", topics.topics, CONNECTION, None),
    ("agents", agents.agents, CONNECTION, None),
    ("topology", topology.topology, CONNECTION, None),
    ("tables", tables.tables, CONNECTION, None),
    ("reset", reset.reset, CONNECTION, None),
)
_TABLE_COMMANDS: tuple[tuple[str, Callable[..., None], tuple[str, ...]], ...] = (
    ("get", table.get, CONNECTION),
    ("scan", table.scan, CONNECTION),
    ("export", table_files.export_file, CONNECTION),
    ("import", table_files.import_file, CONNECTION),
)


def build(script: LoadedApp | None = None) -> typer.Typer:
    """Make the command line.

    Args:
        script: The app whose script it is; its commands then take no APP.
    """
    line = typer.Typer(
        name="streamflow" if script is None else Path(sys.argv[0]).name,
        help="Async stream processing on Kafka or on one SQLite file."
        if script is None
        else f"The application {script.app.id!r}.",
        no_args_is_help=True,
        # Its tracebacks show local variables, and those may be secrets.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=script is None,
    )
    line.callback()(_before_commands)
    for name, function, names, kind in _COMMANDS:
        line.command(name, cls=kind)(as_command(function, names=names, environ=os.environ, script=script))
    of_table = typer.Typer(help="Read, export and import a table.", no_args_is_help=True)
    for table_command, of_name, settings in _TABLE_COMMANDS:
        of_table.command(table_command)(as_command(of_name, names=settings, environ=os.environ, script=script))
    line.add_typer(of_table, name="table")
    line.command("version")(version.version)
    return line


def _before_commands(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=version.print_version, is_eager=True, help="Print StreamFlow's version and exit."
        ),
    ] = False,
) -> None:
    """What stands before a command; an option of its own kind acts by its callback."""


def main() -> None:
    """Run the command line and exit with its code."""
    open_missing_streams()
    build()()


def main_of(app: Declarations, origin: Path) -> None:
    """Run the command line of one app's own script and exit with its code.

    Args:
        app: The app.
        origin: The file that made it; what counts is the script, where there is one.
    """
    open_missing_streams()
    script = getattr(sys.modules["__main__"], "__file__", None)
    build(LoadedApp(app, Path(script).resolve() if script else origin, app.id))()
