"""A change of a table that was asked for from outside of any record's turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from streamflow.state.overlay import Overlay
from streamflow.state.stage import Stage


class TableChange:
    """One function over a table's stage, run between two records of the task; its writes commit like a record's.

    Args:
        table: The table.
        work: The function.
    """

    def __init__(self, table: str, work: Callable[[Stage], Any]) -> None:
        self.table = table
        self._work = work
        self._value: Any = None
        self._done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def result(self) -> Any:
        """What the function returned, once its writes are committed; raises what it raised."""
        return await self._done

    def make(self, overlay: Overlay) -> bool:
        """Run the function.

        Returns:
            Whether it has written something, so that `committed` is owed.
        """
        stage = Stage(overlay, _nobody_looks)
        try:
            self._value = self._work(stage)
            effects = stage.close()
        except Exception as exc:
            self.fail(exc)
            return False
        if effects is None:
            self.committed()
            return False
        effects.merge()
        return True

    def committed(self) -> None:
        """What it wrote is committed."""
        if not self._done.done():
            self._done.set_result(self._value)

    def fail(self, error: Exception) -> None:
        """It failed, or what it wrote is not committed."""
        if not self._done.done():
            self._done.set_exception(error)


def _nobody_looks(_: Stage) -> None:
    """The stage is closed by who made it."""
