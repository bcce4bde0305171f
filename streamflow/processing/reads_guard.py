"""Asks an app's `@app.authorize_reads` function, and answers nothing where that one fails."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from time import monotonic

from streamflow.errors import ReadFailed
from streamflow.processing.remote import Authorize, TableRead

logger = logging.getLogger("streamflow.tables")

_TOLD_EVERY_S = 60.0


@dataclass(slots=True)
class _Told:
    """What has been logged of one kind of failure."""

    at_s: float
    since: int = 0


class ReadsGuard:
    """Decides who may read the tables of an app.

    Args:
        fn: The app's function.
    """

    def __init__(self, fn: Authorize) -> None:
        self._fn = fn
        # By the type and the line: both are the app's code, so these are few.
        self._told: dict[tuple[str, str, int], _Told] = {}

    async def check(self, read: TableRead) -> None:
        """Ask whether this may be read.

        Raises:
            PermissionError: It may not.
            ReadFailed: The function raised something else. It says the type only, as who reads is not to learn more;
                the log has the rest.
        """
        try:
            said = self._fn(read)
            allowed = await said if inspect.isawaitable(said) else said
        except PermissionError:
            raise
        except Exception as error:
            self._tell(read.table, error)
            raise ReadFailed(
                f"the app's @app.authorize_reads function raised {type(error).__name__}, so table {read.table!r} is "
                "not read; the log of the worker that called it says where"
            ) from error
        if allowed is not True:
            raise PermissionError("@app.authorize_reads does not allow this")

    def _tell(self, table: str, error: Exception) -> None:
        """Log a kind of failure with its traceback once a minute: whoever reaches the port may cause any number."""
        now_s = monotonic()
        kind = _kind(error)
        told = self._told.get(kind)
        if told is not None and now_s - told.at_s < _TOLD_EVERY_S:
            told.since += 1
            return
        self._told[kind] = _Told(now_s)
        before = f"; {told.since} more since it was told last" if told is not None and told.since else ""
        logger.error(
            "@app.authorize_reads raised %s: a read of table %r is refused with 500%s. To refuse a read, return False "
            "or raise PermissionError",
            type(error).__name__,
            table,
            before,
            exc_info=error,
        )


def _kind(error: Exception) -> tuple[str, str, int]:
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    if where is None:
        return type(error).__name__, "", 0
    return type(error).__name__, where.tb_frame.f_code.co_filename, where.tb_lineno
