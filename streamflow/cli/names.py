"""Completion of names in the shell."""

from __future__ import annotations

import contextlib

import typer

from streamflow.cli.load import load


def topic_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the app's topics that begin so; nothing when the app cannot be loaded.

    Args:
        context: The command line so far.
        incomplete: The word under the cursor.
    """
    with contextlib.suppress(Exception):
        return [name for name in load(context.params["app"]).app.topics if name.startswith(incomplete)]
    return []


def table_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the app's tables that begin so; nothing when the app cannot be loaded.

    Args:
        context: The command line so far.
        incomplete: The word under the cursor.
    """
    with contextlib.suppress(Exception):
        return [name for name in load(context.params["app"]).app.tables if name.startswith(incomplete)]
    return []
