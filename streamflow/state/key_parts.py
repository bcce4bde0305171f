"""Order-preserving bytes of values that can stand one after the other: what the keys of `state/keys.py` consist of.

Each part ends by itself (a fixed size, or an end mark), so that a tuple needs no lengths in between: the bytes are in
the order of the tuples, and those of the first elements are a prefix of the whole. The layout follows FoundationDB's
tuple layer, with the types known beforehand instead of written as codes.
"""

from __future__ import annotations

import datetime
import enum
import math
import struct
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import inspect as info

_U64 = struct.Struct(">Q")
_U32 = struct.Struct(">I")
_DOUBLE = struct.Struct(">d")
_SIGN = 1 << 63
_ALL = (1 << 64) - 1
_END = b"\0\0"
_EPOCH = datetime.datetime(1970, 1, 1)  # noqa: DTZ001 - the scale of naive times
_EPOCH_UTC = _EPOCH.replace(tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_FIRST_US = (datetime.datetime.min - _EPOCH) // _MICROSECOND  # noqa: DTZ901 - the scale of naive times
_LAST_US = (datetime.datetime.max - _EPOCH) // _MICROSECOND  # noqa: DTZ901


class KeyPart(ABC):
    """How the values of one type are written; a wrong value raises `TypeError`, `ValueError` or `OverflowError`."""

    name: str

    @abstractmethod
    def write(self, value: Any, out: bytearray) -> None:
        """Append a value's bytes."""

    @abstractmethod
    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        """Read the value that begins there.

        Returns:
            It, and where it ends.

        Raises:
            ValueError, struct.error, IndexError: The bytes are something else.
        """


class IntPart(KeyPart):
    """A whole number of 64 bits: big-endian, sign flipped."""

    name = "int"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError("it is no int")
        if not -_SIGN <= value < _SIGN:
            raise OverflowError("it does not fit into 64 bits; a str key has no such limit")
        out += _U64.pack(value + _SIGN)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        return _U64.unpack_from(data, at)[0] - _SIGN, at + 8


class FloatPart(KeyPart):
    """A double: IEEE bits, all flipped when it is negative, else the sign; NaN has no place in any order."""

    name = "float"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, float | int) or isinstance(value, bool):
            raise TypeError("it is no float")
        number = float(value)
        if number != value and not math.isnan(number):
            raise ValueError("no float is exactly that number, so it would share its key with another one")
        if math.isnan(number):
            raise ValueError("NaN is not equal to itself, so no key could be found again")
        (bits,) = _U64.unpack(_DOUBLE.pack(number + 0.0))  # -0.0 becomes 0.0, which it equals
        out += _U64.pack(bits ^ (_ALL if bits & _SIGN else _SIGN))

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        (bits,) = _U64.unpack_from(data, at)
        return _DOUBLE.unpack(_U64.pack(bits ^ (_SIGN if bits & _SIGN else _ALL)))[0], at + 8


class BoolPart(KeyPart):
    """False before True."""

    name = "bool"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, bool):
            raise TypeError("it is no bool")
        out.append(value)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        if data[at] > 1:
            raise ValueError(f"{data[at]} is no bool")
        return bool(data[at]), at + 1


class BytesPart(KeyPart):
    """Bytes up to 00 00; a zero inside is 00 01."""

    name = "bytes"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError("it is no bytes")
        out += bytes(value).replace(b"\0", b"\0\1")
        out += _END

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        end = data.index(b"\0", at)
        while data[end : end + 2] != _END:
            end = data.index(b"\0", end + 1)
        return data[at:end].replace(b"\0\1", b"\0"), end + 2


class StrPart(BytesPart):
    """UTF-8, whose order is that of code points."""

    name = "str"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, str):
            raise TypeError("it is no str")
        super().write(value.encode(), out)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        value, end = super().read(data, at)
        return value.decode(), end


class UuidPart(KeyPart):
    """Its 16 bytes."""

    name = "uuid"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, uuid.UUID):
            raise TypeError("it is no UUID")
        out += value.bytes

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        return uuid.UUID(bytes=data[at : at + 16]), at + 16


class DatePart(KeyPart):
    """Days since the first of the first year."""

    name = "date"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, datetime.date) or isinstance(value, datetime.datetime):
            raise TypeError("it is no date")
        out += _U32.pack(value.toordinal())

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        return datetime.date.fromordinal(_U32.unpack_from(data, at)[0]), at + 4


class DatetimePart(KeyPart):
    """Microseconds since 1970: times without a zone (00), then instants (01), which read back in UTC."""

    name = "datetime"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, datetime.datetime):
            raise TypeError("it is no datetime")
        zone = value.tzinfo
        aware = zone is not None and value.utcoffset() is not None
        if zone is not None and aware and zone is not datetime.UTC and zone.utcoffset(None) is None:
            # Python counts both hours of a turned back clock as equal, and neither as the same time in another zone.
            raise ValueError(
                "its zone has no fixed offset, so equal times are not always the same moment: write "
                "key.astimezone(datetime.UTC)"
            )
        since = value - _EPOCH_UTC if aware else value.replace(tzinfo=None) - _EPOCH
        micros = since // _MICROSECOND
        if not _FIRST_US <= micros <= _LAST_US:
            raise OverflowError("in UTC it is outside of the years 1 to 9999")
        out.append(aware)
        out += _U64.pack(micros + _SIGN)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        start = _EPOCH_UTC if data[at] else _EPOCH
        return start + (_U64.unpack_from(data, at + 1)[0] - _SIGN) * _MICROSECOND, at + 9


class EnumPart(KeyPart):
    """A member stands where its value stands."""

    def __init__(self, kind: type[enum.Enum], values: KeyPart) -> None:
        self._kind = kind
        self._values = values
        self.name = f"enum({values.name})"

    def write(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, self._kind):
            raise TypeError(f"it is no {self._kind.__name__}")
        self._values.write(value.value, out)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        value, end = self._values.read(data, at)
        return self._kind(value), end


class OptionalPart(KeyPart):
    """None (00) before everything else (01)."""

    def __init__(self, inner: KeyPart) -> None:
        self._inner = inner
        self.name = f"optional({inner.name})"

    def write(self, value: Any, out: bytearray) -> None:
        if value is None:
            out.append(0)
        else:
            out.append(1)
            self._inner.write(value, out)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        if data[at] > 1:
            raise ValueError(f"{data[at]} stands where 0 or 1 should")
        return self._inner.read(data, at + 1) if data[at] else (None, at + 1)


class TuplePart(KeyPart):
    """Elements of given types, one after the other."""

    def __init__(self, elements: Sequence[KeyPart], make: Callable[[list[Any]], Any] = tuple) -> None:
        self._elements = tuple(elements)
        self._make = make
        self.name = f"tuple({','.join(element.name for element in elements)})"

    def write(self, value: Any, out: bytearray) -> None:
        self.write_first(value, out)
        if len(value) < len(self._elements):
            raise ValueError(f"it has {len(value)} elements of {len(self._elements)}")

    def write_first(self, value: Any, out: bytearray) -> None:
        """Append the bytes of the first elements, as many as are given."""
        if not isinstance(value, tuple):
            raise TypeError("it is no tuple")
        if len(value) > len(self._elements):
            raise ValueError(f"it has {len(value)} elements of {len(self._elements)}")
        for element, one in zip(self._elements, value, strict=False):
            element.write(one, out)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        values: list[Any] = []
        for element in self._elements:
            value, at = element.read(data, at)
            values.append(value)
        return self._make(values), at


class VarTuplePart(KeyPart):
    """Any number of elements of one type, each after 01; 00 ends them."""

    def __init__(self, element: KeyPart) -> None:
        self._element = element
        self.name = f"tuple({element.name},...)"

    def write(self, value: Any, out: bytearray) -> None:
        self.write_first(value, out)
        out.append(0)

    def write_first(self, value: Any, out: bytearray) -> None:
        """Append the bytes of the first elements, without an end."""
        if not isinstance(value, tuple):
            raise TypeError("it is no tuple")
        for one in value:
            out.append(1)
            self._element.write(one, out)

    def read(self, data: bytes, at: int) -> tuple[Any, int]:
        values: list[Any] = []
        while data[at] == 1:
            value, at = self._element.read(data, at + 1)
            values.append(value)
        if data[at]:
            raise ValueError(f"{data[at]} stands where 0 or 1 should")
        return tuple(values), at + 1


_PLAIN: dict[type[info.Type], KeyPart] = {
    info.IntType: IntPart(),
    info.FloatType: FloatPart(),
    info.BoolType: BoolPart(),
    info.StrType: StrPart(),
    info.BytesType: BytesPart(),
    info.UUIDType: UuidPart(),
    info.DateType: DatePart(),
    info.DateTimeType: DatetimePart(),
}


def key_part(form: Any) -> KeyPart | None:
    """The part for a type, None where it has no order of its own.

    Args:
        form: A type form that msgspec knows.
    """
    return _part(info.type_info(form))


def _part(known: info.Type) -> KeyPart | None:
    while isinstance(known, info.Metadata):
        known = known.type
    if isinstance(known, info.UnionType):
        others = [one for one in known.types if not isinstance(one, info.NoneType)]
        inner = _part(others[0]) if len(others) == 1 and len(others) < len(known.types) else None
        return None if inner is None else OptionalPart(inner)
    if isinstance(known, info.EnumType):
        return _enum_part(known.cls)
    if isinstance(known, info.VarTupleType):
        element = _part(known.item_type)
        return None if element is None else VarTuplePart(element)
    if isinstance(known, info.TupleType):
        return _tuple_part(known.item_types, tuple)
    if isinstance(known, info.NamedTupleType):
        kind = known.cls
        return _tuple_part([field.type for field in known.fields], lambda values: kind(*values))
    return _PLAIN.get(type(known))


def _enum_part(kind: type[enum.Enum]) -> KeyPart:
    # msgspec takes enumerations of str or of int only, never of both.
    return EnumPart(kind, StrPart() if all(isinstance(member.value, str) for member in kind) else IntPart())


def _tuple_part(types: Sequence[info.Type], make: Callable[[list[Any]], Any]) -> KeyPart | None:
    elements = [part for one in types if (part := _part(one)) is not None]
    return TuplePart(elements, make) if elements and len(elements) == len(types) else None
