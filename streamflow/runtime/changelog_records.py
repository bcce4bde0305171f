"""Changelog records as changes of a table's store, for whoever restores or follows one.

A store that is to go on from where it is must have been near enough to its changelog all the time: see
`check_position`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from streamflow.errors import StateCorruptedError
from streamflow.log.api import Fetched
from streamflow.log.batch import RecordBatch
from streamflow.model.record import TopicPartition
from streamflow.processing.table import Table
from streamflow.state.format import pack

_PIECE_BYTES = 64 << 10


@dataclass(slots=True)
class ChangelogChanges:
    """What changelog records say.

    Attributes:
        by_key: Store keys to packed values; None deletes.
        beyond: By store key: value and timestamp of the newest record from the given offset on.
        records: How many records there were.
        newest_ms: Greatest timestamp of what is in `by_key`; -1 where values do not expire.
    """

    by_key: dict[bytes, bytes | None] = field(default_factory=dict)
    beyond: dict[bytes, tuple[bytes | None, int]] = field(default_factory=dict)
    records: int = 0
    newest_ms: int = -1


class ChangelogRecords:
    """Reads the changelog of one table.

    Args:
        table: The table.
    """

    def __init__(self, table: Table[Any, Any]) -> None:
        keys, decode_key = table.keys_in_order, table.key_codec.decode
        self._ttl_ms = None if table.ttl_s is None else round(table.ttl_s * 1000)
        self._is_store_key = keys.same_as_serialized
        self._encode_key, self._decode_key = keys.encode, decode_key

    def read(self, batches: Iterable[RecordBatch], *, below: int) -> ChangelogChanges:
        """What records say; takes the time it takes, so call it in a thread.

        Args:
            batches: What was fetched.
            below: Records from this offset on go into `beyond`.
        """
        changes = ChangelogChanges()
        for batch in batches:
            self._add(batch, changes, below)
        return changes

    def _add(self, batch: RecordBatch, changes: ChangelogChanges, below: int) -> None:
        by_key, ttl_ms = changes.by_key, self._ttl_ms
        is_store_key, encode_key, decode_key = self._is_store_key, self._encode_key, self._decode_key
        count, newest_ms = 0, changes.newest_ms
        for record in batch.open():
            count += 1
            raw, value = record.key, record.value
            if raw is None:
                continue
            key = raw if is_store_key else encode_key(decode_key(raw))
            if record.offset >= below:
                changes.beyond[key] = value, record.timestamp
            elif ttl_ms is None:
                by_key[key] = None if value is None else pack(value, None)
            else:
                newest_ms = max(newest_ms, record.timestamp)
                by_key[key] = None if value is None else pack(value, record.timestamp + ttl_ms)
        changes.records += count
        changes.newest_ms = newest_ms


def pieces(fetched: Fetched) -> Iterator[Fetched]:
    """A fetch bit by bit: compressed it is small, and opened as a whole it would be memory that no budget knows.

    Small batches are taken together: each piece waits for the event loop, where running tasks may be at work.
    """
    batches = fetched.batches
    end = 0
    while True:
        start, size_bytes = end, 0
        while end < len(batches) and (end == start or size_bytes + batches[end].size_bytes <= _PIECE_BYTES):
            size_bytes += batches[end].size_bytes
            end += 1
        some = batches[start:end]
        if end == len(batches):
            yield replace(fetched, batches=some)
            return
        yield replace(fetched, batches=some, next_offset=some[-1].next_offset)


def check_position(
    tp: TopicPartition, position: int, start: int, end: int, away_ms: int, stale_after_ms: int, *, committed: int
) -> None:
    """Make sure that a store can go on from where it is.

    Args:
        tp: The changelog's partition.
        position: The offset that follows what the store has; 0 for nothing.
        start: First offset that the changelog has.
        end: Its end, open transactions included.
        away_ms: How long ago the store was last level with it, milliseconds.
        stale_after_ms: How long that may be.
        committed: Where what is committed ends.

    Raises:
        StateCorruptedError: It cannot: it is to be set aside, and filled from the beginning.
    """
    where = f"it reaches offset {position} of changelog {tp}"
    if position > end:
        raise StateCorruptedError(f"{where}, which ends at {end}: the log has lost records", reason="ahead")
    if position > committed:
        raise StateCorruptedError(
            f"{where}, which is committed up to {committed}: it may hold updates that come again",
            reason="ahead",
        )
    if 0 < position < start:
        raise StateCorruptedError(f"{where}, which begins at {start} now", reason="behind")
    if 0 < position < end and away_ms > stale_after_ms:
        raise StateCorruptedError(
            f"{where}, was last level with it {away_ms / 86_400_000:.1f} days ago, and may have missed deletions that "
            "are gone from it",
            reason="stale",
        )
