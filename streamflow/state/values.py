"""How a table holds its values in memory and writes them: as objects where nobody can change them, else as bytes.

A struct, list or dict that user code reads and changes in place would change what other records see, commit or no
commit. So values of types that can be changed in place are held as bytes: a turn gets a copy of its own, and what it
did to the copy is compared when the turn is done (`state/stage.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from streamflow.errors import DeserializationError, ProductionError, StateError
from streamflow.model.schema import has_odd_float, holds_sets, is_immutable, takes_null_for_float
from streamflow.model.serde import BoundCodec, NeedSchema

V = TypeVar("V")

_IN_ORDER = msgspec.msgpack.Encoder(order="deterministic").encode

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
"""Stands for the value of a key that is not there."""

# Of these only the class has to be right, which encoding checks; what stands inside others shows when it is read back.
_SHALLOW = (int, float, bool, str, bytes)

# Encoding these never fails, so a write of one is not tried out.
_ALWAYS_WRITABLE = (float, bool)


class Values:
    """The values of one table.

    Args:
        table: The table's name, for errors.
        codec: Writes and reads them as the changelog has them.
        max_bytes: Largest encoded value that the changelog takes.

    Attributes:
        are_objects: Whether values are held as objects; False holds bytes.
        sure_type: Values of exactly this type are held as they are, unchecked.
        payload: Gives what is held as the changelog has it.
    """

    __slots__ = (
        "_codec",
        "_decode",
        "_has_sets",
        "_is_deep",
        "_max_bytes",
        "_table",
        "_takes_null_for_float",
        "are_objects",
        "payload",
        "sure_type",
    )

    def __init__(self, table: str, codec: BoundCodec[Any], max_bytes: int = 1_000_000) -> None:
        self._table = table
        self._codec = codec
        self._max_bytes = max_bytes
        self.are_objects = is_immutable(codec.type) and codec.fast_decode is not None
        self._decode: Callable[[bytes], Any] = codec.fast_decode or self._decode_with_headers
        self._is_deep = codec.type not in _SHALLOW or codec.load_schema is not None
        self._takes_null_for_float = codec.serializer == "json" and takes_null_for_float(codec.type)
        self._has_sets = holds_sets(codec.type)
        exact = codec.exact_type if self.are_objects else None
        self.sure_type: type | None = exact if exact in _ALWAYS_WRITABLE else None
        encode = codec.fast_encode if self.sure_type is not None else codec.encode
        self.payload: Callable[[Any], bytes] = cast("Callable[[Any], bytes]", encode) if self.are_objects else _as_it_is

    def held(self, value: Any) -> Any:
        """What is held of a value that is written.

        Raises:
            ProductionError: It is not of the table's type, cannot be written, or is None.
        """
        data = self._encoded(value)
        if self._is_deep:
            read = self._read_back(data, value)
            # Never the object itself: what it was made of may be of other types, and be changed yet.
            return read if self.are_objects else data
        if not self.are_objects:
            return data
        exact = self._codec.exact_type
        return value if exact is None or type(value) is exact else self._codec.decode(data, ())

    def encoded(self, value: Any) -> bytes:
        """A value as the changelog has it, from which it surely can be read again.

        Raises:
            ProductionError: See `held`.
        """
        return self._readable(self._encoded(value), value)

    def _readable(self, data: bytes, value: Any) -> bytes:
        if self._is_deep:
            self._read_back(data, value)
        return data

    def _read_back(self, data: bytes, value: Any) -> Any:
        """A value as it will be read, where that is the value that was written."""
        if self._takes_null_for_float and b"null" in data and has_odd_float(value):
            raise ProductionError(
                f"table {self._table!r}: JSON has no infinity and no NaN, and would read one back as None: leave the "
                'field None, or give the table value_serializer="msgpack"'
            )
        try:
            return self._decode(data)
        except NeedSchema as need:
            raise ProductionError(
                f"table {self._table!r}: its serializer wrote a value with schema {need.id}, which it cannot read "
                "back before that is loaded. A table is read without waiting, so what `encode` writes `decode` has "
                "to know"
            ) from need
        except Exception as exc:
            raise ProductionError(
                f"table {self._table!r}: a value is not of the table's type: {self._explained(data, exc)}"
            ) from exc

    def _decode_with_headers(self, data: bytes) -> Any:
        return self._codec.decode(data, ())

    def _explained(self, data: bytes, error: Exception) -> str:
        """What is wrong with bytes that do not decode, in the serializer's words."""
        try:
            self._codec.decode(data, ())
        except DeserializationError as explained:
            return explained.message
        except Exception as other:
            return str(other)
        return str(error)

    def _encoded(self, value: Any) -> bytes:
        try:
            data = self._codec.encode(value, ())
        except ProductionError as exc:
            raise ProductionError(f"table {self._table!r}: {exc.message}") from exc
        if data is None:
            raise ProductionError(
                f"table {self._table!r}: None is how a log says that a key was deleted, so it cannot be a value; "
                "write `del table[key]`, or wrap it in a type of your own"
            )
        if len(data) > self._max_bytes:
            raise ProductionError(
                f"table {self._table!r}: a value of {len(data):,} bytes is too large for its changelog, which takes "
                f"{self._max_bytes:,}: keep less under one key, or raise the topic's max.message.bytes"
            )
        return data

    def changed(self, value: Any, before: bytes) -> bytes | None:
        """A copy as the changelog has it, where user code has changed it; None where it has not.

        Args:
            value: The copy.
            before: What it was made of, or last seen to be.

        Raises:
            ProductionError: See `held`.
        """
        data = self._encoded(value)
        if data == before or (self._has_sets and self._is_same(before, value)):
            return None
        return self._readable(data, value)

    def is_changed(self, value: Any, held: Any, key: Any) -> bool:
        """Whether user code has changed a copy, whatever its type makes of bytes that an older one wrote.

        Args:
            value: The copy.
            held: What it was made of.
            key: Its key, for errors.

        Raises:
            ProductionError: It cannot be written any more.
        """
        if self.are_objects:
            return False
        try:
            unchanged = self._encoded(self.value(held, key))
        except ProductionError:
            return False  # what cannot be written anew as it is may still be deleted
        return self.changed(value, unchanged) is not None

    def are_same(self, one: Any, other: Any) -> bool:
        """Whether what is held is the same, `MISSING` included; == passes over what a class leaves out.

        Args:
            one: What is held.
            other: What is held, too.
        """
        if one is other or one is MISSING or other is MISSING:
            return one is other
        data = self.payload(one)
        return data == self.payload(other) or (self._has_sets and self._is_same(data, self.value(other, None)))

    def _is_same(self, before: bytes, value: Any) -> bool:
        """Whether a value is what it was, in whatever order its sets are; == passes over what a class leaves out."""
        try:
            return _IN_ORDER(self._decode(before)) == _IN_ORDER(value)
        except (TypeError, ValueError, OverflowError):
            return False  # a serializer of the user's writes what msgspec does not

    def value(self, held: Any, key: Any) -> Any:
        """What user code gets of what is held: a copy of its own where it could be changed.

        Args:
            held: What is held.
            key: Its key, for errors.

        Raises:
            StateError: It was written under another type.
        """
        return held if self.are_objects else self.decoded(held, key)

    def from_payload(self, data: bytes, key: Any) -> Any:
        """What is held of a value as the changelog has it; arguments and errors as `value`."""
        return self.decoded(data, key) if self.are_objects else data

    def decoded(self, data: bytes, key: Any) -> Any:
        """A value as the changelog has it; arguments and errors as `value`."""
        try:
            return self._decode(data)
        except NeedSchema as need:
            raise StateError(
                f"table {self._table!r}: the stored value of the key {key!r} needs schema {need.id}, which its "
                "serializer has not got. A table is read without waiting: schemas are loaded while it is opened, by "
                "the codec's `async def load_schema(id)`, and the codec has to keep them"
            ) from need
        except Exception as exc:
            raise StateError(
                f"table {self._table!r}: the stored value of the key {key!r} does not decode as its type of today: "
                f"{self._explained(data, exc)}. Give the type back what old values need (defaults for new fields), or "
                "migrate them with app.visit(...) under the old type first"
            ) from exc


def named(error: ProductionError, key: Any) -> ProductionError:
    """An error of a value, with the key that it was to stand under."""
    return ProductionError(f"{error.message}; its key is {key!r}")


def _as_it_is(held: bytes) -> bytes:
    return held
