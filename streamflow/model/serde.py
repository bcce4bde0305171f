"""Bytes to values and back: the built-in serializers, users' own, and what the runtime calls for every record.

A serializer is bound once per topic and part; what comes out is compiled, and the runtime calls its `fast_decode` and
`fast_encode` straight. Rules that hold for every serializer stand in `BoundCodec`: `None` is written as null, null is
read as `None` where the type allows it, errors name part, field path, what was expected and what was found.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec
from msgspec import inspect as info

from streamflow.errors import DeserializationError, ProductionError, SchemaError
from streamflow.model.record import Headers
from streamflow.model.schema import Shape, allows_none, shape_of, type_name

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")
Part: TypeAlias = Literal["key", "value"]

ENTRY_POINTS = "streamflow.serdes"
_EXCERPT_BYTES = 60
_LONG = struct.Struct(">q")
_DOUBLE = struct.Struct(">d")


class NeedSchema(Exception):
    """Raised by `Codec.decode` for a schema it has not got: `load_schema` is awaited, then `decode` is called again.

    Args:
        id: The schema's id, as the serializer knows it.
    """

    def __init__(self, id: int | str) -> None:
        super().__init__(f"schema {id} is needed")
        self.id = id


class Codec(Protocol[T]):
    """What a serializer is once it is bound to a topic: it writes and reads one part of its records.

    One that raises `NeedSchema` also has `async def load_schema(self, id)`, which makes that schema known for as long
    as the codec lives: it is awaited outside the record's turn, then `decode` is called again. For values of tables it
    is awaited while a partition is opened, and what `encode` writes `decode` has to know.

    `encode` and `decode` are called by several threads, also at once: stores are restored and written in threads beside
    the event loop. So they share nothing between calls that a call changes, as a buffer that is used again.
    """

    def encode(self, value: T, headers: Headers) -> bytes | None:
        """Write a value; it is never called with `None`, which is always written as null.

        Args:
            value: The value.
            headers: The record's headers.
        """

    def decode(self, data: bytes, headers: Headers) -> T:
        """Read a value; it is never called for null.

        Args:
            data: The bytes.
            headers: The record's headers.

        Raises:
            NeedSchema: A schema has to be fetched first.
        """
        ...


@runtime_checkable
class Serializer(Protocol):
    """A way to write values as bytes, given to a topic as `key_serializer=` or `value_serializer=`.

    Other distributions name theirs by an entry point in the group `streamflow.serdes`.
    """

    def bind(self, type: Any, *, topic: str, part: Part) -> Codec[Any]:
        """Compile it for a topic; called once.

        Args:
            type: The declared type, `Any` when none was declared.
            topic: The topic's name.
            part: `"key"` or `"value"`.

        Raises:
            SchemaError: It cannot handle the type.
        """
        ...


class BoundCodec(Generic[T]):
    """One part of one topic's records, ready to be read and written.

    Attributes:
        topic: The topic's name.
        part: `"key"` or `"value"`.
        type: The declared type.
        serializer: The serializer's name, for comparison and for people.
        allows_none: Whether null is a value of the type.
        fast_decode: Decodes bytes that are not null, with no other argument; raises whatever it raises, which `explain`
            translates. None where headers are needed: call `decode`.
        fast_encode: Encodes a value whose type is exactly `exact_type`. When it raises, call `encode` with the same
            value, which raises the error that explains it. None where headers are needed.
        exact_type: The type of which values may go to `fast_encode` unchecked; None where every value goes to `encode`.
        is_declared: Whether the type was given, and not left out.
    """

    __slots__ = (
        "_codec",
        "_encode",
        "_outer_types",
        "_refuses_bool",
        "allows_none",
        "exact_type",
        "fast_decode",
        "fast_encode",
        "is_declared",
        "part",
        "serializer",
        "topic",
        "type",
    )

    def __init__(self, form: Any, *, topic: str, part: Part, serializer: str) -> None:
        self.topic = topic
        self.part: Part = part
        self.type = form
        self.serializer = serializer
        self.allows_none = allows_none(form)
        self.is_declared = True
        self.fast_decode: Callable[[bytes], T] | None = None
        self.fast_encode: Callable[[Any], bytes] | None = None
        self.exact_type: type | None = None
        self._encode: Callable[[Any], bytes] | None = None
        self._outer_types: tuple[type, ...] | None = None
        self._refuses_bool = False
        self._codec: Codec[T] | None = None

    def __repr__(self) -> str:
        return f"<{self.serializer} codec of {self.part} of {self.topic!r}: {type_name(self.type)}>"

    @property
    def load_schema(self) -> Callable[[int | str], Awaitable[None]] | None:
        """What the user's codec loads a schema with that `NeedSchema` asked for; None where it has nothing."""
        return getattr(self._codec, "load_schema", None)

    def encode(self, value: T | None, headers: Headers = ()) -> bytes | None:
        """Write a value.

        Args:
            value: Of the declared type, outermost type checked; `None` gives null.
            headers: The record's headers.

        Raises:
            ProductionError: It is not of that type or cannot be written.
        """
        if value is None:
            return None
        if self._codec is not None:
            try:
                return self._codec.encode(value, headers)
            except (ProductionError, NeedSchema):
                raise
            except Exception as exc:
                raise self._not_encoded(value, exc) from exc
        outer = self._outer_types
        if outer is not None and (not isinstance(value, outer) or (self._refuses_bool and isinstance(value, bool))):
            left_out = "" if self.is_declared else f" ({self.part}_type= was left out)"
            raise ProductionError(f"{self._place} takes {type_name(self.type)}{left_out}, not {_shown(value)}")
        assert self._encode is not None
        try:
            return self._encode(value)
        except Exception as exc:
            raise self._not_encoded(value, exc) from exc

    def decode(self, data: bytes | None, headers: Headers = ()) -> T | None:
        """Read a value.

        Args:
            data: The bytes, None for null.
            headers: The record's headers.

        Raises:
            DeserializationError: They do not decode as the type.
            NeedSchema: Only from a serializer of the user's.
        """
        if data is None:
            if self.allows_none:
                return None
            raise DeserializationError(
                f"{self._place} is null, and its type is {type_name(self.type)}: to take nulls, declare "
                f"{self.part}_type={type_name(self.type)} | None"
            )
        try:
            if self.fast_decode is not None:
                return self.fast_decode(data)
            assert self._codec is not None
            return self._codec.decode(data, headers)
        except NeedSchema:
            raise
        except Exception as exc:
            raise self.explain(exc, data) from exc

    async def decode_loading(self, data: bytes | None, headers: Headers = ()) -> T | None:
        """Read a value, and load a schema that its codec has not got.

        Args:
            data: The bytes, None for null.
            headers: The record's headers.

        Raises:
            DeserializationError: They do not decode as the type, or the schema cannot be loaded.
        """
        try:
            try:
                return self.decode(data, headers)
            except NeedSchema as need:
                if self.load_schema is None:
                    raise DeserializationError(
                        f"{self._place} needs schema {need.id}, which its serializer cannot load: give the codec an "
                        "async method load_schema(id)"
                    ) from need
                await self.load_schema(need.id)
                return self.decode(data, headers)
        except DeserializationError:
            raise
        except Exception as exc:
            raise self.explain(exc, data or b"") from exc

    def explain(self, exc: Exception, data: bytes) -> DeserializationError:
        """Translate what `fast_decode` raised.

        Args:
            exc: The exception.
            data: What it could not decode; a short excerpt of it is shown.

        Returns:
            The error to raise, `from exc`; the caller adds the record's place with `at`.
        """
        if isinstance(exc, DeserializationError):
            return exc
        what, _, path = str(exc).partition(" - at ")
        if isinstance(exc, struct.error):
            what = f"expected 8 bytes (big-endian, as Kafka's {_KAFKA_NAMES[self.serializer]}), got {len(data)}"
        elif isinstance(exc, UnicodeDecodeError):
            what = f"expected UTF-8, got byte 0x{data[exc.start]:02x} at position {exc.start}"
        elif isinstance(exc, msgspec.ValidationError):
            what = f"{what[:1].lower()}{what[1:]} at {path or '`$`'}"
        elif not isinstance(exc, msgspec.DecodeError):
            what = f"{type(exc).__name__}: {exc}"
        return DeserializationError(
            f"{self._place} does not decode as {type_name(self.type)} ({self.serializer}): {what}; {excerpt(data)}"
        )

    @property
    def _place(self) -> str:
        return f"the {self.part} of topic {self.topic!r}"

    def _not_encoded(self, value: Any, exc: Exception) -> ProductionError:
        if isinstance(exc, struct.error):
            exc = OverflowError("it does not fit into 8 bytes")
        return ProductionError(
            f"{self._place} takes {type_name(self.type)} ({self.serializer}), and {_shown(value)} cannot be "
            f"written: {exc}"
        )


_KAFKA_NAMES = {"int": "Long", "float": "Double"}
_BY_TYPE: dict[type[info.Type], str] = {
    info.StrType: "str",
    info.BytesType: "raw",
    info.IntType: "int",
    info.FloatType: "float",
}
_TYPE_OF: dict[str, Any] = {"str": str, "raw": bytes, "int": int, "float": float, "json": Any, "msgpack": Any}
_NATIVE: dict[str, type[info.Type]] = {name: known for known, name in _BY_TYPE.items()}


def bind_codec(
    form: TypeForm[T] | None, serializer: str | Serializer | None = None, *, topic: str, part: Part
) -> BoundCodec[T]:
    """Compile a topic's key or value.

    Args:
        form: The declared type; None when it was left out: then it follows from a named serializer, else it is bytes
            (for a key: or null).
        serializer: `"json"`, `"msgpack"`, `"str"`, `"int"`, `"float"`, `"raw"`, the name of an entry point, an object
            with `bind`, or None: by type.
        topic: The topic's name.
        part: `"key"` or `"value"`.

    Raises:
        SchemaError: The type cannot be handled, the serializer is not known or does not fit the type.
    """
    bound: Any = form
    if bound is None:
        bound = _omitted_type(serializer, part)
    if serializer is None or (isinstance(serializer, str) and serializer in _TYPE_OF):
        built_in = _bind_built_in(bound, serializer, topic, part)
        built_in.is_declared = form is not None
        return built_in
    chosen = _load(serializer, topic, part) if isinstance(serializer, str) else serializer
    name = serializer if isinstance(serializer, str) else type(serializer).__name__
    if isinstance(chosen, type) or not isinstance(chosen, Serializer):
        raise SchemaError(
            f"topic {topic!r}: {part}_serializer={name} is not a serializer: give an object with "
            "`bind(type, *, topic, part)`, or the name of a built-in one: " + ", ".join(_TYPE_OF)
        )
    codec: BoundCodec[T] = BoundCodec(bound, topic=topic, part=part, serializer=name)
    codec._codec = chosen.bind(bound, topic=topic, part=part)
    return codec


def excerpt(data: bytes) -> str:
    """The first bytes of a record in printable form, with how many there are."""
    shown = repr(bytes(data[:_EXCERPT_BYTES]))
    if len(data) <= _EXCERPT_BYTES:
        return f"the {len(data)} bytes are {shown}"
    return f"the {len(data)} bytes begin with {shown}"


def _omitted_type(serializer: str | Serializer | None, part: Part) -> Any:
    if serializer is None:
        return bytes | None if part == "key" else bytes
    return _TYPE_OF.get(serializer, Any) if isinstance(serializer, str) else Any


def _bind_built_in(form: Any, serializer: str | None, topic: str, part: Part) -> BoundCodec[Any]:
    try:
        shape = shape_of(form)
    except SchemaError as exc:
        raise SchemaError(
            f"topic {topic!r}, {part}_type: {exc}; use a msgspec.Struct, a dataclass, a TypedDict or a built-in type, "
            f"or give {part}_serializer= an object with `bind(type, *, topic, part)`"
        ) from exc
    name = serializer or _BY_TYPE.get(type(shape.known), "json")
    codec: BoundCodec[Any] = BoundCodec(form, topic=topic, part=part, serializer=name)
    if name in _NATIVE:
        if type(shape.known) is not _NATIVE[name]:
            raise SchemaError(
                f"topic {topic!r}: {part}_serializer={name!r} writes {type_name(_TYPE_OF[name])}, and {part}_type is "
                f"{type_name(form)}: leave the serializer out, or name another: json, msgpack"
            )
        decode, encode = _native(name, shape)
    elif name == "json":
        decode = msgspec.json.Decoder(form).decode
        encode = msgspec.json.Encoder(order="deterministic" if part == "key" else None).encode
    else:
        decode = msgspec.msgpack.Decoder(form).decode
        encode = msgspec.msgpack.Encoder(order="deterministic" if part == "key" else None).encode
    codec.fast_decode, codec.fast_encode, codec._encode = decode, encode, encode
    codec.exact_type = shape.exact_type
    outer = codec._outer_types = shape.outer_types
    codec._refuses_bool = outer is not None and int in outer and bool not in outer
    return codec


def _native(name: str, shape: Shape) -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    """Decoder and encoder of the types that have bytes of their own."""
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    if name == "str":
        decode, encode = bytes.decode, str.encode
    elif name == "raw":
        decode, encode = bytes, bytes
    elif name == "int":
        decode, encode = _decode_long, _LONG.pack
    else:
        decode, encode = _decode_double, _DOUBLE.pack
    if any(getattr(shape.known, field) is not None for field in shape.known.__struct_fields__):
        plain, form = decode, shape.form
        # The type has limits (msgspec.Meta): what was read is held against them.
        return lambda data: msgspec.convert(plain(data), form), encode
    return decode, encode


def _decode_long(data: bytes) -> int:
    (value,) = _LONG.unpack(data)
    return int(value)


def _decode_double(data: bytes) -> float:
    (value,) = _DOUBLE.unpack(data)
    return float(value)


def _load(name: str, topic: str, part: Part) -> Any:
    from importlib.metadata import entry_points  # 13 ms that nearly no app needs

    found = entry_points(group=ENTRY_POINTS, name=name)
    if not found:
        others = sorted({one.name for one in entry_points(group=ENTRY_POINTS)})
        raise SchemaError(
            f"topic {topic!r}: {part}_serializer={name!r} is not known; there are "
            + ", ".join([*_TYPE_OF, *others])
            + f" (others come by entry points in the group {ENTRY_POINTS!r})"
        )
    loaded = next(iter(found)).load()
    return loaded() if isinstance(loaded, type) else loaded


def _shown(value: Any) -> str:
    """A value in an error: its type, and enough of it to find it."""
    try:
        shown = repr(value)
    except Exception:
        return type_name(type(value))  # the user's __repr__ must not hide what went wrong
    return f"{type_name(type(value))} {shown if len(shown) <= _EXCERPT_BYTES else shown[: _EXCERPT_BYTES - 3] + '...'}"
