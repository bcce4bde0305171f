"""Records of a topic that a table is filled from: what each says about a key, and what cannot be read.

A record that does not decode is passed over, counted, and told once with its place; the key keeps what it had. It stops
nobody: the table is shared by all, and the record stays in its topic for whoever mends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio.to_thread

from streamflow.errors import DeserializationError, RecordError
from streamflow.log.batch import LogRecord, RecordBatch
from streamflow.model.record import TopicPartition
from streamflow.model.serde import NeedSchema
from streamflow.processing.topic import Topic
from streamflow.sensors import Sensors
from streamflow.state.format import pack
from streamflow.state.keys import KeyOrder
from streamflow.state.values import MISSING

logger = logging.getLogger("streamflow.tables")

_IN_THREAD_FROM_BYTES = 32 * 1024


@dataclass(slots=True)
class Changes:
    """What fetched records say.

    Attributes:
        by_key: Store keys to packed values; None deletes.
        records: How many records there were.
        passed: Offsets of those that cannot be read, with the reason.
    """

    by_key: dict[bytes, bytes | None] = field(default_factory=dict)
    records: int = 0
    passed: list[tuple[int, Exception]] = field(default_factory=list)


class _Wanting(Exception):
    """A record needs a schema that is not loaded."""

    def __init__(self, record: LogRecord) -> None:
        super().__init__(record.offset)
        self.record = record


class SourceRecords:
    """Reads the records of a table's source.

    Args:
        table: The table's name.
        topic: Its source.
        keys: Order-preserving encoding of its keys.
        sensors: Told of records that cannot be read, as `table <name>`.

    Attributes:
        passed_over: How many could not be read so far.
    """

    def __init__(self, table: str, topic: Topic[Any, Any], keys: KeyOrder, sensors: Sensors) -> None:
        self._table = table
        self._sensors = sensors
        self._encode_key = keys.encode
        self._is_store_key = keys.same_as_serialized
        self._key_codec, self._value_codec = topic.key_codec, topic.value_codec
        self._fast_key = topic.key_codec.fast_decode
        self._fast_value = topic.value_codec.fast_decode
        self.passed_over = 0

    @property
    def load_schemas(self) -> bool:
        """Whether values can be read only with schemas that somebody has to load first."""
        return self._key_codec.load_schema is not None or self._value_codec.load_schema is not None

    # --- one record --------------------------------------------------------------------------------------------

    def entry(self, record: LogRecord) -> tuple[bytes, Any, Any]:
        """What a record says: the store's key, the key, and its value, `MISSING` where it deletes.

        Raises:
            NeedSchema: Await `load`, and try again.
            RecordError: It cannot be read.
        """
        raw, data = record.key, record.value
        if raw is None:
            raise DeserializationError("it has no key")
        key = self._decoded(self._fast_key, self._key_codec, raw, record)
        store_key = raw if self._is_store_key else self._encode_key(key)
        if data is None:
            return store_key, key, MISSING
        value = self._decoded(self._fast_value, self._value_codec, data, record)
        return store_key, key, MISSING if value is None else value

    def _decoded(self, fast: Callable[[bytes], Any] | None, codec: Any, data: bytes, record: LogRecord) -> Any:
        if fast is not None:
            try:
                return fast(data)
            except Exception:  # the slow way says what is wrong
                return codec.decode(data, record.headers)
        return codec.decode(data, record.headers)

    async def load(self, record: LogRecord) -> None:
        """Load the schemas that a record needs.

        Raises:
            DeserializationError: They cannot be had, or the record does not decode with them.
        """
        await self._key_codec.decode_loading(record.key, record.headers)
        await self._value_codec.decode_loading(record.value, record.headers)

    async def entry_loading(self, tp: TopicPartition, record: LogRecord) -> tuple[bytes, Any, Any] | None:
        """`entry` of a record, its schemas loaded; None where it cannot be read, which is counted and told."""
        try:
            try:
                return self.entry(record)
            except NeedSchema:
                await self.load(record)
                return self.entry(record)
        except (RecordError, NeedSchema) as error:
            self.pass_over(tp, [(record.offset, error)])
            return None

    def pass_over(self, tp: TopicPartition, passed: Iterable[tuple[int, Exception]]) -> None:
        """Count records that cannot be read, and tell the first."""
        for offset, error in passed:
            self.passed_over += 1
            self._sensors.record_error(f"table {self._table}", "skip")
            if self.passed_over == 1:
                logger.warning(
                    "table %r: the record %s-%d cannot be read and is passed over, its key keeps what it had: %s. "
                    "Further ones are counted only (streamflow_errors_total)",
                    self._table,
                    tp,
                    offset,
                    error,
                )

    # --- many --------------------------------------------------------------------------------------------------

    async def read(self, tp: TopicPartition, batches: Iterable[RecordBatch], *, below: int | None = None) -> Changes:
        """What fetched records say, large fetches read in a thread.

        Args:
            tp: Their partition.
            batches: What was fetched.
            below: Records from this offset on are left out; None takes all.
        """
        batches = list(batches)
        given_up: dict[int, Exception] = {}
        size = sum(batch.size_bytes for batch in batches)
        records = [record for batch in batches for record in batch.open()] if size < _IN_THREAD_FROM_BYTES else None
        while True:
            work = partial(self._collect, batches, records, below, given_up)
            try:
                changes = work() if records is not None else await anyio.to_thread.run_sync(work)
            except _Wanting as wanting:
                try:
                    await self.load(wanting.record)
                except RecordError as error:
                    given_up[wanting.record.offset] = error
                continue
            self.pass_over(tp, changes.passed)
            return changes

    def _collect(
        self,
        batches: Iterable[RecordBatch],
        records: list[LogRecord] | None,
        below: int | None,
        given_up: dict[int, Exception],
    ) -> Changes:
        if records is None:
            records = [record for batch in batches for record in batch.open()]
        changes = Changes()
        by_key, entry = changes.by_key, self.entry
        for record in records:
            if below is not None and record.offset >= below:
                break
            changes.records += 1
            if record.offset in given_up:
                changes.passed.append((record.offset, given_up[record.offset]))
                continue
            try:
                key, _, value = entry(record)
            except NeedSchema as need:
                raise _Wanting(record) from need
            except RecordError as error:
                changes.passed.append((record.offset, error))
                continue
            by_key[key] = None if value is MISSING else pack(record.value or b"", None)
        return changes
