"""Reads of tables wherever they are held: what a read is asked with, who may read, and who answers in this process."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary

from streamflow.errors import ConfigurationError, NotHeld
from streamflow.processing.context import RunningApp

LONGEST_READ_S = 60.0
DEFAULT_READ_S = 5.0
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SEEN = r"[\x01-\x08\x0e-\x1f!-~\x80-\xff]"
_VALUE = re.compile(rf"({_SEEN}([\t ]|{_SEEN})*(?<![\t ]))?")


@dataclass(frozen=True, slots=True)
class TableRead:
    """A read that comes over HTTP, or with `headers=` from Python, for `@app.authorize_reads`.

    Attributes:
        table: The table's name.
        key: The key, of the table's key type; None where more than one is asked for.
        headers: The request's headers, their names in lower case.
    """

    table: str
    key: Any
    headers: Mapping[str, str]

    @classmethod
    def of_caller(cls, table: str, key: Any, headers: Mapping[str, str]) -> TableRead:
        """One that comes from Python, by the headers that the caller gives."""
        return cls(table, key, {name.lower(): value for name, value in headers.items()})


Authorize: TypeAlias = Callable[[TableRead], bool] | Callable[[TableRead], Awaitable[bool]]
"""Says whether a read is allowed, or raises `PermissionError`; sync or async."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a read is to be answered.

    Attributes:
        at: Positions that what is read must have come to, as text.
        stale_ok: Whether a standby may answer, which may be behind.
        timeout_s: Seconds to wait for an answer, 0 to 60.
        headers: For `@app.authorize_reads` of this worker and of the one that answers; None for a read of the app's own
            code, which this worker does not ask about.
    """

    at: str = ""
    stale_ok: bool = False
    timeout_s: float = DEFAULT_READ_S
    headers: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.timeout_s <= LONGEST_READ_S:
            raise ConfigurationError(f"timeout_s={self.timeout_s!r}: seconds, from 0 to {LONGEST_READ_S:g}")
        for name, value in (self.headers or {}).items():
            if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
                raise ConfigurationError(f"headers={{{name!r}: {value!r}}}: HTTP has no such header: encode the value")


class RemoteReader(Protocol):
    """A worker, as far as it reads tables wherever they are held."""

    async def value(self, table: Any, key: Any, options: ReadOptions) -> Any:
        """The committed value of a key; `MISSING` where there is none.

        Raises:
            NotHeld: No worker that answers holds it, within the time.
            PermissionError: The one that does, does not allow it.
            ReadFailed: Whether it is allowed could not be found out.
        """
        ...

    def entries(
        self, table: Any, low: bytes, high: bytes | None, options: ReadOptions
    ) -> AsyncIterator[tuple[Any, Any]]:
        """Committed keys and values of a range of stored keys, in key order, of all partitions."""
        ...

    def members(self, table: Any, key: Any, options: ReadOptions) -> AsyncIterator[Any]:
        """The committed members under a key of a set table, in order."""
        ...


_readers: WeakKeyDictionary[RunningApp, list[RemoteReader]] = WeakKeyDictionary()


def reader_of_app(app: RunningApp, table: str) -> RemoteReader:
    """Who reads tables for this process.

    Args:
        app: The app.
        table: What is read, for the error.

    Raises:
        NotHeld: No worker of the app runs here.
    """
    readers = _readers.get(app)
    if not readers:
        raise NotHeld(
            f"table {table!r}: app {app.id!r} is not running in this process: read it from an agent, a timer, within "
            "`async with app.running():`, or over HTTP from any worker"
        )
    return readers[0]


@contextmanager
def registered_reader(app: RunningApp, reader: RemoteReader) -> Generator[None]:
    """Let the process read by way of a worker while the block runs."""
    readers = _readers.setdefault(app, [])
    readers.insert(0, reader)
    try:
        yield
    finally:
        readers.remove(reader)
