"""What a request for a table says: keys, bounds and options, out of its address."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
from starlette.requests import Request

from streamflow.config import nearest
from streamflow.errors import ConfigurationError
from streamflow.processing.remote import DEFAULT_READ_S, ReadOptions
from streamflow.runtime.committed_reads import MOST_ROWS, UnknownTable
from streamflow.runtime.table_reads import Span

DEFAULT_ROWS = 100
_OPTIONS = ("stale", "at", "timeout_s")
_OF_ONE = (*_OPTIONS, "in", "limit", "cursor")
_OF_MANY = (*_OPTIONS, "key", "from", "to", "prefix", "limit", "cursor")
# Of one connection, or made anew for the next one.
_HOP_BY_HOP = (
    "connection content-length expect host keep-alive proxy-authenticate proxy-authorization proxy-connection te "
    "trailer transfer-encoding upgrade accept-encoding"
)
_NOT_FORWARDED = frozenset(_HOP_BY_HOP.split(" "))


def key_in_path(request: Request) -> str:
    """The key as it stands in the address, percent-decoded; bytes that are no UTF-8 as surrogates.

    Raises:
        UnknownTable: A `%2F` stands in the name of the table, or where a slash is to be before the key.
    """
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    _, _, table, *key = raw.split(b"/", 3)
    if not key or unquote_to_bytes(table).decode(errors="replace") != request.path_params["table"]:
        raise UnknownTable(f"no table has a name with a slash in it: {table.decode(errors='replace')!r}")
    return unquote_to_bytes(key[0]).decode(errors="surrogateescape")


def headers_of(request: Request) -> dict[str, str]:
    """Its headers by name in lower case; one that stands there several times has all values, as RFC 9110 joins them.

    All workers that a read is passed on to see the same: whether it is allowed is decided by one and the same value.
    """
    found: dict[str, str] = {}
    for name, value in request.headers.items():
        between = "; " if name == "cookie" else ", "
        found[name] = f"{found[name]}{between}{value}" if name in found else value
    return found


def forwarded(request: Request) -> dict[str, str]:
    """Its headers, for who is asked next."""
    return {name: value for name, value in headers_of(request).items() if name not in _NOT_FORWARDED}


class Cursor(msgspec.Struct, frozen=True):
    """Where a page ended, as text that its reader hands back.

    Attributes:
        table: The table.
        low: Where the range begins, as stored keys.
        high: Where it ends.
        after: The stored key to go on behind.
    """

    table: str
    low: bytes
    high: bytes | None
    after: bytes

    def text(self) -> str:
        """As it stands in an address."""
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")

    @classmethod
    def of_text(cls, text: str, table: str, span: Span | None) -> Cursor:
        """Read it.

        Args:
            text: It.
            table: The table that is read.
            span: The range that is asked for beside it; None where nothing is said.

        Raises:
            ConfigurationError: It is none, or of another read.
        """
        try:
            cursor = msgspec.msgpack.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=cls)
        except (binascii.Error, ValueError, msgspec.MsgspecError) as exc:
            raise ConfigurationError("cursor= is not one that an answer gave") from exc
        if cursor.table != table or (span is not None and span != (cursor.low, cursor.high)):
            raise ConfigurationError("cursor= is of another read: give it with the same table, from, to and prefix")
        return cursor


class Query:
    """The part behind the question mark.

    Args:
        request: The request.
        of_one: Whether one key is asked for.

    Raises:
        ConfigurationError: It has something that is not known, or twice.
    """

    def __init__(self, request: Request, *, of_one: bool) -> None:
        known = _OF_ONE if of_one else _OF_MANY
        text = request.scope["query_string"].decode("latin-1")
        self._given: dict[str, str] = {}
        for name, value in parse_qsl(text, keep_blank_values=True, errors="surrogateescape"):
            if name not in known:
                raise ConfigurationError(f"a read of a table has no {name!r}{nearest(name, known)}")
            if name in self._given:
                raise ConfigurationError(f"{name!r} stands twice in the address")
            self._given[name] = value

    def __getitem__(self, name: str) -> str | None:
        return self._given.get(name)

    def options(self, headers: Mapping[str, str]) -> ReadOptions:
        """How the read is to be answered."""
        stale = self["stale"]
        if stale not in (None, "ok"):
            raise ConfigurationError(f"stale={stale!r}: it is stale=ok, or left out")
        try:
            timeout_s = float(self["timeout_s"] or DEFAULT_READ_S)
        except ValueError:
            raise ConfigurationError(f"timeout_s={self['timeout_s']!r}: seconds") from None
        return ReadOptions(self["at"] or "", stale == "ok", timeout_s, headers)

    def cursor(self, table: str, span: Span | None) -> Cursor | None:
        """Where to go on; see `Cursor.of_text`."""
        text = self["cursor"]
        return None if text is None else Cursor.of_text(text, table, span)

    @property
    def limit(self) -> int:
        """Most rows of the answer."""
        try:
            limit = int(self["limit"] or DEFAULT_ROWS)
        except ValueError:
            limit = 0
        if not 1 <= limit <= MOST_ROWS:
            raise ConfigurationError(f"limit={self['limit']!r}: a number from 1 to {MOST_ROWS:,}")
        return limit


def shown_error(error: Any) -> str:
    """What an error says, for the answer."""
    return str(getattr(error, "message", "") or error)
