"""Stored values: one byte that says what follows, then the value as the changelog has it.

Other numbers are reserved: windows will put theirs before the value, and what a newer version writes is recognised.
"""

from __future__ import annotations

import struct

from streamflow.errors import StateCorruptedError

FORMAT = 1
"""Number of this scheme, part of a table's identity."""

PLAIN = 1
"""The value."""

EXPIRING = 2
"""When it expires, then the value."""

_PLAIN = bytes([PLAIN])
_HEAD = struct.Struct(">Bq")


def pack(payload: bytes, expires_ms: int | None = None) -> bytes:
    """Make a stored value.

    Args:
        payload: The value's bytes.
        expires_ms: When it expires, milliseconds since the epoch; None for never.
    """
    return _PLAIN + payload if expires_ms is None else _HEAD.pack(EXPIRING, expires_ms) + payload


def unpack(value: bytes, *, table: str) -> tuple[bytes, int | None]:
    """Read what `pack` made.

    Args:
        value: The stored value.
        table: The table's name, for the message.

    Returns:
        The value's bytes, and when it expires.

    Raises:
        StateCorruptedError: The format is not known.
    """
    kind = value[0] if value else 0
    if kind == PLAIN:
        return value[1:], None
    if kind == EXPIRING and len(value) >= _HEAD.size:
        return value[_HEAD.size :], _HEAD.unpack_from(value)[1]
    what = f"its format is {kind}" if value else "it is empty"
    raise StateCorruptedError(f"table {table!r}: a stored value of {len(value)} bytes cannot be read: {what}")


def unpack_expiry(value: bytes, *, table: str) -> int | None:
    """When a stored value expires, without its bytes; see `unpack`."""
    if value and value[0] == EXPIRING and len(value) >= _HEAD.size:
        expires_ms: int = _HEAD.unpack_from(value)[1]
        return expires_ms
    return unpack(value, table=table)[1]
