"""`partition_by=`: which record of the source a table's key belongs to, where the record's key is a part of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from streamflow.errors import ConfigurationError, ProductionError
from streamflow.model.schema import type_name
from streamflow.model.serde import BoundCodec

_ADVICE = (
    "it takes a key of the table and returns the key of the record that it belongs to, as `lambda key: key[0]` does"
)


def checked_partition_by(function: Any, where: str) -> Callable[[Any], Any] | None:
    """Check what was declared.

    Args:
        function: What was given.
        where: Beginning of error messages.

    Raises:
        ConfigurationError: It is no function of one argument, or an async one.
    """
    if function is None:
        return None
    if not callable(function) or isinstance(function, type):
        raise ConfigurationError(f"{where}: partition_by={function!r} is no function: {_ADVICE}")
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"{where}: partition_by= is asked for the home of a key at once and cannot be async")
    try:
        inspect.signature(function).bind(None)
    except TypeError as exc:
        raise ConfigurationError(f"{where}: partition_by= does not take one argument ({exc}): {_ADVICE}") from exc
    except ValueError:
        pass  # a function written in C may not say what it takes
    return function  # type: ignore[no-any-return]


def record_key(function: Callable[[Any], Any], key: Any, sent_as: BoundCodec[Any], *, table: str) -> bytes:
    """The bytes of the record key that a table's key belongs to.

    Args:
        function: What `partition_by=` was given.
        key: The table's key.
        sent_as: The source's keys.
        table: The table's name, for errors.

    Raises:
        ProductionError: The function raised, or returned what is no key of the source.
    """
    try:
        made = function(key)
    except Exception as exc:
        raise ProductionError(
            f"table {table!r}: partition_by= raised {type(exc).__name__} for the key {key!r}: {exc}; {_ADVICE}"
        ) from exc
    why = "null keys have no partition of their own"
    try:
        data = sent_as.encode(made)
        if data is not None and sent_as.fast_decode is not None:
            sent_as.fast_decode(data)  # what stands inside of it fits, too
    except Exception as exc:
        data, why = None, str(exc)
    if data is None:
        raise ProductionError(
            f"table {table!r}: partition_by= gives {type_name(type(made))} {made!r} for the key {key!r}, and the keys "
            f"of topic {sent_as.topic!r}, which its agents read, are {type_name(sent_as.type)} ({why}); {_ADVICE}"
        )
    return data
