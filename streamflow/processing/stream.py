"""What an agent iterates over.

A record is *done* when the agent asks for the next one: only then do its outputs join the commit. So a stream is asked
from one place, one record at a time; a wrapper that asks ahead (in another task) is refused by the runtime.
`take(n)` makes n records one unit: they are done, retried, dropped or dead-lettered together.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, Literal, Protocol, TypeAlias, cast, overload

from typing_extensions import TypeVar

from streamflow.errors import ConfigurationError, RecordError
from streamflow.model.record import Headers
from streamflow.model.serde import NeedSchema

V = TypeVar("V", covariant=True)
K = TypeVar("K", covariant=True, default=Any)
R = TypeVar("R")

View: TypeAlias = Literal["values", "events", "items"]


class Event(Generic[V, K]):
    """A record in an agent's hands.

    Attributes:
        value: Decoded value.
        headers: Record headers as stored.
        timestamp_ms: Milliseconds since the epoch, UTC: the record's, or what the topic's `timestamp=` extracted.
        topic: Source topic.
        partition: Source partition.
        offset: Offset in it.
    """

    __slots__ = ("_key", "headers", "offset", "partition", "timestamp_ms", "topic", "value")

    def __init__(
        self, key: K, value: V, headers: Headers, timestamp_ms: int, topic: str, partition: int, offset: int
    ) -> None:
        self._key = key
        self.value = value
        self.headers = headers
        self.timestamp_ms = timestamp_ms
        self.topic = topic
        self.partition = partition
        self.offset = offset

    @property
    def key(self) -> K:
        """Decoded key."""
        return self._key

    @property
    def id(self) -> str:
        """`topic-partition-offset`: the same on every replay, so fit as an idempotency key."""
        return f"{self.topic}-{self.partition}-{self.offset}"

    def __repr__(self) -> str:
        return f"Event({self.id}, key={self._key!r}, value={self.value!r})"


class Source(Protocol):
    """What the runtime puts behind a stream."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    async def __anext__(self) -> Any:
        """Finish the unit in hand, take one record, return its decoded value."""

    def event(self, value: Any) -> Event[Any, Any]:
        """The record in hand as an event, its key decoded."""
        ...

    async def take(self, max_records: int, within_s: float | None, view: View) -> list[Any]:
        """Finish the unit in hand, take a unit of up to `max_records`."""
        ...

    def as_view(self, value: Any, view: View) -> Any:
        """The record in hand as `view` says.

        Raises:
            RecordError: Its key does not decode.
            NeedSchema: Its key needs a schema.
        """

    async def resolve(self, view: View) -> tuple[bool, Any]:
        """What `as_view` could not give: once the schema is loaded, or the policy has acted.

        Returns:
            Whether the record is to be handed out, and as what.
        """
        ...


_Step: TypeAlias = tuple[Literal["map", "filter"], Callable[[Any], Any]]


class Stream(Generic[V, K]):
    """The records of one partition of the agent's topic, in order, without end.

    Example:
        ```
        async def total(stream: sf.Stream[Order]) -> AsyncIterator[Total]:
            async for order in stream:
                yield Total(order.user, order.amount)
        ```
    """

    __slots__ = ("_source", "_steps", "_view")

    def __init__(self, source: Source, view: View = "values", steps: tuple[_Step, ...] = ()) -> None:
        self._source = source
        self._view: View = view
        self._steps = steps

    def __aiter__(self) -> AsyncIterator[V]:
        if self._view == "values" and not self._steps:
            return self._source.__aiter__()
        return self._viewed()

    def __anext__(self) -> Awaitable[V]:
        return anext(self.__aiter__())

    async def _viewed(self) -> AsyncIterator[V]:
        async for value in self._source:
            try:
                kept, item = True, self._source.as_view(value, self._view)
            except (RecordError, NeedSchema):  # of the key: it concerns the policy, not the agent
                kept, item = await self._source.resolve(self._view)
            if kept and self._steps:
                kept, item = await self._apply(item)
            if kept:
                yield item

    async def _apply(self, item: Any) -> tuple[bool, Any]:
        for kind, function in self._steps:
            result = function(item)
            if inspect.isawaitable(result):
                result = await result
            if kind == "map":
                item = result
            elif not result:
                return False, None
        return True, item

    def events(self) -> Stream[Event[V, K], K]:
        """Iterate over events: key, value, headers, timestamp and position of each record."""
        self._need_plain("events()")
        return Stream(self._source, "events")

    def items(self) -> Stream[tuple[K, V], K]:
        """Iterate over `(key, value)` pairs."""
        self._need_plain("items()")
        return Stream(self._source, "items")

    def _need_plain(self, what: str) -> None:
        if self._view != "values" or self._steps:
            raise ConfigurationError(f"call {what} on the agent's stream itself, before map() and filter()")

    @overload
    def filter(self, function: Callable[[V], Awaitable[object]]) -> Stream[V, K]: ...
    @overload
    def filter(self, function: Callable[[V], object]) -> Stream[V, K]: ...
    def filter(self, function: Callable[[V], object]) -> Stream[V, K]:
        """Keep the records for which `function` is true; the others are done without output.

        Args:
            function: Called with each item; sync or async.
        """
        return Stream(self._source, self._view, (*self._steps, ("filter", function)))

    @overload
    def map(self, function: Callable[[V], Awaitable[R]]) -> Stream[R, K]: ...
    @overload
    def map(self, function: Callable[[V], R]) -> Stream[R, K]: ...
    def map(self, function: Callable[[V], Any]) -> Stream[Any, K]:
        """Replace each item; key, timestamp and headers of the record stay.

        Args:
            function: Called with each item; sync or async.
        """
        return Stream(self._source, self._view, (*self._steps, ("map", function)))

    async def enumerate(self, start: int = 0) -> AsyncIterator[tuple[int, V]]:
        """Iterate over `(number, item)`; numbers start anew in each partition and after an error or a move.

        Args:
            start: First number.
        """
        number = start
        async for item in self:
            yield number, item
            number += 1

    async def take(self, max_records: int, within_s: float | None = None) -> AsyncIterator[list[V]]:
        """Iterate over lists of records, each list one unit: done, retried, dropped or dead-lettered whole.

        Args:
            max_records: Greatest length of a list, >= 1.
            within_s: Seconds after its first record at which a shorter list is handed out, > 0. None waits for
                `max_records`; at the end of a bounded run the rest comes as it is. Beside other agents on the same
                source, a list is handed out short as well when 65 536 records (or 64 MiB) of a task are held for it.

        Raises:
            ConfigurationError: A limit is out of range, or the agent has `concurrency` > 1.
        """
        if max_records < 1:
            raise ConfigurationError(f"take({max_records}): take at least one record")
        if within_s is not None and within_s <= 0:
            raise ConfigurationError(f"take(..., within_s={within_s}): seconds must be above 0; leave it out to wait")
        while True:
            items: list[Any] = []
            for item in await self._source.take(max_records, within_s, self._view):
                kept, changed = await self._apply(item)
                if kept:
                    items.append(changed)
            if items:
                yield cast(list[V], items)
