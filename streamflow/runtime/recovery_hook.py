"""`on_recover`: called for a partition that was restored, before its agents and its changes from outside begin."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial

from streamflow.errors import ClosedError, FatalError
from streamflow.processing.table import Table
from streamflow.runtime.cancellation import call_user


class _Call:
    """A call of a hook. What is born in it has it in its context, too, and may outlive it."""

    is_over = False


_call: ContextVar[_Call | None] = ContextVar("on_recover", default=None)


async def call_on_recover(table: Table[object, object], partition: int) -> None:
    """Call a table's hook, if it has one.

    Args:
        table: The table.
        partition: What was restored.

    Raises:
        FatalError: It raised.
    """
    if table.on_recover is None:
        return
    call = _Call()
    token = _call.set(call)
    try:
        await call_user(partial(table.on_recover, partition))
    except Exception as exc:
        raise FatalError(
            f"on_recover of table {table.name!r}, called for partition {partition}, raised {type(exc).__name__}: {exc}"
        ) from exc
    finally:
        call.is_over = True
        _call.reset(token)


def refuse_in_on_recover(table: str) -> None:
    """Refuse to change a table while a hook goes on in which the caller stands, or was born.

    The change waits for the hook. Whether the hook waits for a task of its own, as in `gather` and `wait_for`, nobody
    can tell; one that outlives the hook is free from then on.

    Args:
        table: The table's name.

    Raises:
        ClosedError: It does.
    """
    call = _call.get()
    if call is not None and not call.is_over:
        raise ClosedError(
            f"table {table!r}: changed in on_recover, or in a task that it has started and that did not wait for its "
            "end: this change would wait for on_recover, since agents and changes begin when it has returned. Do it in "
            "`@app.task`"
        )
