"""What a table is to code that reads it wherever it is held: by the worker that has the key, over HTTP where needed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Generic, TypedDict, TypeVar, Unpack, overload

from streamflow.processing.ordered_mapping import OrderedMapping
from streamflow.processing.remote import DEFAULT_READ_S, ReadOptions, reader_of_app
from streamflow.state.values import MISSING

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


class RemoteOptions(TypedDict, total=False):
    """See `Table.get_remote`."""

    at: str
    stale_ok: bool
    timeout_s: float
    headers: Mapping[str, str]


class RemoteTable(OrderedMapping[K, V], Generic[K, V]):
    """A mapping whose parts several workers hold.

    Attributes:
        app: The app that declared it.
    """

    app: Any

    @overload
    async def get_remote(self, key: K, /, **options: Unpack[RemoteOptions]) -> V | None: ...
    @overload
    async def get_remote(self, key: K, default: V, /, **options: Unpack[RemoteOptions]) -> V: ...
    @overload
    async def get_remote(self, key: K, default: T, /, **options: Unpack[RemoteOptions]) -> V | T: ...
    async def get_remote(
        self,
        key: K,
        default: Any = None,
        /,
        *,
        at: str = "",
        stale_ok: bool = False,
        timeout_s: float = DEFAULT_READ_S,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The committed value of a key, whichever worker holds it; by HTTP where that is another one.

        In an agent, too, it sees what is committed, and nothing of the turn in progress.

        Args:
            key: The key.
            default: What to return where there is none; a default of the table's own is not used.
            at: Positions that what is read must have come to: `RecordMetadata.position`, `table.position(key)`.
            stale_ok: Whether a standby may answer, which may be behind.
            timeout_s: Seconds to wait for who holds it, for a restore, for `at`; from 0 to 60.
            headers: For `@app.authorize_reads`, which decides wherever the key is; left out, it is the app's own read,
                and is asked about by other workers only.

        Raises:
            NotHeld: No worker that can be reached has answered within the time; the message says why. Ask again.
            PermissionError: `@app.authorize_reads` does not allow the read.
            ReadFailed: `@app.authorize_reads` raised something else; asking again does not help.
            ProductionError: It is no key of the table.
            ConfigurationError: `at` is no position that the table comes to.

        Cancellation: gives up at once.
        """
        asked = ReadOptions(at, stale_ok, timeout_s, headers)
        value = await reader_of_app(self.app, self.name).value(self, key, asked)
        return default if value is MISSING else value

    def scan_remote(
        self,
        start: K | None = None,
        stop: K | None = None,
        *,
        prefix: Any = None,
        at: str = "",
        stale_ok: bool = False,
        timeout_s: float = DEFAULT_READ_S,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[tuple[K, V]]:
        """Iterate over the committed values of a range in key order, over the partitions of all workers.

        It is read in pages as the iteration goes on: what is written meanwhile may be seen or not. Every key that is
        there throughout comes once.

        Args:
            start: First key, inclusive; None for the beginning.
            stop: End, exclusive; None for the end.
            prefix: See `scan`.
            at: See `get_remote`.
            stale_ok: See `get_remote`.
            timeout_s: See `get_remote`; for each page.
            headers: See `get_remote`.

        Raises:
            NotHeld: A page could not be read within the time.
            PermissionError: `@app.authorize_reads` does not allow the read.
            ReadFailed: See `get_remote`.
        """
        low, high = self.span_of(start, stop, prefix, "scan_remote")
        asked = ReadOptions(at, stale_ok, timeout_s, headers)
        return reader_of_app(self.app, self.name).entries(self, low, high, asked)
