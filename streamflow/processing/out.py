"""`Out`: a yielded value with a key, a time, headers or a partition of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

from streamflow.model.record import Headers

V_co = TypeVar("V_co", covariant=True)


class _Inherited(Enum):
    INHERIT = "inherit"

    def __repr__(self) -> str:
        return self.name


Inherit: TypeAlias = Literal[_Inherited.INHERIT]
INHERIT: Final = _Inherited.INHERIT
"""Stands where nothing was given: the source record's key or timestamp is taken."""


@dataclass(frozen=True, slots=True)
class Out(Generic[V_co]):
    """A value for the sink that does not simply inherit the source record's key and time.

    Attributes:
        value: The value; None is a null value (a tombstone).
        key: Its key; omitted: the source record's; None: a null key.
        timestamp_ms: Milliseconds since the epoch, UTC; omitted: the source record's.
        headers: Record headers, besides those of tracing.
        partition: Where to; None lets the key decide.

    Example:
        ```
        yield sf.Out(Total(order.user, total), key=order.user)
        ```
    """

    value: V_co
    key: Any = INHERIT
    timestamp_ms: int | Inherit = INHERIT
    headers: Headers = ()
    partition: int | None = None
