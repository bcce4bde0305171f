"""What all tables are to who reads them: a mapping in key order, of which ranges can be read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, ClassVar, Generic, TypeVar, cast, overload

from streamflow.errors import ConfigurationError
from streamflow.model.schema import type_name
from streamflow.state.keys import ByteRange, KeyOrder
from streamflow.state.values import MISSING

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


class OrderedMapping(Mapping[K, V], Generic[K, V]):
    """A mapping in the order of its keys, over what `found` and `between` read; equal to nothing but itself.

    Attributes:
        kind: What it is called in messages.
        name: Its name.
        key_type: Type of its keys.
        value_type: Type of its values.
        keys_in_order: The order.
    """

    kind: ClassVar[str]
    name: str
    key_type: Any
    value_type: Any
    keys_in_order: KeyOrder

    @abstractmethod
    def found(self, key: K) -> V | Any:
        """The value there is of a key, `MISSING` where there is none."""

    @abstractmethod
    def between(self, low: bytes | None, high: bytes | None, *, reverse: bool) -> Iterator[tuple[K, V]]:
        """Keys and values of a range of stored keys, in their order, as they are at the time of the call."""

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name!r}: {type_name(self.key_type)} to {type_name(self.value_type)}>"

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @overload
    def get(self, key: K, /) -> V | None: ...
    @overload
    def get(self, key: K, default: V, /) -> V: ...
    @overload
    def get(self, key: K, default: T, /) -> V | T: ...
    def get(self, key: K, default: Any = None, /) -> Any:
        """The value of a key.

        Args:
            key: The key.
            default: What to return where there is none; a default of the table's own is not used.
        """
        value = self.found(key)
        return default if value is MISSING else value

    def __contains__(self, key: object) -> bool:
        return self.found(cast("K", key)) is not MISSING

    def __iter__(self) -> Iterator[K]:
        return (key for key, _ in self.scan())

    def __len__(self) -> int:
        return sum(1 for _ in self.scan())

    def __bool__(self) -> bool:
        return next(self.scan(), None) is not None

    def keys(self) -> KeysView[K]:
        """Keys, in order."""
        return KeysView(self)

    def items(self) -> ItemsView[K, V]:
        """Keys and values, in key order."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """Values, in key order."""
        return _Values(self)

    def scan(
        self, start: K | None = None, stop: K | None = None, *, prefix: Any = None, reverse: bool = False
    ) -> Iterator[tuple[K, V]]:
        """Iterate over a range in key order.

        Args:
            start: First key, inclusive; None for the beginning.
            stop: End, exclusive; None for the end.
            prefix: Only keys that begin with it: part of a str or bytes key, the first elements of a tuple. Not
                together with `start` and `stop`.
            reverse: From the end to the start.

        Returns:
            Keys and values as they are at the time of the call; of a `Table` that is read elsewhere than in a turn,
            partition after partition.

        Raises:
            ConfigurationError: Both a prefix and a bound are given.
            ProductionError: A bound is not of the key's type.
            NotHeld: The app does not run in this process.
        """
        low, high = self.span_of(start, stop, prefix, "scan")
        return self.between(low, high, reverse=reverse)

    def span_of(self, start: K | None, stop: K | None, prefix: Any, method: str) -> ByteRange:
        """The range of stored keys that is asked for; see `scan`.

        Args:
            start: See `scan`.
            stop: See `scan`.
            prefix: See `scan`.
            method: What was called, for the error.
        """
        order = self.keys_in_order
        if prefix is None:
            return order.range(start, stop)
        if start is None and stop is None:
            return order.prefix(prefix)
        raise ConfigurationError(f"{self.kind} {self.name!r}: {method}() takes prefix=, or start and stop, not both")


class _Items(ItemsView[K, V]):
    _mapping: OrderedMapping[K, V]

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        value = self._mapping.found(item[0])  # never the table's default
        return value is not MISSING and bool(value == item[1])

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._mapping.scan()


class _Values(ValuesView[V]):
    _mapping: OrderedMapping[Any, V]

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping.scan())
