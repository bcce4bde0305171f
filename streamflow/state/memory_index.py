"""The keys of one table that are in memory and not in its store, in order, so that small scans stay small.

It is made at the first scan and kept up to date from then on, until the store is written: then it is made anew. Turns
in threads scan while the event loop adds what others have written, hence the lock.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_INSERTED_ONE_BY_ONE = 32
_STEP = 1_000


class MemoryIndex:
    """Store keys in order, with the keys they stand for.

    Attributes:
        is_in_use: Whether keys that come into memory have to be added.
    """

    __slots__ = ("_keys", "_lock", "_new", "_sorted", "is_in_use")

    def __init__(self) -> None:
        self.is_in_use = False
        self._lock = threading.Lock()
        self._keys: dict[bytes, Any] = {}
        self._sorted: list[bytes] = []
        self._new: list[bytes] = []

    def fill(self, in_memory: Callable[[], Iterable[tuple[Iterable[bytes], Iterable[Any]]]]) -> None:
        """Begin to use it, unless it is in use.

        Args:
            in_memory: Gives all keys that are in memory, store keys and keys; asked once keys that come later are
                added, so that none is missed.
        """
        with self._lock:
            if self.is_in_use:
                return
            self.is_in_use = True
            try:
                for store_keys, keys in in_memory():
                    self._add(store_keys, keys)
            except BaseException:
                self.is_in_use = False
                raise

    def add(self, store_keys: Iterable[bytes], keys: Iterable[Any]) -> None:
        """Add keys, known or not."""
        with self._lock:
            self._add(store_keys, keys)

    def _add(self, store_keys: Iterable[bytes], keys: Iterable[Any]) -> None:
        known = self._keys
        for store_key, key in zip(store_keys, keys, strict=True):
            if store_key not in known:
                known[store_key] = key
                self._new.append(store_key)

    def walk(self, start: bytes | None, stop: bytes | None) -> Iterator[tuple[bytes, Any]]:
        """`between`, step by step: who needs the first ones only does not copy all."""
        while found := self.between(start, stop, _STEP):
            yield from found
            start = found[-1][0] + b"\0"

    def between(self, start: bytes | None, stop: bytes | None, most: int | None = None) -> list[tuple[bytes, Any]]:
        """The keys of a range, in order.

        Args:
            start: First store key, inclusive; None for the beginning.
            stop: End, exclusive; None for the end.
            most: How many at most; None for all.
        """
        with self._lock:
            ordered = self._in_order()
            low = 0 if start is None else bisect_left(ordered, start)
            high = len(ordered) if stop is None else bisect_left(ordered, stop)
            if most is not None:
                high = min(high, low + most)
            known = self._keys
            return [(store_key, known[store_key]) for store_key in ordered[low:high]]

    def _in_order(self) -> list[bytes]:
        if self._new:
            if len(self._new) <= _INSERTED_ONE_BY_ONE:
                for store_key in self._new:
                    insort(self._sorted, store_key)
            else:
                self._sorted += self._new
                self._sorted.sort()
            self._new = []
        return self._sorted
