"""Iterating over a RocksDB store.

The seam to rocksdict, found out by trying (0.3.29): `ReadOptions.set_iterate_lower_bound` moves the upper bound, hence
the check of a reverse scan's start in Python. The options lend an iterator their bound and it does not keep them alive:
without them it ends anywhere, hence `Scan` has both. `items` ends without a word where a file is damaged, hence `iter`
and its `status`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from rocksdict import RdictIter, ReadOptions

from streamflow.errors import ClosedError
from streamflow.state import rocksdb_faults as faults


class Scan(Iterator[tuple[bytes, bytes]]):
    """An iterator that its store can end: a native one would keep the database open, and locked.

    It may be iterated over in one thread and ended in another, which waits for a step that is under way.

    Args:
        native: RocksDB's.
        options: What it was made with.
        path: The store, for messages.
        start: First key, inclusive; None for the first there is.
        reverse: From the end to the start.

    Attributes:
        is_over: Whether it came to its end.
    """

    __slots__ = ("__weakref__", "_inside", "_native", "_options", "_path", "_reverse", "_start", "is_over")

    def __init__(self, native: RdictIter, options: ReadOptions, path: str, start: bytes | None, reverse: bool) -> None:
        self.is_over = False
        # RocksDB looks at the upper bound where the options have it: without them it would read freed memory, and end
        # the scan anywhere.
        self._options = options
        self._native: RdictIter | None = native
        self._inside = threading.Lock()
        self._path = path
        self._start = start
        self._reverse = reverse
        if reverse:
            native.seek_to_last()
        elif start is None:
            native.seek_to_first()
        else:
            native.seek(start)

    def __next__(self) -> tuple[bytes, bytes]:
        with self._inside:
            if self._native is None:
                if self.is_over:
                    raise StopIteration
                raise ClosedError(f"state {self._path} was closed while it was iterated over")
            try:
                if self._native.valid():
                    key: bytes = self._native.key()
                    value: bytes = self._native.value()
                    if not self._reverse:
                        self._native.next()
                        return key, value
                    if self._start is None or key >= self._start:
                        self._native.prev()
                        return key, value
                else:
                    self._native.status()  # raises when damage has ended it
            except Exception as exc:
                raise faults.translate(exc, self._path) from exc
            self.is_over = True
            self._native = None
            raise StopIteration

    def end(self) -> None:
        """Let go of the database."""
        with self._inside:
            self._native = None


def last_key(native: RdictIter, path: str) -> bytes | None:
    """The last key of what an iterator covers; None where there is none.

    Args:
        native: RocksDB's iterator.
        path: The store, for messages.

    Raises:
        StreamFlowError: As `translate` says.
    """
    native.seek_to_last()
    try:
        if native.valid():
            key: bytes = native.key()
            return key
        native.status()
    except Exception as exc:
        del native
        raise faults.translate(exc, path) from exc
    return None
