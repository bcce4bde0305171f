"""`streamflow version`."""

from __future__ import annotations

import platform
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from streamflow.cli.errors import run_reporting
from streamflow.cli.output import as_json, write
from streamflow.metrics import package_version


def version(
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the versions of StreamFlow, Python and what both stand on."""
    versions = {
        "streamflow": package_version(),
        "python": platform.python_version(),
        "aiokafka": version_of("aiokafka"),
        "msgspec": version_of("msgspec"),
        "platform": platform.platform(),
    }
    write([as_json(versions)] if json else [f"{name} {text}" for name, text in versions.items()])


def print_version(asked: bool) -> None:
    """Print StreamFlow's version, as `--version` does, and exit.

    Args:
        asked: Whether the flag was given.
    """
    if asked:
        raise typer.Exit(run_reporting(lambda: write([f"streamflow {package_version()}"])))
