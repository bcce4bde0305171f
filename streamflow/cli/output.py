"""How commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import anyio
import msgspec

from streamflow.cli.errors import print_out, say
from streamflow.cli.options import Session
from streamflow.hosting import address_of

_encode_json = msgspec.json.Encoder(enc_hook=str).encode


def run_async(function: Callable[[], Awaitable[None]]) -> None:
    """Run a command's coroutine, on uvloop where it is installed.

    Args:
        function: An async function without arguments.
    """
    anyio.run(function, backend_options={"use_uvloop": find_spec("uvloop") is not None})


def note(text: str) -> None:
    """Say something to people.

    Args:
        text: One or more lines.
    """
    say(text + "\n")


def write(lines: Iterable[str]) -> None:
    """Print results.

    Args:
        lines: Without line ends.
    """
    text = "".join(line + "\n" for line in lines)
    if text:
        print_out(text)


def as_json(value: object) -> str:
    """One JSON object in one line.

    Args:
        value: What msgspec can write; anything else as its `str`.
    """
    return _encode_json(value).decode()


def introduce(session: Session) -> None:
    """Say which broker a command talks to, and what is odd about the environment.

    Args:
        session: The command's.
    """
    for warning in session.warnings:
        note(f"warning: {warning}")
    note(f"broker: {address_of(session.settings)}")
    if str(session.settings.broker).startswith("memory://"):
        note("warning: memory:// lives inside one process: no worker shares it with this command")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> list[str]:
    """Lay text out in columns.

    Args:
        head: Names of the columns.
        rows: Cells; None is shown as `-`.
        right: Columns that stand to the right.
    """
    cells = [[name.upper() for name in head], *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
