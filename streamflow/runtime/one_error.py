"""Raises the one error of an exception group itself: what went wrong, not the shape of the task groups around it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def one_error() -> Generator[None]:
    """Replace an exception group by its first plain exception, whose traceback stays whole."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__
