"""Calls the app's hooks: `on_start`, `on_stop`, `on_assigned`, `on_revoked`, sync or async, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from streamflow.errors import FatalError, StreamFlowError
from streamflow.runtime.cancellation import call_user

logger = logging.getLogger("streamflow.hooks")


async def call_start_hooks(functions: Iterable[Callable[[], Any]]) -> None:
    """Call them in order.

    Raises:
        FatalError: One of them raised, which is logged with its traceback; those after it are not called.
    """
    for function in functions:
        try:
            await call_user(function)
        except StreamFlowError:
            raise
        except Exception as exc:
            error = FatalError(f"{_described('on_start', function, exc)}, so the worker does not start")
            logger.exception("%s", error)
            raise error from exc


async def call_hooks(kind: str, functions: Iterable[Callable[..., Any]], *arguments: Any) -> FatalError | None:
    """Call all of them, also when one raises: each may have something of its own to release.

    Args:
        kind: `on_stop`, `on_assigned` or `on_revoked`.
        functions: The hooks.
        arguments: What they are called with.

    Returns:
        What is to stop the worker: the first error; all of them are logged.
    """
    first: FatalError | None = None
    for function in functions:
        try:
            await call_user(function, *arguments)
        except Exception as exc:
            error = FatalError(_described(kind, function, exc))
            error.__cause__ = exc
            logger.exception("%s", error)
            first = first or error
    return first


def _described(kind: str, function: Callable[..., Any], exc: Exception) -> str:
    return f"@app.{kind} hook {getattr(function, '__name__', function)!r} raised {type(exc).__name__}: {exc}"
