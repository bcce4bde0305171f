"""One task's state on RocksDB: a database with a column family per table.

The seam to rocksdict, found out by trying (0.3.29): a write, a read and an iterator's step hold the interpreter's lock,
flush and compaction release it; hence writes in slices. Every native object keeps the database open, and locked: hence
`Scan`, and no variable holds one in a frame that may raise, since whoever keeps the error keeps the frame.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec
from rocksdict import ColumnFamily, Rdict, ReadOptions, WriteBatch

from streamflow.errors import ClosedError, StateCorruptedError, StateFullError
from streamflow.state import rocksdb_faults as faults
from streamflow.state.identity import Difference, Identity, difference
from streamflow.state.rocksdb_meta import (
    CHECKPOINT,
    IDENTITY,
    UnfitError,
    encode_identity,
    read_checkpoint,
    read_identity,
)
from streamflow.state.rocksdb_options import Memory, write_options
from streamflow.state.rocksdb_scan import Scan, last_key
from streamflow.state.store import (
    ATOMIC_BYTES,
    ATOMIC_CHANGES,
    META,
    Changes,
    Checkpoint,
    Store,
    StoreBatch,
    StoreStats,
    dropped_tables,
)

_PREFIX = "table."
_PAUSE_S = 0.0002
"""Pause between two slices of a write: long enough for a waiting thread to wake up and take the interpreter's lock."""
_STALL_S = 0.005
_BUFFERS_TIMEOUT_S = 1.0
_ROOM_BYTES = 1024 * 1024
_PUTS = 64


class RocksStore(Store):
    """One task's state on RocksDB; made by `RocksStores.open`."""

    def __init__(self, path: str, identity: Identity, memory: Memory, relieve: Callable[[], None]) -> None:
        self.path = path
        self.identity = identity
        self.set_aside = None
        self._memory = memory
        self._relieve = relieve
        self._lock = threading.RLock()  # of writing, closing and opening again; long
        self._natives = threading.Lock()  # of whether native objects are there; short
        self._write_options = write_options()
        self._db: Rdict | None = None
        self._families: dict[str, Rdict] = {}
        self._handles: dict[str, ColumnFamily] = {}
        self._gets: dict[str, Callable[[bytes], bytes | None]] = {}
        self._scans: weakref.WeakSet[Scan] = weakref.WeakSet()
        self._checkpoint = Checkpoint()
        self._closed = False
        self._is_full = False

    # --- opening and closing ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the database and bring it to the tables of the identity.

        Raises:
            UnfitError: It belongs to something else.
            StreamFlowError: As `translate` says.
        """
        try:
            self._open()
        except UnfitError as exc:
            traceback.clear_frames(exc.__traceback__)
            self._release()
            raise
        except Exception as exc:
            traceback.clear_frames(exc.__traceback__)
            self._release()
            raise faults.translate(exc, self.path) from exc

    def peek(self) -> Checkpoint:
        """Open the database as it is, read its checkpoint, and close it.

        Raises:
            StreamFlowError: As `translate` says.
        """
        options = self._memory.options
        try:
            families = {name: options() for name in Rdict.list_cf(self.path) if name != "default"}
            if META not in families:
                raise StateCorruptedError("it does not say how far it is")
            self._db = Rdict(self.path, options(), families)
            data = self._bind(META).get(CHECKPOINT)
            if data is None:
                raise StateCorruptedError("it does not say how far it is")
            return read_checkpoint(data)
        except Exception as exc:
            traceback.clear_frames(exc.__traceback__)
            raise faults.translate(exc, self.path) from exc
        finally:
            self._release()

    def _open(self) -> None:
        options, small = self._memory.options, self._memory.small_options
        had_data = faults.has_data(self.path)
        if os.path.lexists(os.path.join(self.path, "CURRENT")):
            present = set(Rdict.list_cf(self.path)) - {"default"}
        elif had_data:
            raise StateCorruptedError("its file CURRENT is missing")
        else:
            present = set()
        self._db = db = Rdict(self.path, small(), {META: small()} | {name: options() for name in present - {META}})
        meta = self._bind(META)
        found = meta.get(IDENTITY)
        if found is None and db.latest_sequence_number() > 0:
            raise UnfitError(Difference("unknown", "it does not say what it belongs to"))
        if found is None and had_data:
            raise StateCorruptedError("its manifest is cut short")
        stored = msgspec.structs.replace(self.identity, tables={}) if found is None else read_identity(found)
        differing = difference(stored, self.identity)
        if differing is not None:
            raise UnfitError(differing)
        kept = stored.tables.keys() & self.identity.tables.keys()
        missing = {_PREFIX + name for name in kept} - present
        if missing:
            raise StateCorruptedError(f"tables are missing: {', '.join(sorted(missing))}")
        data = meta.get(CHECKPOINT)
        self._checkpoint = Checkpoint() if data is None else read_checkpoint(data)
        if found is None or stored != self.identity:
            self._fit(stored, present - {META})
        for name in self.identity.tables:
            self._gets[name] = self._bind(_PREFIX + name).get

    def _fit(self, stored: Identity, present: set[str]) -> None:
        """Drop tables that are declared no more, add new ones; what a crash leaves half done, the next open finishes.

        A column family that the stored identity does not name is nobody's, whoever made it.
        """
        assert self._db is not None
        tables = {name: stored.tables[name] for name in stored.tables if name in self.identity.tables}
        self._checkpoint = self._checkpoint.without(dropped_tables(stored, self.identity))
        self._record(msgspec.structs.replace(self.identity, tables=tables))
        for family in present - {_PREFIX + name for name in tables}:
            self._db.drop_column_family(family)
        for name in self.identity.tables.keys() - tables.keys():
            self._db.create_column_family(_PREFIX + name, self._memory.options())
        self._record(self.identity)

    def _record(self, identity: Identity) -> None:
        batch = WriteBatch(raw_mode=True)
        batch.put(IDENTITY, encode_identity(identity), self._handles[META])
        batch.put(CHECKPOINT, self._checkpoint.encode(), self._handles[META])
        self._commit(batch)

    def _bind(self, family: str) -> Rdict:
        assert self._db is not None
        found = self._families[family] = self._db.get_column_family(family)
        self._handles[family] = self._db.get_column_family_handle(family)
        return found

    def _release(self) -> None:
        """Let go of the database: every native object, since each of them keeps it open."""
        with self._natives:
            db, self._db = self._db, None
            self._gets.clear()
            self._handles.clear()
            self._families.clear()
            for scan in self._scans:
                scan.end()
            self._scans.clear()
        if db is None:
            return
        try:
            db.close()
        except Exception as exc:
            # It flushes as it closes; what it could not write stands in the write-ahead log, or is restored.
            translated = faults.translate(exc, self.path)
            if not isinstance(translated, StateFullError | StateCorruptedError | ClosedError):
                raise translated from exc

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._release()

    def _reopen(self) -> None:
        """Open again after a full disk: RocksDB takes no more writes until then.

        Raises:
            StateFullError: There is still no room, or somebody iterates.
        """
        with self._natives:
            if any(not scan.is_over for scan in self._scans):
                raise StateFullError(f"state {self.path}: it is opened again when those who iterate over it are done")
        faults.check_room(self.path, _ROOM_BYTES)
        self._release()
        try:
            self.open()
        except UnfitError as exc:
            raise StateCorruptedError(f"state {self.path} is damaged: {exc}") from exc
        self._is_full = False

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        self._check_open()
        return self._checkpoint

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"state {self.path} is closed")

    def get(self, table: str, key: bytes) -> bytes | None:
        try:
            return self._gets[table](key)
        except Exception as exc:
            return self._get_again(table, key, exc)

    def getter(self, table: str) -> Callable[[bytes], bytes | None]:
        self._family(table)
        gets, again = self._gets, self._get_again

        def get(key: bytes) -> bytes | None:
            try:
                return gets[table](key)
            except Exception as exc:
                return again(table, key, exc)

        return get

    def get_many(self, table: str, keys: Sequence[bytes]) -> list[bytes | None]:
        self._family(table)
        try:
            found: Any = self._families[_PREFIX + table].get(list(keys))
        except Exception as exc:
            return [self._get_again(table, key, exc) for key in keys]
        values: list[bytes | None] = found
        return values

    def _get_again(self, table: str, key: bytes, exc: Exception) -> bytes | None:
        """Read once more what failed because the store was being opened again; raise what anything else means."""
        with self._lock:
            self._check_open()
            if table not in self.identity.tables:
                raise KeyError(table) from exc
            if self._db is None:
                raise faults.no_room(self.path, "it could not be opened again") from exc
            try:
                return self._gets[table](key)
            except Exception as exc:
                raise faults.translate(exc, self.path) from exc

    def _family(self, table: str) -> Rdict:
        self._check_open()
        if table not in self.identity.tables:
            raise KeyError(table)
        family = self._families.get(_PREFIX + table)
        if family is None:
            with self._lock:  # until whoever opens it again is done
                self._check_open()
                family = self._families.get(_PREFIX + table)
        if family is None:
            raise faults.no_room(self.path, "it could not be opened again")
        return family

    def scan(
        self, table: str, start: bytes | None = None, stop: bytes | None = None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        self._family(table)
        options = ReadOptions()
        if stop is not None:
            options.set_iterate_upper_bound(stop)
        with self._natives:
            self._check_open()
            try:
                scan = Scan(self._families[_PREFIX + table].iter(options), options, self.path, start, reverse)
            except KeyError as exc:
                raise faults.no_room(self.path, "it is being opened again") from exc
            except Exception as exc:
                raise faults.translate(exc, self.path) from exc
            self._scans.add(scan)
        return scan

    def stats(self) -> StoreStats:
        with self._natives:
            self._check_open()
            entries = {name: self._figure(_PREFIX + name, "rocksdb.estimate-num-keys") for name in self.identity.tables}
            memory = sum(self._figure(name, "rocksdb.cur-size-all-mem-tables") for name in self._families)
        sizes = faults.file_sizes(self.path)
        return StoreStats(entries, sum(sizes.values()), memory, sum(name.endswith(".sst") for name in sizes))

    def _figure(self, family: str, name: str) -> int:
        found = self._families.get(family)
        return (found.property_int_value(name) or 0) if found is not None else 0

    def flushable_bytes(self) -> int:
        """Size of the write buffers that a flush would free; 0 when it is closed."""
        with self._natives:
            return sum(self._figure(name, "rocksdb.cur-size-active-mem-table") for name in self._families)

    def is_flushing(self) -> bool:
        """Whether a flush runs."""
        with self._natives:
            return self._figure(META, "rocksdb.num-running-flushes") > 0

    def begin_flush(self) -> None:
        """Start to flush, in RocksDB's own threads."""
        with self._natives:
            for family in self._families.values():
                family.flush(False)

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, batch: StoreBatch) -> None:
        with self._lock:
            self._writable(batch.ranges.keys() | batch.changes.keys())
            native = WriteBatch(raw_mode=True)
            for table, ranges in batch.ranges.items():
                for start, stop in ranges:
                    self._delete_range(native, table, start, stop)
            for table, changes in batch.changes.items():
                native = self._put_all(native, table, changes)
            if batch.checkpoint is not None:
                native.put(CHECKPOINT, batch.checkpoint.encode(), self._handles[META])
            self._commit(native)
            self._checkpoint = batch.checkpoint or self._checkpoint
            self._wait_for_buffers()

    def _writable(self, tables: set[str]) -> None:
        self._check_open()
        for table in tables:
            if table not in self.identity.tables:
                raise KeyError(table)
        if self._is_full:
            self._reopen()

    def _put_all(self, native: WriteBatch, table: str, changes: Changes) -> WriteBatch:
        """Add changes, writing whenever a slice is full; give the slice that is not yet written."""
        rest = iter(changes.items())
        while some := list(islice(rest, _PUTS)):
            if len(native) + len(some) > ATOMIC_CHANGES or native.size_in_bytes() > ATOMIC_BYTES:
                self._commit(native)
                time.sleep(_PAUSE_S)
                self._wait_for_buffers()
                native = WriteBatch(raw_mode=True)
            _fill(native, self._handles[_PREFIX + table], some)
        return native

    def _wait_for_buffers(self) -> None:
        """Keep the write buffers of all stores within their share, as RocksDB would by stalling the write.

        Not for ever: whoever iterates keeps buffers in memory that were flushed long ago.
        """
        if self._memory.is_tight:
            self._relieve()
        until = time.monotonic() + _BUFFERS_TIMEOUT_S
        while self._memory.is_full and time.monotonic() < until:
            time.sleep(_STALL_S)
            self._relieve()

    def _delete_range(self, native: WriteBatch, table: str, start: bytes, stop: bytes | None) -> None:
        if stop is None:
            last = last_key(self._family(table).iter(), self.path)
            if last is None or last < start:
                return
            stop = last + b"\0"
        native.delete_range(start, stop, self._handles[_PREFIX + table])

    def _commit(self, native: WriteBatch) -> None:
        assert self._db is not None
        while True:
            try:
                return self._db.write(native, self._write_options)
            except Exception as exc:
                if "Write stall" in str(exc):
                    time.sleep(_STALL_S)  # flushes are behind; they run in threads of their own
                    continue
                translated = faults.translate(exc, self.path)
                self._is_full = self._is_full or isinstance(translated, StateFullError)
                raise translated from exc

    def clear(self, table: str) -> None:
        checkpoint = self.checkpoint.without(frozenset({table}))
        batch = StoreBatch(checkpoint)
        batch.delete_range(table)
        self.write(batch)

    def flush(self) -> None:
        with self._lock:
            self._writable(set())
            families = list(self._families)
        try:
            for name in families:
                self._families[name].flush(True)
        except Exception as exc:
            translated = faults.translate(exc, self.path)
            self._is_full = self._is_full or isinstance(translated, StateFullError)
            raise translated from exc


def _fill(native: WriteBatch, handle: ColumnFamily, some: list[tuple[bytes, bytes | None]]) -> None:
    put, delete = native.put, native.delete
    for key, value in some:
        if value is None:
            delete(key, handle)
        else:
            put(key, value, handle)
