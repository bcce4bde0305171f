"""Keys of a table as text: what a command line or a web address gives."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import msgspec

from streamflow.errors import ConfigurationError, RecordError
from streamflow.model.serde import BoundCodec
from streamflow.model.text import bytes_of, reader_of
from streamflow.processing.ordered_mapping import OrderedMapping
from streamflow.state.keys import ByteRange


def range_of(
    table: OrderedMapping[Any, Any],
    codec: BoundCodec[Any],
    *,
    prefix: str | None,
    start: str | None,
    stop: str | None,
    words: tuple[str, str, str] = ("--prefix", "--start", "--stop"),
) -> ByteRange | None:
    """The range of a table's stored keys that is asked for.

    Args:
        table: The table.
        codec: Its keys.
        prefix: What its keys begin with; not together with the bounds.
        start: First key, inclusive.
        stop: End, exclusive.
        words: What the three are called where they are given, for errors.

    Returns:
        The range; None where nothing was given, which is all of it.

    Raises:
        ConfigurationError: One of them does not fit the table's keys.
    """
    if prefix is None and start is None and stop is None:
        return None
    read_key = reader_of(codec, owner=f"{table.kind} {table.name!r}")
    try:
        if prefix is None:
            keys = [None if text is None else read_key(text) for text in (start, stop)]
            return table.keys_in_order.range(*keys)
        if start is not None or stop is not None:
            raise ConfigurationError(f"give {words[0]}, or {words[1]} and {words[2]}")
        return table.keys_in_order.prefix(_prefix_of(table, codec, prefix, words[0]))
    except RecordError as exc:
        raise ConfigurationError(exc.message) from exc


def _prefix_of(table: OrderedMapping[Any, Any], codec: BoundCodec[Any], text: str, word: str) -> Any:
    """Part of a key: text as it stands for str and bytes, JSON for the rest."""
    serializer, form = codec.serializer, codec.type
    if serializer == "str":
        return text
    if serializer == "raw":
        return bytes_of(text)
    try:
        found = msgspec.json.decode(text)
        if not isinstance(found, list) or get_origin(form) is not tuple:
            return found
        return _elements(form, found)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise ConfigurationError(
            f"{word} {text!r} does not fit keys of {table.kind} {table.name!r}: {exc}; it is read as JSON, a list for "
            "the first elements of a tuple"
        ) from exc


def _elements(form: Any, found: list[Any]) -> tuple[Any, ...]:
    types = get_args(form)
    if len(types) == 2 and types[1] is ...:
        types = types[:1] * len(found)
    if len(found) > len(types):
        raise msgspec.ValidationError(f"it has {len(found)} elements, and a key has {len(types)}")
    return tuple(msgspec.convert(each, type_, strict=False) for each, type_ in zip(found, types, strict=False))
