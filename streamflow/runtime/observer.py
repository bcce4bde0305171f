"""Reads what is in an app's topics, outside of any group: for tests and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from streamflow.clock import Clock
from streamflow.config import Settings
from streamflow.errors import DeserializationError
from streamflow.log.batch import BatchBuilder, LogRecord, RecordBatch
from streamflow.log.codec import COMPRESSIONS
from streamflow.log.connect import connect
from streamflow.model.partitioner import partition_for
from streamflow.model.record import Headers, RecordMetadata, TopicPartition
from streamflow.model.serde import BoundCodec
from streamflow.processing.declarations import Declarations
from streamflow.processing.stream import Event


class Observer:
    """Keeps the committed records of all declared topics; use it as `async with`.

    Args:
        app: The app.
        settings: Resolved settings.
        clock: Time.
    """

    def __init__(self, app: Declarations, settings: Settings, clock: Clock) -> None:
        self._app = app
        self._changelogs = {table.changelog.name for table in app.tables.values()}
        self._log = connect(settings.broker, clock=clock, client_id=f"streamflow-{app.id}-observer")
        self._positions: dict[TopicPartition, int] = {}
        self._records: dict[TopicPartition, list[LogRecord]] = {}
        self._unreadable: dict[tuple[TopicPartition, int], DeserializationError] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Observer:
        """Open the log."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._log)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        """Close it."""
        await self._stack.__aexit__(*exc_info)

    def records(self, topic: str) -> list[Event[Any, Any]]:
        """What `look` saw in a topic, by partition and offset.

        Raises:
            DeserializationError: A record does not decode as the topic's types.
        """
        return [
            self._event(tp, record)
            for tp, records in sorted(self._records.items())
            if tp.topic == topic
            for record in records
        ]

    async def put(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        *,
        partition: int | None,
        timestamp_ms: int,
        headers: Headers,
    ) -> RecordMetadata:
        """Write a record as it is, whatever the topic's types."""
        count = (await self._log.admin.describe([topic]))[topic].partitions
        if partition is None:
            partition = 0 if key is None else partition_for(key, count)
        builder = BatchBuilder(COMPRESSIONS["none"], 1 << 20)
        builder.append(timestamp_ms, key, value, list(headers))
        async with self._log.producer() as producer:
            offset = await (await producer.enqueue(TopicPartition(topic, partition), builder.seal()))
        return RecordMetadata(topic, partition, offset, timestamp_ms)

    async def look(self) -> None:
        """Read what came since the last look."""
        admin = self._log.admin
        descriptions = await admin.describe(list(self._app.every_topic()))
        partitions = [
            TopicPartition(name, number) for name, each in descriptions.items() for number in range(each.partitions)
        ]
        starts, ends = await admin.start_offsets(partitions), await admin.end_offsets(partitions)
        left = {tp: ends[tp] for tp in partitions if max(self._positions.get(tp, 0), starts[tp]) < ends[tp]}
        if not left:
            return
        async with self._log.reader("observer") as reader:
            for tp in left:
                reader.add(tp, max(self._positions.get(tp, 0), starts[tp]))
                reader.ask(tp)
            while left:
                for fetched in await reader.receive():
                    await self._keep(fetched.tp, fetched.batches)
                    self._positions[fetched.tp] = fetched.next_offset
                    if fetched.next_offset >= left[fetched.tp]:
                        del left[fetched.tp]
                    else:
                        reader.ask(fetched.tp)

    async def _keep(self, tp: TopicPartition, batches: Sequence[RecordBatch]) -> None:
        kept = self._records.setdefault(tp, [])
        codecs = self._codecs(tp.topic)
        for batch in batches:
            records = list(batch.open())
            kept.extend(records)
            if any(codec.fast_decode is None for codec in codecs):
                for record in records:
                    await self._load_schemas(tp, record)

    def _codecs(self, topic: str) -> tuple[BoundCodec[Any], BoundCodec[Any]]:
        found = self._app.every_topic()[topic]
        return found.key_codec, found.value_codec

    async def _load_schemas(self, tp: TopicPartition, record: LogRecord) -> None:
        """Schemas are loaded here, as a worker does, since `records` cannot wait; what fails, it raises."""
        try:
            for codec, data in zip(self._codecs(tp.topic), (record.key, record.value), strict=True):
                await codec.decode_loading(data, record.headers)
        except DeserializationError as error:
            self._unreadable[tp, record.offset] = error

    def _event(self, tp: TopicPartition, record: LogRecord) -> Event[Any, Any]:
        key_codec, value_codec = self._codecs(tp.topic)
        try:
            if (tp, record.offset) in self._unreadable:
                raise self._unreadable[tp, record.offset]
            key = key_codec.decode(record.key, record.headers)
            is_deletion = record.value is None and tp.topic in self._changelogs
            value = None if is_deletion else value_codec.decode(record.value, record.headers)
        except DeserializationError as error:
            error.at(tp.topic, tp.partition, record.offset)
            raise
        return Event(key, value, record.headers, record.timestamp, tp.topic, tp.partition, record.offset)
