"""Knows when an agent's own code runs, and when it waits and other code of the event loop does.

Who touches a table has to stand in the turn of a record. To ask for that per access (which task is this?) costs as much
as the access; here it is known once per time that the agent is resumed, and nothing is asked while its own code runs.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any

from streamflow.runtime.turn import NO_STAGES, Turn


@coroutine
def while_it_runs(code: Coroutine[Any, Any, None], turn: Turn) -> Generator[Any, Any, None]:
    """Await an agent's code; its plain tables are at hand whenever it runs, and not while it waits.

    Args:
        code: The coroutine.
        turn: The agent's turns.
    """
    error: BaseException | None = None
    while True:
        turn.at_hand = turn.plain
        try:
            awaited = code.send(None) if error is None else code.throw(error)
        except StopIteration:
            return
        finally:
            turn.at_hand = NO_STAGES
        error = None
        try:
            yield awaited
        except BaseException as raised:  # a cancellation, which is the code's
            error = raised
