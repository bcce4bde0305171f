"""Stores in memory, for `memory://` logs and tests: they live as long as their `MemoryStores`, opened or not.

Standard library only: a dict holds the values, a list its keys in order. One memory copy of 8 bytes per key for each
new key is cheaper, at the sizes memory is used for, than what a tree in Python costs per operation.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence

from streamflow.errors import ClosedError, StateLockedError
from streamflow.state.identity import Identity, difference
from streamflow.state.store import (
    Checkpoint,
    SetAside,
    Store,
    StoreBatch,
    Stores,
    StoreStats,
    dropped_tables,
    report_set_aside,
)

_SORT_FROM = 64
"""From so many new keys at once, sorting the list is cheaper than inserting into it."""


class _Table:
    """Ordered bytes to bytes."""

    __slots__ = ("bytes", "keys", "values")

    def __init__(self) -> None:
        self.bytes = 0
        self.values: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []

    def update(self, changes: Mapping[bytes, bytes | None]) -> None:
        values, keys = self.values, self.keys
        new = [key for key, value in changes.items() if value is not None and key not in values]
        size = 0
        for key, value in changes.items():
            before = values.get(key)
            if before is not None:
                size -= len(key) + len(before)
            if value is not None:
                values[key] = value
                size += len(key) + len(value)
            elif before is not None:
                del values[key]
                del keys[bisect_left(keys, key)]
        self.bytes += size
        if len(new) < _SORT_FROM:
            for key in new:
                insort(keys, key)
        else:
            keys.extend(new)
            keys.sort()

    def delete_range(self, start: bytes, stop: bytes | None) -> None:
        span = self.span(start, stop)
        for key in self.keys[span]:
            self.bytes -= len(key) + len(self.values.pop(key))
        del self.keys[span]

    def span(self, start: bytes | None, stop: bytes | None) -> slice:
        first = 0 if start is None else bisect_left(self.keys, start)
        last = len(self.keys) if stop is None else bisect_left(self.keys, stop)
        return slice(first, max(first, last))


class _Content:
    """What stays when a store is closed."""

    __slots__ = ("checkpoint", "identity", "lock", "tables", "user")

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.checkpoint = Checkpoint()
        self.tables = {name: _Table() for name in identity.tables}
        self.user: MemoryStore | None = None
        self.lock = threading.Lock()  # of whoever looks at several keys while a thread writes


class MemoryStore(Store):
    """One task's state in memory; made by `MemoryStores.open`."""

    def __init__(self, path: str, content: _Content, set_aside: SetAside | None) -> None:
        self.path = path
        self.identity = content.identity
        self.set_aside = set_aside
        self._content = content
        content.user = self

    def _table(self, name: str) -> _Table:
        self._check_open()
        return self._content.tables[name]

    def _check_open(self) -> None:
        if self._content.user is not self:
            raise ClosedError(f"state {self.path} is closed")

    @property
    def checkpoint(self) -> Checkpoint:
        self._check_open()
        return self._content.checkpoint

    def get(self, table: str, key: bytes) -> bytes | None:
        return self._table(table).values.get(key)

    def getter(self, table: str) -> Callable[[bytes], bytes | None]:
        content, values = self._content, self._table(table).values

        def get(key: bytes) -> bytes | None:
            if content.user is not self:
                raise ClosedError(f"state {self.path} is closed")
            return values.get(key)

        return get

    def get_many(self, table: str, keys: Sequence[bytes]) -> list[bytes | None]:
        return list(map(self._table(table).values.get, keys))

    def scan(
        self, table: str, start: bytes | None = None, stop: bytes | None = None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        found = self._table(table)
        with self._content.lock:
            span = found.keys[found.span(start, stop)]
            if reverse:
                span.reverse()
            pairs = [(key, found.values[key]) for key in span]
        return self._iterate(pairs)

    def _iterate(self, pairs: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for pair in pairs:
            self._check_open()
            yield pair

    def write(self, batch: StoreBatch) -> None:
        self._check_open()
        tables = self._content.tables
        changed = {name: tables[name] for name in batch.ranges.keys() | batch.changes.keys()}
        with self._content.lock:
            for name, ranges in batch.ranges.items():
                for start, stop in ranges:
                    changed[name].delete_range(start, stop)
            for name, changes in batch.changes.items():
                changed[name].update(dict(changes.items()))
            if batch.checkpoint is not None:
                self._content.checkpoint = batch.checkpoint

    def clear(self, table: str) -> None:
        found = self._table(table)
        with self._content.lock:
            found.delete_range(b"", None)
            self._content.checkpoint = self._content.checkpoint.without(frozenset({table}))

    def stats(self) -> StoreStats:
        self._check_open()
        tables = self._content.tables
        size = sum(table.bytes for table in tables.values())
        return StoreStats({name: len(table.keys) for name, table in tables.items()}, 0, size, 0)

    def flush(self) -> None:
        self._check_open()

    def close(self) -> None:
        if self._content.user is self:
            self._content.user = None


class MemoryStores(Stores):
    """Stores by directory path, none of which touches the disk.

    Keep one object where a worker's restart should find its state again.
    """

    def __init__(self) -> None:
        self._contents: dict[str, _Content] = {}

    def open(self, path: str, identity: Identity) -> Store:
        content, aside = self._contents.get(path), None
        if content is not None:
            if content.user is not None:
                raise StateLockedError(f"state {path} is already open in this process")
            differing = difference(content.identity, identity)
            if differing is not None:
                aside, content = self.set_aside(path, differing.reason, differing.text), None
        if content is None:
            content = self._contents[path] = _Content(identity)
        elif content.identity != identity:
            invalid = dropped_tables(content.identity, identity)
            content.checkpoint = content.checkpoint.without(invalid)
            content.tables = {name: content.tables.get(name) or _Table() for name in identity.tables}
            content.identity = identity
        return MemoryStore(path, content, aside)

    def peek(self, path: str) -> Checkpoint | None:
        content = self._contents.get(path)
        if content is not None and content.user is not None:
            raise StateLockedError(f"state {path} is open in this process")
        return None if content is None else content.checkpoint

    def set_aside(self, path: str, reason: str, text: str) -> SetAside | None:
        content = self._contents.get(path)
        if content is None:
            return None
        if content.user is not None:
            raise StateLockedError(f"state {path} is still open")
        del self._contents[path]
        aside = SetAside(reason, text, "")
        report_set_aside(path, aside)
        return aside

    def close(self) -> None:
        for content in self._contents.values():
            content.user = None
