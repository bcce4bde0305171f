"""A change of a table that was asked for from outside of any record's turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from streamflow.errors import ClosedError
from streamflow.processing.context import Outgoing, current_turn
from streamflow.state.overlay import Overlay
from streamflow.state.stage import PlainStage, Stage


class ChangeTurn:
    """What the function of a change stands in: it may touch the table that it changes, and nothing else.

    Args:
        full_name: The table's.
        stage: The table.
        now_ms: The clock's time.
    """

    owner: asyncio.Task[Any] | None = None
    record = None
    loop: asyncio.AbstractEventLoop | None = None
    at_hand: Mapping[str, PlainStage] = {}

    def __init__(self, full_name: str, stage: Stage, now_ms: int) -> None:
        self.stages = {full_name: stage}
        self._now_ms = now_ms
        self._is_over = False

    def may_touch(self) -> bool:
        """Whether the function runs."""
        return not self._is_over

    def check_alive(self) -> None:
        """Nothing to check: see `may_touch`."""

    def timestamp_ms(self) -> int:
        """The task's stream time; the clock's where no record has set it."""
        (stage,) = self.stages.values()
        return self._now_ms if stage.overlay.stream_time_ms < 0 else stage.overlay.stream_time_ms

    def refuse_table(self, table: Any) -> None:
        """Say that this is not the table that is changed.

        Raises:
            ClosedError: Always.
        """
        (changed,) = (stage.overlay.name for stage in self.stages.values())
        raise ClosedError(f"table {table.name!r} is touched by a function that changes another one, {changed!r}")

    def send(self, outgoing: Outgoing) -> None:
        """Nothing is sent from here.

        Raises:
            ClosedError: Always.
        """
        raise ClosedError(
            f"a record for {outgoing[0].name!r} is sent by a function that changes a table; send after it"
        )

    def refuse_ask(self, agent: Any) -> None:
        """Nobody is asked from here.

        Raises:
            ClosedError: Always.
        """
        raise ClosedError(f"agent {agent.name!r} is asked by a function that changes a table; ask after it")

    def end(self) -> None:
        """The function is over."""
        self._is_over = True


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

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._done.done()

    async def result(self) -> Any:
        """What the function returned, once its writes are committed; raises what it raised."""
        return await self._done

    def make(self, full_name: str, overlay: Overlay, now_ms: int) -> bool:
        """Run the function.

        Args:
            full_name: The table's.
            overlay: The table in this task.
            now_ms: The clock's time.

        Returns:
            Whether it has written something, so that `committed` is owed.
        """
        if self.is_over:
            return False  # whoever asked was cancelled before it began
        stage = Stage(overlay, _nobody_looks)
        turn = ChangeTurn(full_name, stage, now_ms)
        if overlay.ttl_ms is not None:
            stage.advance(turn.timestamp_ms())
        token = current_turn.set(turn)
        try:
            self._value = self._work(stage)
            effects = stage.close()
        except Exception as exc:
            self.fail(exc)
            return False
        finally:
            current_turn.reset(token)
            turn.end()
        if effects is not None:
            effects.merge()
        if effects is None or not effects.writes:
            self.committed()
            return False
        return True

    def committed(self) -> None:
        """What it wrote is committed."""
        if not self._done.done():
            self._done.set_result(self._value)

    def fail(self, error: Exception) -> None:
        """It failed, or what it wrote is not committed."""
        if not self._done.done():
            self._done.set_exception(error)
            self._done.exception()  # looked at: a sweep waits for nobody's answer


def _nobody_looks(_: Stage) -> None:
    """The stage is closed by who made it."""
