"""Keys and timestamps taken out of a value: by a field's name, by a struct's member, by a function."""

from __future__ import annotations

import datetime
import decimal
import inspect
import operator
import types
import typing
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import msgspec

from streamflow.errors import ConfigurationError, SchemaError
from streamflow.model.schema import field_type, is_mapping, type_name

Member: TypeAlias = (
    int | float | bytes | datetime.date | datetime.time | uuid.UUID | Enum | decimal.Decimal | msgspec.Struct | None
)
"""`Order.country`: at run time a descriptor, to type checkers a value of the field's type (a str is a name as well)."""

Field: TypeAlias = str | Callable[[Any], Any] | Member
"""What takes a part out of a value: a field's name, a function, or a struct's member."""


@dataclass(frozen=True, slots=True)
class Selector:
    """What takes a part out of a value.

    Attributes:
        read: The function.
        name: The field's or the function's name; empty for a lambda.
        form: Type of the part, or None where nothing says it.
    """

    read: Callable[[Any], Any]
    name: str
    form: Any


def selector(field: Any, value_type: Any, where: str) -> Selector:
    """Compile a field or a function.

    Args:
        field: See `Field`.
        value_type: Type of the values it is taken from.
        where: Beginning of error messages: the call as the user wrote it.

    Raises:
        ConfigurationError: It is neither.
        SchemaError: The type has no such field.
    """
    if isinstance(field, types.MemberDescriptorType):
        owner = field.__objclass__
        if not (isinstance(value_type, type) and issubclass(value_type, owner)):
            field_owner = f"{type_name(owner)}.{field.__name__}"
            raise SchemaError(f"{where}: {field_owner} is not a field of the topic's {type_name(value_type)}")
        field = field.__name__
    if isinstance(field, str):
        try:
            form = field_type(value_type, field)
        except SchemaError as exc:
            raise SchemaError(f"{where}: {exc}") from exc
        read = operator.itemgetter(field) if is_mapping(value_type) else operator.attrgetter(field)
        return Selector(read, field, None if form is Any else form)
    if not callable(field) or isinstance(field, type):
        raise ConfigurationError(
            f"{where}: give a field's name, a struct's member (Order.country) or a function of the value, not {field!r}"
        )
    if inspect.iscoroutinefunction(field):
        raise ConfigurationError(f"{where}: the function is called for every record and cannot be async")
    name = getattr(field, "__name__", "")
    return Selector(field, "" if name == "<lambda>" else name, _returned(field))


def timestamp_reader(field: Field, value_type: Any, where: str) -> Callable[[Any], int]:
    """Compile a topic's `timestamp=`: milliseconds since the epoch, UTC, out of a value.

    Args:
        field: A field or function that gives milliseconds as int or float, or a datetime (without a zone: UTC).
        value_type: Type of the values.
        where: Beginning of error messages.
    """
    read = selector(field, value_type, where).read

    def timestamp_ms(value: Any) -> int:
        moment = read(value)
        if isinstance(moment, datetime.datetime):
            aware = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
            return round(aware.timestamp() * 1000)
        return int(moment)

    return timestamp_ms


def _returned(function: Callable[..., Any]) -> Any:
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):
        return None
    form = hints.get("return")
    return None if form is Any else form
