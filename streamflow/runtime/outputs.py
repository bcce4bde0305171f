"""Encoded outputs on their way to the log: one set per task, sealed at a commit or when it is time to send.

Invariant: a record enters here only when its turn is done, in the order the records were taken. So what is sealed at
any moment is exactly the effect of the records below the task's position.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeAlias, TypeVar

from streamflow.clock import SystemClock
from streamflow.errors import ProductionError, TopologyError
from streamflow.log.batch import BatchBuilder, SealedBatch
from streamflow.model.partitioner import partition_for
from streamflow.model.record import Headers, TopicPartition
from streamflow.processing.topic import Topic

P = TypeVar("P")

_BATCH_BYTES = 512 * 1024
_RECORD_OVERHEAD_BYTES = 61 + 32
_LAST_MS = 2**61  # so that the difference of two fits into 64 bits
_CLOCK = SystemClock()
_NO_HEADERS: list[tuple[str, bytes | None]] = []


class Target:
    """A topic that is written to, as the whole worker sees it.

    Args:
        topic: The declared topic.
        partitions: Its partition count in the log.
        max_batch_bytes: Its `max.message.bytes`.
        compression: Codec number for its batches.
        ahead_ms: How far ahead of the clock the log takes a record's time; None for any.
        behind_ms: How far behind.
    """

    __slots__ = (
        "ahead_ms",
        "batch_bytes",
        "behind_ms",
        "compression",
        "max_record_bytes",
        "name",
        "partitioner",
        "partitions",
        "topic",
    )

    def __init__(
        self,
        topic: Topic[Any, Any],
        partitions: int,
        max_batch_bytes: int,
        compression: int,
        *,
        ahead_ms: int | None = None,
        behind_ms: int | None = None,
    ) -> None:
        self.topic = topic
        self.name = topic.name
        self.partitions = partitions
        self.compression = compression
        self.ahead_ms = ahead_ms
        self.behind_ms = behind_ms
        self.max_record_bytes = max_batch_bytes - _RECORD_OVERHEAD_BYTES
        self.batch_bytes = min(_BATCH_BYTES, max_batch_bytes)
        self.partitioner: Callable[[bytes, int], int] = topic.partitioner or partition_for

    def partition_of(self, key: bytes) -> int:
        """The key's partition."""
        partition = self.partitioner(key, self.partitions)
        self.check_partition(partition)
        return partition

    def check_partition(self, partition: int) -> None:
        """Raise `ProductionError` unless the topic has that partition."""
        if not 0 <= partition < self.partitions:
            raise ProductionError(f"topic {self.name!r} has partitions 0..{self.partitions - 1}, not {partition}")

    def check_time(self, timestamp_ms: Any) -> None:
        """Raise `ProductionError` if the log would not take a record of that time."""
        if not isinstance(timestamp_ms, int | float) or not -_LAST_MS <= timestamp_ms <= _LAST_MS:
            raise ProductionError(
                f"topic {self.name!r}: the time of a record is a number of milliseconds since the epoch, not "
                f"{str(timestamp_ms)[:60]}"
            )
        if self.ahead_ms is None and self.behind_ms is None:
            return
        now_ms = _CLOCK.now_ms()
        if self.ahead_ms is not None and timestamp_ms > now_ms + self.ahead_ms:
            raise self._bad_time(timestamp_ms, "ahead", self.ahead_ms, "after")
        if self.behind_ms is not None and timestamp_ms < now_ms - self.behind_ms:
            raise self._bad_time(timestamp_ms, "behind", self.behind_ms, "before")

    def _bad_time(self, timestamp_ms: float, where: str, most_ms: int, option: str) -> ProductionError:
        return ProductionError(
            f"a record with the time {timestamp_ms} ms is further {where} than topic {self.name!r} takes "
            f"({most_ms:,} ms): times are milliseconds since the epoch; raise the topic's "
            f"message.timestamp.{option}.max.ms, or set another time, `sf.Out(..., timestamp_ms=...)`"
        )

    def taken_time(self, timestamp_ms: int) -> int:
        """A time that the log takes: the record's own, else the clock's."""
        try:
            self.check_time(timestamp_ms)
        except ProductionError:
            return _CLOCK.now_ms()
        return timestamp_ms

    def check_headers(self, headers: Headers) -> None:
        """Raise `ProductionError` unless headers are pairs of text and bytes: the codec would fail in mid-commit."""
        for header in headers:
            try:
                name, content = header
                str.encode(name)
                fits = content is None or type(content) is bytes
            except (TypeError, ValueError):
                fits = False
            if not fits:
                raise ProductionError(
                    f"topic {self.name!r}: {str(header)[:60]!r} is no header: headers are pairs of a str and bytes, "
                    "such as `headers=[('trace', b'1')]`"
                )

    def check_size(self, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        """Raise `ProductionError` if the record could not be stored (uncompressed size, as Kafka's own producer)."""
        size = len(key or b"") + len(value or b"")
        if headers:
            size += size_of(headers)
        if size > self.max_record_bytes:
            raise ProductionError(
                f"a record of {size:,} bytes is too large for topic {self.name!r}, which takes "
                f"{self.max_record_bytes:,}: raise its max.message.bytes (config=) or send less"
            )


def size_of(headers: Headers) -> int:
    """Bytes of headers as they are stored, about."""
    return sum(len(name) + len(content or b"") + 6 for name, content in headers)


Encoded: TypeAlias = tuple[P, int, bytes | None, bytes | None, Headers]
"""An encoded record and where it goes: partition, timestamp, key, value, headers."""


class Destination(ABC, Generic[P]):
    """A topic on the way there: encodes what is to be sent, checks it and chooses its partition.

    Args:
        target: The topic.
    """

    __slots__ = ("target",)

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def of_key(self, key: bytes | None) -> P:
        """The partition of an encoded key, or of a record without one."""

    @abstractmethod
    def of_number(self, partition: int) -> P:
        """A partition by its number.

        Raises:
            ProductionError: There is none of that number.
        """

    def encode(
        self,
        key: bytes | None,
        value: Any,
        partition: int | None,
        timestamp_ms: int,
        headers: list[tuple[str, bytes | None]],
    ) -> Encoded[P]:
        """Make a record of what user code gave.

        Args:
            key: Its key, encoded.
            value: Its value.
            partition: Where to; None lets the key decide.
            timestamp_ms: Its time.
            headers: All its headers.

        Raises:
            ProductionError: It cannot be encoded, is too large, has a time or headers that the log does not take, or
                goes to a partition that is not there. What passes here can be written: to find out later would be in
                the middle of a turn's end, with a part of its effects done.
        """
        target = self.target
        data = target.topic.value_codec.encode(value, headers)
        target.check_time(timestamp_ms)
        if headers:
            target.check_headers(headers)
        target.check_size(key, data, headers)
        place = self.of_key(key) if partition is None else self.of_number(partition)
        return place, timestamp_ms, key, data, headers


Staged: TypeAlias = "Encoded[OutputPartition]"
"""An encoded output of a turn that is not done yet."""


def write(stage: Iterable[Staged]) -> None:
    """Move the outputs of a done turn into their batches."""
    for out, timestamp_ms, key, value, headers in stage:
        if out.append(out.count, timestamp_ms, key, value, headers) is None:
            out.roll(timestamp_ms, key, value, headers)
        else:
            out.count += 1


class OutputPartition:
    """One task's unsent records for one partition of one topic.

    `append` is the codec's own: it takes the record's number in the batch first, and returns None when the batch is
    full (or none is open). Whoever calls it then counts in `count`, or calls `roll`.

    Args:
        output: The topic.
        partition: The partition.
    """

    __slots__ = ("_builder", "_output", "_sealed", "append", "count", "tp")

    def __init__(self, output: OutputTopic, partition: int) -> None:
        self.tp = TopicPartition(output.name, partition)
        self.count = 0
        self.append: Callable[[int, int, bytes | None, bytes | None, Any], Any] = _not_open
        self._output = output
        self._builder: BatchBuilder | None = None
        self._sealed: list[SealedBatch] = []

    @property
    def target(self) -> Target:
        """The topic."""
        return self._output.target

    def roll(self, timestamp_ms: int, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        """Close the full batch, open the next one and add the record there."""
        self._close()
        target = self.target
        builder = self._builder = BatchBuilder(target.compression, target.batch_bytes)
        self.append = builder.append_numbered
        self._output.outputs.opened()
        self.append(0, timestamp_ms, key, value, headers)
        self.count = 1

    def extend(self, records: Iterable[tuple[bytes | None, bytes | None, int]]) -> None:
        """Add records without headers.

        Args:
            records: Key, value, timestamp in milliseconds.
        """
        for key, value, timestamp_ms in records:
            if self.append(self.count, timestamp_ms, key, value, _NO_HEADERS) is None:
                self.roll(timestamp_ms, key, value, _NO_HEADERS)
            else:
                self.count += 1

    def _close(self) -> None:
        if self._builder is not None:
            sealed = self._builder.seal(self.count)
            self._sealed.append(sealed)
            self._output.outputs.sealed_bytes += sealed.size_bytes
        self._builder, self.append, self.count = None, _not_open, 0

    def seal(self) -> list[tuple[TopicPartition, SealedBatch]]:
        """Take everything out, in order."""
        self._close()
        sealed, self._sealed = self._sealed, []
        return [(self.tp, batch) for batch in sealed]


def _not_open(_: int, __: int, ___: bytes | None, ____: bytes | None, _____: Any) -> None:
    """Stands in for a batch that is not open."""


class OutputTopic(Destination[OutputPartition]):
    """One task's unsent records for one topic.

    Args:
        target: The topic.
        outputs: The task's outputs, of which this is a part.
    """

    __slots__ = ("_null", "name", "outputs", "partitions")

    def __init__(self, target: Target, outputs: Outputs) -> None:
        super().__init__(target)
        self.name = target.name
        self.outputs = outputs
        self.partitions = [OutputPartition(self, number) for number in range(target.partitions)]
        self._null: OutputPartition | None = None

    def of_key(self, key: bytes | None) -> OutputPartition:
        """The partition of a key; records without key share one until the next seal."""
        if key is not None:
            return self.partitions[self.target.partition_of(key)]
        if self._null is None:
            self._null = random.choice(self.partitions)
        return self._null

    def of_number(self, partition: int) -> OutputPartition:
        """See `Destination.of_number`."""
        self.target.check_partition(partition)
        return self.partitions[partition]

    def seal(self) -> list[tuple[TopicPartition, SealedBatch]]:
        """Take everything out, in order per partition."""
        self._null = None
        return [batch for partition in self.partitions for batch in partition.seal()]


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
        for output in list(self._topics.values()):  # an agent in a thread may send to its first topic just now
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
