"""What people see when something goes wrong, and the exit code that goes with it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

import typer

from streamflow.error_groups import leaves
from streamflow.errors import RefusedError, StreamFlowError
from streamflow.log_output import SecretFilter

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


class OutputClosedError(Exception):
    """Whoever read our standard output is gone (`| head`): a reason to stop, and no error."""


def say(text: str) -> None:
    """Write to standard error; without a reader nothing is said, and the run and its exit code are as they would be.

    Args:
        text: With line ends.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def print_out(text: str) -> None:
    """Write to standard output, at once.

    Args:
        text: With line ends.

    Raises:
        OutputClosedError: Nobody reads it any more.
        StreamFlowError: It cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as exc:
        _discard(sys.stdout)
        raise OutputClosedError from exc
    except OSError as exc:
        _discard(sys.stdout)
        raise StreamFlowError(f"standard output cannot be written: {exc}") from exc


def _discard(stream: TextIO) -> None:
    """What is left in it must not fail in Python's last flush either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_missing_streams() -> None:
    """Open the standard streams that whoever started us has closed: other files would take their numbers."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def run_reporting(command: Callable[[], object]) -> int:
    """Run a command line; errors become one message on standard error.

    Args:
        command: What to run; `SystemExit` and typer's `Exit` pass through.

    Returns:
        The exit code.
    """
    try:
        command()
        print_out("")
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Exit:
        raise
    except Exception as exc:
        return 0 if all(isinstance(leaf, OutputClosedError) for leaf in leaves(exc)) else report(exc)
    return 0


def report(error: BaseException) -> int:
    """Print an error and tell its exit code.

    Args:
        error: One of StreamFlow's own is told by its message, anything else with its traceback.
    """
    if all(isinstance(leaf, StreamFlowError) for leaf in leaves(error)):
        text = "".join(f"error: {message}\n" for message in messages_of(error))
    else:
        text = "".join(traceback.format_exception(error))
    say(SecretFilter(os.environ)(text))
    return exit_code(error)


def messages_of(error: BaseException) -> list[str]:
    """What an error and its notes say, each once.

    Args:
        error: One error, or a group.
    """
    said = (message for leaf in leaves(error) for message in (str(leaf), *getattr(leaf, "__notes__", ())))
    return list(dict.fromkeys(said))


def exit_code(error: BaseException) -> int:
    """2 for what was refused before the start, else 1.

    Args:
        error: What ended the command.
    """
    return REFUSED if all(isinstance(leaf, RefusedError) for leaf in leaves(error)) else FAILED
