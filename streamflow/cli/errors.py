"""What people see when something goes wrong, and the exit code that goes with it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator

import typer

from streamflow.errors import RefusedError, StreamFlowError
from streamflow.log_output import SecretFilter

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def run_reporting(command: Callable[[], object]) -> int:
    """Run a command line; errors become one message on standard error.

    Args:
        command: What to run; `SystemExit` and typer's `Exit` pass through.

    Returns:
        The exit code.
    """
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): no error, but Python's last flush must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except typer.Exit:
        raise
    except Exception as exc:
        return report(exc)
    return 0


def report(error: BaseException) -> int:
    """Print an error and tell its exit code.

    Args:
        error: One of StreamFlow's own is told by its message, anything else with its traceback.
    """
    leaves = list(_leaves(error))
    if all(isinstance(leaf, StreamFlowError) for leaf in leaves):
        text = "".join(f"error: {message}\n" for message in dict.fromkeys(str(leaf) for leaf in leaves))
    else:
        text = "".join(traceback.format_exception(error))
    sys.stderr.write(SecretFilter(os.environ)(text))
    sys.stderr.flush()
    return exit_code(error)


def exit_code(error: BaseException) -> int:
    """2 for what was refused before the start, else 1.

    Args:
        error: What ended the command.
    """
    return REFUSED if all(isinstance(leaf, RefusedError) for leaf in _leaves(error)) else FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """What really happened, inside the groups that task groups make of it."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
