"""Keys in a store: bytes whose order is the order of the keys, so that ranges and prefixes are ranges of bytes.

The log's bytes of a key (its serializer's) decide its partition and cannot be ordered for every type, so a store has an
encoding of its own. Where both are the same, one encoding serves for both (`same_as_serialized`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from streamflow.errors import ProductionError, RecordError, SchemaError, StateCorruptedError
from streamflow.model.schema import equal_in_several_writings, type_name
from streamflow.model.serde import BoundCodec, NeedSchema, excerpt
from streamflow.state.key_parts import IntPart, KeyPart, TuplePart, VarTuplePart, key_part

ByteRange = tuple[bytes, bytes | None]
"""Start inclusive, stop exclusive; None is the end of the table."""


class KeyOrder(ABC):
    """The store's encoding of one table's keys.

    Args:
        codec: The keys as the changelog has them.
        table: The table's name, for messages.

    Attributes:
        name: What it is called in a store's identity: another name means that stored keys cannot be read.
        same_as_serialized: Whether `encode` gives exactly what the key serializer gives.
        sure_type: Keys of exactly this type that are equal are written alike; None where there is no such type.
        is_canonical: Whether equal keys are alike to the key serializer, too; else the changelog has the key as
            `decode` gives it back.
        equal_is_same: Whether all keys that are equal in Python are written alike, whatever their type.
    """

    name: str
    same_as_serialized = False
    sure_type: type | None = None
    equal_is_same = False
    is_canonical = True

    def __init__(self, codec: BoundCodec[Any], table: str) -> None:
        self._codec = codec
        self._table = table

    def __repr__(self) -> str:
        return f"<order {self.name} of the keys of table {self._table!r}>"

    @abstractmethod
    def encode(self, key: Any) -> bytes:
        """Write a key.

        Raises:
            ProductionError: It is not of the declared type or has no place in the order.
        """

    def check(self, key: Any) -> None:
        """Check a key that is to be written.

        Raises:
            ProductionError: See `encode`; or it would read back as another one.
        """
        self.encode(key)

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """Read what `encode` made.

        Raises:
            StateCorruptedError: The bytes are something else.
        """

    def prefix(self, key_prefix: Any) -> ByteRange:
        """The range of all keys that begin with a prefix: a `str`, `bytes`, or the first elements of a tuple.

        Raises:
            ProductionError: The prefix is not of the key's type, or keys of this type have no prefixes.
        """
        raise ProductionError(
            f"table {self._table!r}: keys of type {type_name(self._codec.type)} have no prefixes; "
            "str, bytes and tuple keys have"
        )

    def range(self, start: Any = None, stop: Any = None) -> ByteRange:
        """The range of all keys from `start`, inclusive, to `stop`, exclusive; None means the end on that side.

        Raises:
            ProductionError: One of them is not of the key's type.
        """
        return b"" if start is None else self._bound(start), None if stop is None else self._bound(stop)

    def _bound(self, key: Any) -> bytes:
        return self.encode(key)

    def _refused(self, key: Any, exc: Exception) -> ProductionError:
        try:
            shown = repr(key)
        except Exception:
            shown = "?"  # the user's __repr__ must not hide what went wrong
        return ProductionError(
            f"table {self._table!r} takes keys of type {type_name(self._codec.type)}, not {type_name(type(key))} "
            f"{shown if len(shown) <= 60 else shown[:57] + '...'}: {exc}"
        )

    def _damaged(self, data: bytes, exc: Exception) -> StateCorruptedError:
        return StateCorruptedError(
            f"table {self._table!r}: a stored key does not decode as {type_name(self._codec.type)} ({exc}); "
            f"{excerpt(data)}"
        )


class OwnBytesOrder(KeyOrder):
    """Keys that are written as nothing but their own bytes, so that the beginning of a key is that of what it becomes.

    Attributes:
        written_alike_by: The key serializer that gives the same.
    """

    equal_is_same = True
    written_alike_by: str

    def __init__(self, codec: BoundCodec[Any], table: str) -> None:
        super().__init__(codec, table)
        self.same_as_serialized = codec.serializer == self.written_alike_by

    def prefix(self, key_prefix: Any) -> ByteRange:
        start = self.encode(key_prefix)
        return start, after_prefix(start)


class StrOrder(OwnBytesOrder):
    """UTF-8, in the order of code points."""

    name = "str"
    sure_type = str
    written_alike_by = "str"

    def encode(self, key: Any) -> bytes:
        try:
            return str.encode(key)
        except (TypeError, ValueError) as exc:
            raise self._refused(key, exc) from exc

    def decode(self, data: bytes) -> Any:
        try:
            return data.decode()
        except ValueError as exc:
            raise self._damaged(data, exc) from exc


class BytesOrder(OwnBytesOrder):
    """The bytes themselves."""

    name = "bytes"
    sure_type = bytes
    written_alike_by = "raw"

    def encode(self, key: Any) -> bytes:
        if not isinstance(key, bytes | bytearray | memoryview):
            raise self._refused(key, TypeError("it is no bytes"))
        return bytes(key)

    def decode(self, data: bytes) -> Any:
        return data


class PartOrder(KeyOrder):
    """Numbers, times, ids, enumerations, optional ones and tuples of all of them: as `state/key_parts.py` says.

    A `float` key counts 0.0 and -0.0 as one; a `datetime` with a zone reads back in UTC; both are equal to what was
    written.
    """

    def __init__(self, codec: BoundCodec[Any], table: str, part: KeyPart) -> None:
        super().__init__(codec, table)
        self.name = part.name
        self._part = part
        self.sure_type = int if type(part) is IntPart else None
        self.is_canonical = "float" not in part.name and "datetime" not in part.name

    def encode(self, key: Any) -> bytes:
        out = bytearray()
        try:
            self._part.write(key, out)
        except (TypeError, ValueError, OverflowError) as exc:
            raise self._refused(key, exc) from exc
        return bytes(out)

    def decode(self, data: bytes) -> Any:
        try:
            value, end = self._part.read(data, 0)
        except Exception as exc:
            raise self._damaged(data, exc) from exc
        if end != len(data):
            raise self._damaged(data, ValueError(f"it ends after {end} bytes"))
        return value

    def prefix(self, key_prefix: Any) -> ByteRange:
        if not isinstance(self._part, TuplePart | VarTuplePart):
            return super().prefix(key_prefix)
        start = self._bound(key_prefix)
        return start, after_prefix(start)

    def _bound(self, key: Any) -> bytes:
        """A tuple with fewer elements comes before all that begin with it, as in Python."""
        if not isinstance(self._part, TuplePart | VarTuplePart):
            return self.encode(key)
        out = bytearray()
        try:
            self._part.write_first(key, out)
        except (TypeError, ValueError, OverflowError) as exc:
            raise self._refused(key, exc) from exc
        return bytes(out)


class SerializedOrder(KeyOrder):
    """Keys of any other type: what the key serializer writes, in the order of those bytes, whatever that means.

    For structs, dictionaries and unions that is deterministic JSON: iteration has a fixed order, and a range means what
    the JSON's bytes say.
    """

    same_as_serialized = True

    def __init__(self, codec: BoundCodec[Any], table: str) -> None:
        super().__init__(codec, table)
        self.name = f"serialized({codec.serializer})"

    def encode(self, key: Any) -> bytes:
        data = self._codec.encode(key)
        if data is None:
            raise self._refused(key, TypeError("null is no key"))
        return data

    def check(self, key: Any) -> None:
        """See `KeyOrder.check`: a struct is made of anything, and only reading it back shows what it is."""
        data = self.encode(key)
        try:
            read = self._codec.decode(data)
        except NeedSchema:
            return
        except RecordError as exc:
            raise self._refused(key, ValueError(f"it could not be read back ({exc.message})")) from exc
        if read != key or self._codec.encode(read) != data:
            raise self._refused(key, ValueError(f"it would read back as {read!r}, which is another key"))

    def decode(self, data: bytes) -> Any:
        try:
            return self._codec.decode(data)
        except RecordError as exc:
            raise self._damaged(data, exc) from exc


def key_order(codec: BoundCodec[Any], *, table: str) -> KeyOrder:
    """The order of a table's keys, by their type.

    Args:
        codec: The table's keys, bound to its changelog.
        table: The table's name, for messages.

    Raises:
        SchemaError: Equal keys of that type can have different bytes.
    """
    part = key_part(codec.type)
    if part is None:
        if codec.serializer in ("json", "msgpack") and (kind := equal_in_several_writings(codec.type)):
            raise SchemaError(
                f"table {table!r}: keys of type {type_name(codec.type)} have {kind} in them, of which equal values can "
                "be written differently (1 and 1.0), so one key would be two. Use str, int, float, datetime or a "
                "tuple of them as the key, or write that part as text"
            )
        return SerializedOrder(codec, table)
    if part.name == "str":
        return StrOrder(codec, table)
    if part.name == "bytes":
        return BytesOrder(codec, table)
    return PartOrder(codec, table, part)


def after_prefix(prefix: bytes) -> bytes | None:
    """The first bytes after all that begin with a prefix; None when nothing comes after them."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else None
