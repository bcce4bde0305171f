"""Everything that one partition holds, record by record, in constant memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

from streamflow.log.api import Log
from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition


async def records(log: Log, tp: TopicPartition, *, stop: int | None = None) -> AsyncIterator[LogRecord]:
    """What a read_committed reader sees of a partition, from its start to its end (or to an offset)."""
    starts, ends = await log.admin.start_offsets([tp]), await log.admin.end_offsets([tp])
    end = ends[tp] if stop is None else min(stop, ends[tp])
    if starts[tp] >= end:
        return
    async with log.reader(f"oracle {tp}") as reader:
        reader.add(tp, starts[tp])
        while True:
            reader.ask(tp)
            for fetched in await reader.receive():
                assert fetched.error is None, fetched.error
                for batch in fetched.batches:
                    for record in batch.open():
                        if record.offset >= end:
                            return
                        yield record
                if fetched.next_offset >= end:
                    return


def number_in(value: bytes | None) -> int:
    assert value is not None
    assert len(value) == 8
    return int.from_bytes(value, "big", signed=True)
