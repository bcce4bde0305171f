"""Between keys and values and text: of a command line, or of an address on the web."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, get_args, get_origin

import msgspec

from streamflow.errors import ConfigurationError, RecordError
from streamflow.model.record import Headers
from streamflow.model.schema import type_name
from streamflow.model.serde import BoundCodec


def reader_of(codec: BoundCodec[Any], *, owner: str | None = None) -> Callable[[str], Any]:
    """How a topic's key or value is read from text: strings and bytes as they stand, numbers, and JSON for the rest.

    Args:
        codec: The topic's.
        owner: What it is of, for errors; None is the topic.

    Returns:
        A function from text to a checked value; it raises `ConfigurationError`, which names the field path.
    """
    read = _READERS.get(codec.serializer) or _json_reader(codec.type)
    of = owner or f"topic {codec.topic!r}"

    def value_of(text: str) -> Any:
        try:
            value = read(text)
            # What is read back must be of the type, limits (msgspec.Meta) included; encoding alone does not check them.
            data = codec.encode(value)
            return value if data is None else codec.decode(data)
        except RecordError as exc:
            raise ConfigurationError(exc.message) from exc
        except (msgspec.DecodeError, ValueError) as exc:
            what = f"{exc}; it is {_shortened(text)}{_hint(codec, text)}"
            raise ConfigurationError(f"the {codec.part} for {of} does not fit: {what}") from exc

    return value_of


def _json_reader(form: Any) -> Callable[[str], Any]:
    try:
        return msgspec.json.Decoder(form).decode
    except TypeError:  # a type that only the user's own serializer knows
        return msgspec.json.Decoder(Any).decode


def bytes_of(text: str) -> bytes:
    """The bytes that a text was, also where they were no UTF-8 (as Python reads arguments of a command)."""
    return text.encode(errors="surrogateescape")


_READERS: dict[str, Callable[[str], Any]] = {"str": str, "raw": bytes_of, "int": int, "float": float}


def _hint(codec: BoundCodec[Any], text: str) -> str:
    if codec.serializer in _READERS:
        return ""
    if get_origin(codec.type) is tuple:
        return f"; {type_name(codec.type)} is read as a JSON list{_like(get_args(codec.type))}"
    if text.lstrip()[:1] in {"{", "[", '"'}:
        return ""
    return "; it is read as JSON, so text stands in quotes: '\"like this\"'"


_EXAMPLES = {str: '"like this"', int: "1", float: "1.5", bool: "true"}


def _like(types: tuple[Any, ...]) -> str:
    """How long the list of a tuple is, with an example where its types are plain."""
    if Ellipsis in types:
        return ""
    known = [_EXAMPLES[each] for each in types if each in _EXAMPLES]
    example = f", such as '[{', '.join(known)}]'" if len(known) == len(types) else ""
    return f" of {len(types)}{example}"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


async def shown(codec: BoundCodec[Any] | None, data: bytes | None, headers: Headers) -> Any:
    """A key or value of a record as JSON has it.

    Args:
        codec: The topic's; None where the topic is not declared: then bytes.
        data: As stored.
        headers: The record's.

    Raises:
        DeserializationError: It does not decode.
    """
    if data is None:
        return None
    if codec is None:
        return plain(data)
    return plain(await codec.decode_loading(data, headers))


def plain(value: Any) -> Any:
    """A value in JSON's own types; bytes as text where they are UTF-8, else `{"base64": ...}`.

    Args:
        value: Any value.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(data).decode()}
    return msgspec.to_builtins(value, enc_hook=str, str_keys=True)
