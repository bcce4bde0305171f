"""Reading: one fetch lane, which looks for the partitions that were asked for and waits until there is something."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass

from streamflow.errors import (
    FatalError,
    InternalError,
    LogCorruptedError,
    OffsetOutOfRangeError,
    RetriableError,
    StreamFlowError,
)
from streamflow.log import codec
from streamflow.log.api import Fetched, Reader
from streamflow.log.batch import RecordBatch
from streamflow.log.sqlite import tables
from streamflow.log.sqlite.database import Database
from streamflow.log.sqlite.execution import Runner
from streamflow.model.record import TopicPartition

FETCH_BYTES = 1024 * 1024
_LENGTH_AT = 12
"""A batch's length field counts the bytes after these."""
_RETRY_S = 0.1


@dataclass(slots=True, eq=False)
class _Position:
    offset: int
    end_offset: int | None = None
    asked: bool = False


class SqliteReader(Reader):
    """One fetch lane: nothing runs in the background, `receive` does the work.

    Args:
        database: The open database.
        runner: The lane's own connection.
    """

    def __init__(self, database: Database, runner: Runner) -> None:
        self._database = database
        self._runner = runner
        self._positions: dict[TopicPartition, _Position] = {}
        self._asked_anew = False
        self._waiter: asyncio.Future[None] | None = None

    def add(self, tp: TopicPartition, offset: int) -> None:
        self._positions[tp] = _Position(offset)

    def remove(self, tp: TopicPartition) -> None:
        self._positions.pop(tp, None)

    def ask(self, tp: TopicPartition) -> None:
        position = self._positions.get(tp)
        if position is None:
            raise InternalError(f"{tp} was not added to this reader, or was removed from it")
        position.asked = True
        self._asked_anew = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> list[Fetched]:
        while True:
            seen = self._database.changes.count
            self._asked_anew = False
            asked = {tp: position for tp, position in self._positions.items() if position.asked}
            if asked and (answers := self._take_over(asked, await self._fetch(asked))):
                self._database.changes.active()
                return answers
            await self._wait(seen)

    def end_offset(self, tp: TopicPartition) -> int | None:
        position = self._positions.get(tp)
        return None if position is None else position.end_offset

    async def _fetch(self, asked: dict[TopicPartition, _Position]) -> list[Fetched]:
        wanted = [(tp, position.offset) for tp, position in asked.items()]

        def work(sql: sqlite3.Connection) -> list[Fetched]:
            return [self._fetch_one(sql, tp, offset) for tp, offset in wanted]

        while True:
            try:
                return await self._runner.read(work)
            except RetriableError:
                await self._database.waits.sleep(_RETRY_S)

    def _take_over(self, asked: dict[TopicPartition, _Position], found: list[Fetched]) -> list[Fetched]:
        """Moves positions; what was removed (or added anew) while the fetch ran is dropped."""
        answers: list[Fetched] = []
        for fetched in found:
            position = asked[fetched.tp]
            if self._positions.get(fetched.tp) is not position:
                continue
            position.end_offset = fetched.end_offset
            if fetched.error is not None:
                del self._positions[fetched.tp]
            elif fetched.next_offset == position.offset:
                continue
            position.offset = fetched.next_offset
            position.asked = False
            answers.append(fetched)
        return answers

    async def _wait(self, seen: int) -> None:
        if self._asked_anew or self._database.changes.count != seen:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            with self._database.changes.waking(self._waiter):
                await self._waiter
        finally:
            self._waiter = None

    def _fetch_one(self, sql: sqlite3.Connection, tp: TopicPartition, offset: int) -> Fetched:
        row = tables.partition(sql, tp)
        if row is None:
            return Fetched(tp, [], offset, 0, error=tables.unknown(sql, tp, self._database.name))
        if not row.start_offset <= offset <= row.end_offset:
            error: StreamFlowError = OffsetOutOfRangeError(
                tp.topic, tp.partition, offset, row.start_offset, row.end_offset
            )
            return Fetched(tp, [], offset, row.end_offset, error=error)
        fetched = Fetched(tp, [], offset, row.end_offset)
        if offset < row.end_offset:
            self._read_batches(sql, row.id, fetched)
        return fetched

    def _read_batches(self, sql: sqlite3.Connection, partition_id: int, fetched: Fetched) -> None:
        cursor = sql.execute(
            "SELECT base_offset, last_offset, data FROM batches WHERE partition_id = ? AND last_offset >= ? "
            "ORDER BY last_offset",
            (partition_id, fetched.next_offset),
        )
        first_offset = fetched.next_offset
        for base, last, data in cursor:
            try:
                records = checked(data, fetched.tp, base, last, self._database.name)
            except FatalError as error:
                # What stands before it is handed out first; the next fetch starts at it and meets it again.
                if not fetched.batches:
                    fetched.error = error
                break
            fetched.batches.append(RecordBatch(records, first_offset, len(data)))
            fetched.size_bytes += len(data)
            fetched.next_offset = last + 1
            if fetched.size_bytes >= FETCH_BYTES:
                break
        else:
            # Up to the end: what compaction took away is passed over.
            fetched.next_offset = fetched.end_offset
        cursor.close()


def checked(data: bytes, tp: TopicPartition, base: int, last: int, name: str) -> codec.Batch:
    """Open a stored batch after comparing its bytes with its row and its checksum.

    Args:
        data: The blob.
        tp: Its partition.
        base: The row's base offset.
        last: The row's last offset.
        name: The log as messages name it.

    Raises:
        LogCorruptedError: They do not fit; the message names the place.
    """
    reason = "it is too short"
    if len(data) >= codec.HEADER_BYTES:
        reason = "its header is damaged"
        if int.from_bytes(data[8:12], "big") == len(data) - _LENGTH_AT and data[16] == 2:
            records = codec.Batch(data)
            if records.base_offset == base and records.next_offset == last + 1:
                if records.validate_crc():
                    return records
                reason = "its checksum is wrong"
    raise LogCorruptedError(
        f"{tp}-{base}: the batch with offsets {base} to {last} in log {name} is damaged: {reason}. Restore the file "
        f"from a backup; or go past it by committing offset {last + 1} for this partition"
    )
