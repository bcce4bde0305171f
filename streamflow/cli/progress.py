"""Progress of a bounded run: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from streamflow.cli.output import note

_LINE_EVERY_S = 5.0


class Reporter(Protocol):
    """Takes progress; cheap enough to be told of every batch."""

    def __call__(self, done: int, total: int | None) -> None:
        """Tell how far it is.

        Args:
            done: Records done.
            total: Records to do; None while that is not known.
        """


@contextmanager
def progress(what: str, *, quiet: bool = False) -> Generator[Reporter]:
    """Show progress while the block runs.

    Args:
        what: What is being done, as in "processing".
        quiet: Show nothing.
    """
    if quiet:
        yield _nothing
    elif sys.stderr.isatty():
        with _bar(what) as reporter:
            yield reporter
    else:
        yield _Lines(what)


def _nothing(done: int, total: int | None) -> None:
    """Show nothing."""


@contextmanager
def _bar(what: str) -> Generator[Reporter]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records"),
        TimeElapsedColumn(),
    )
    # While it is drawn, rich stands in for standard error, so that log lines pass above the bar.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=8) as shown:
        task = shown.add_task(what, total=None)

        def report(done: int, total: int | None) -> None:
            shown.update(task, completed=done, total=total)

        yield report


class _Lines:
    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + _LINE_EVERY_S

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LINE_EVERY_S
            note(f"{self._what}: {done:,}{'' if total is None else f' of {total:,}'} records")
