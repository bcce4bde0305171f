"""Encoded outputs on their way to the log: one set per task, sealed at a commit or when it is time to send.

Invariant: a record enters here only when its turn is done, in the order the records were taken. So what is sealed at
any moment is exactly the effect of the records below the task's position.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from streamflow.errors import ProductionError, TopologyError
from streamflow.log.batch import BatchBuilder, SealedBatch
from streamflow.model.partitioner import partition_for
from streamflow.model.record import Headers, TopicPartition
from streamflow.processing.topic import Topic

_BATCH_BYTES = 512 * 1024
_RECORD_OVERHEAD_BYTES = 61 + 32
_MEMO_ENTRIES = 200_000
_MEMO_KEY_BYTES = 1024


class Target:
    """A topic that is written to, as the whole worker sees it.

    Args:
        topic: The declared topic.
        partitions: Its partition count in the log.
        max_batch_bytes: Its `max.message.bytes`.
        compression: Codec number for its batches.
    """

    __slots__ = ("batch_bytes", "compression", "max_record_bytes", "memo", "name", "partitioner", "partitions", "topic")

    def __init__(self, topic: Topic[Any, Any], partitions: int, max_batch_bytes: int, compression: int) -> None:
        self.topic = topic
        self.name = topic.name
        self.partitions = partitions
        self.compression = compression
        self.max_record_bytes = max_batch_bytes - _RECORD_OVERHEAD_BYTES
        self.batch_bytes = min(_BATCH_BYTES, max_batch_bytes)
        self.partitioner: Callable[[bytes, int], int] = topic.partitioner or partition_for
        self.memo: dict[bytes, int] = {}

    def partition_of(self, key: bytes) -> int:
        """The key's partition, remembered."""
        partition = self.memo.get(key)
        if partition is None:
            partition = self.partitioner(key, self.partitions)
            self.check_partition(partition)
            if len(key) <= _MEMO_KEY_BYTES:
                if len(self.memo) >= _MEMO_ENTRIES:
                    self.memo.clear()
                self.memo[key] = partition
        return partition

    def check_partition(self, partition: int) -> None:
        """Raise `ProductionError` unless the topic has that partition."""
        if not 0 <= partition < self.partitions:
            raise ProductionError(f"topic {self.name!r} has partitions 0..{self.partitions - 1}, not {partition}")

    def check_size(self, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        """Raise `ProductionError` if the record could not be stored (uncompressed size, as Kafka's own producer)."""
        size = len(key or b"") + len(value or b"")
        if headers:
            size += sum(len(name) + len(content or b"") + 6 for name, content in headers)
        if size > self.max_record_bytes:
            raise ProductionError(
                f"a record of {size:,} bytes is too large for topic {self.name!r}, which takes "
                f"{self.max_record_bytes:,}: raise its max.message.bytes (config=) or send less"
            )


class OutputTopic:
    """One task's unsent records for one topic.

    Args:
        target: The topic.
        on_first: Called when a record arrives and nothing was waiting.
        on_batch: Called with each full batch's size in bytes.
    """

    __slots__ = ("_builders", "_null_partition", "_outputs", "_sealed", "name", "target")

    def __init__(self, target: Target, outputs: Outputs) -> None:
        self.target = target
        self.name = target.name
        self._builders: list[BatchBuilder | None] = [None] * target.partitions
        self._sealed: list[tuple[TopicPartition, SealedBatch]] = []
        self._outputs = outputs
        self._null_partition: int | None = None

    def null_partition(self) -> int:
        """Where records without key go until the next seal."""
        if self._null_partition is None:
            self._null_partition = random.randrange(self.target.partitions)
        return self._null_partition

    def append(
        self, partition: int, timestamp_ms: int, key: bytes | None, value: bytes | None, headers: Headers
    ) -> None:
        """Add a record of a done turn."""
        builder = self._builders[partition]
        if builder is not None and builder.append(timestamp_ms, key, value, headers):
            return
        if builder is not None:
            self._seal(partition, builder)
        builder = BatchBuilder(self.target.compression, self.target.batch_bytes)
        self._builders[partition] = builder
        self._outputs.opened()
        builder.append(timestamp_ms, key, value, headers)

    def _seal(self, partition: int, builder: BatchBuilder) -> None:
        sealed = builder.seal()
        self._builders[partition] = None
        self._outputs.sealed_bytes += sealed.size_bytes
        self._sealed.append((TopicPartition(self.name, partition), sealed))

    def seal(self) -> list[tuple[TopicPartition, SealedBatch]]:
        """Take everything out, in order per partition."""
        for partition, builder in enumerate(self._builders):
            if builder is not None:
                self._seal(partition, builder)
        sealed, self._sealed = self._sealed, []
        self._null_partition = None
        return sealed


class Outputs:
    """All unsent records of one task.

    Args:
        targets: Looks a topic's target up by name.
        on_opened: Called when something waits that did not before.
    """

    def __init__(self, targets: Targets, on_opened: Callable[[], None]) -> None:
        self._targets = targets
        self._topics: dict[str, OutputTopic] = {}
        self._on_opened = on_opened
        self.waiting = False
        self.sealed_bytes = 0

    def to(self, topic: Topic[Any, Any]) -> OutputTopic:
        """The outputs to a topic."""
        output = self._topics.get(topic.name)
        if output is None:
            output = self._topics[topic.name] = OutputTopic(self._targets[topic.name], self)
        return output

    def opened(self) -> None:
        """A builder was opened: something waits to be sent."""
        if not self.waiting:
            self.waiting = True
            self._on_opened()

    def seal(self) -> list[tuple[TopicPartition, SealedBatch]]:
        """Take all batches out, in order per partition."""
        self.waiting = False
        self.sealed_bytes = 0
        sealed: list[tuple[TopicPartition, SealedBatch]] = []
        for output in self._topics.values():
            sealed += output.seal()
        return sealed


class Targets:
    """Every topic the worker may write to, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Target] = {}

    def __getitem__(self, name: str) -> Target:
        try:
            return self._by_name[name]
        except KeyError:
            raise TopologyError(
                f"topic {name!r} was not known when the worker started: declare it with app.topic(...) at module level"
            ) from None

    def add(self, target: Target) -> None:
        """Make a topic known."""
        self._by_name[target.name] = target

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def names(self) -> Sequence[str]:
        """Names of all of them."""
        return tuple(self._by_name)
