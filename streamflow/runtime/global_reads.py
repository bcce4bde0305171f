"""Reads of global tables over HTTP: every worker has all of it, so they are answered where they arrive."""

from __future__ import annotations

from itertools import islice
from typing import Any

import anyio
import anyio.to_thread

from streamflow.errors import ConfigurationError, NotHeld
from streamflow.model.position import positions_of, text_of
from streamflow.model.record import TopicPartition
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.remote import ReadOptions
from streamflow.runtime.committed_reads import check_partition
from streamflow.runtime.table_reads import Found, Page
from streamflow.state.keys import ByteRange

_POLL_S = 0.01


async def get(table: GlobalTable[Any, Any], key: Any, options: ReadOptions) -> Found:
    """The value of a key; see `TableReads.get`."""
    position = await _reached(table, options)
    return Found(table.found(key), -1, position, None)


async def page(
    table: GlobalTable[Any, Any], span: ByteRange, after: bytes | None, limit: int, options: ReadOptions
) -> Page:
    """Rows of a range; see `TableReads.page`."""
    position = await _reached(table, options)
    low = span[0] if after is None else max(span[0], after + b"\0")

    def read() -> list[tuple[Any, Any]]:
        return list(islice(table.between(low, span[1], reverse=False), limit + 1))

    rows = await anyio.to_thread.run_sync(read)
    last = table.keys_in_order.encode(rows[limit - 1][0]) if len(rows) > limit else None
    return Page(rows[:limit], last, position, None)


async def _reached(table: GlobalTable[Any, Any], options: ReadOptions) -> str:
    """Wait until the table has come to what is asked for; what it has come to."""
    at = positions_of(options.at)
    if strangers := {tp.topic for tp in at} - {table.source.name}:
        raise ConfigurationError(
            f"a position of {', '.join(sorted(strangers))} says nothing of global table {table.name!r}, which is "
            f"filled from {table.source.name}"
        )
    count = len(table.positions)
    for tp in at if count else ():
        check_partition(tp, count)
    give_up_s = anyio.current_time() + options.timeout_s
    while (behind := _behind(table, at)) is not None:
        if anyio.current_time() >= give_up_s:
            raise NotHeld(f"global table {table.name!r} has not come to {behind} yet")
        await anyio.sleep(_POLL_S)
    return text_of(table.positions)


def _behind(table: GlobalTable[Any, Any], at: dict[TopicPartition, int]) -> str | None:
    positions = table.positions
    late = (tp for tp, offset in at.items() if positions.get(tp, offset) < offset)
    return next((text_of({tp: at[tp]}) for tp in late), None)
