"""Stores on RocksDB: one database per task, one memory budget per process."""

from __future__ import annotations

import os
import threading
import weakref

from streamflow.errors import StateCorruptedError, StateLockedError, StateRefusedError
from streamflow.state import rocksdb_faults as faults
from streamflow.state.identity import Identity
from streamflow.state.rocksdb_meta import UnfitError
from streamflow.state.rocksdb_options import Memory
from streamflow.state.rocksdb_store import RocksStore
from streamflow.state.store import Checkpoint, SetAside, Store, Stores, damaged, name_aside, report_set_aside


class RocksStores(Stores):
    """All RocksDB stores of a process.

    Args:
        memory_budget_bytes: The process's budget, of which `rocksdb_options.CACHE_SHARE` is taken.
    """

    def __init__(self, memory_budget_bytes: int) -> None:
        self.memory = Memory(memory_budget_bytes)
        self._stores: weakref.WeakSet[RocksStore] = weakref.WeakSet()
        self._lock = threading.Lock()

    def open(self, path: str, identity: Identity) -> Store:
        path = os.path.abspath(path)
        aside: SetAside | None = None
        while True:
            try:
                os.makedirs(path, exist_ok=True)
            except OSError as exc:
                raise faults.translate(exc, path) from exc
            store = RocksStore(path, identity, self.memory, self.relieve)
            try:
                store.open()
            except (UnfitError, StateCorruptedError) as exc:
                if aside is not None:
                    raise StateRefusedError(f"state {path}: a new store cannot be used either ({exc})") from exc
                why = exc.differing if isinstance(exc, UnfitError) else damaged(str(exc.__cause__ or exc))
                aside = self.set_aside(path, why.reason, why.text)
                continue
            store.set_aside = aside
            with self._lock:
                self._stores.add(store)
            return store

    def peek(self, path: str) -> Checkpoint | None:
        path = os.path.abspath(path)
        if not os.path.lexists(os.path.join(path, "CURRENT")):
            return None
        store = RocksStore(path, Identity("", "", 0, {}), self.memory, self.relieve)
        try:
            return store.peek()
        except StateCorruptedError:
            return None

    def set_aside(self, path: str, reason: str, text: str) -> SetAside | None:
        path = os.path.abspath(path)
        with self._lock:
            if any(store.path == path and not store.is_closed for store in self._stores):
                raise StateLockedError(f"state {path}: it is still open here; close it first")
        if not os.path.lexists(path):
            return None
        aside = SetAside(reason, text, name_aside(path, reason))
        try:
            os.rename(path, aside.path)
        except OSError as exc:
            raise faults.translate(exc, path) from exc
        report_set_aside(path, aside)
        return aside

    def relieve(self) -> None:
        """Flush the store with the largest write buffers: RocksDB itself only flushes the one that is written to."""
        with self._lock:
            stores = list(self._stores)
        if not stores or any(store.is_flushing() for store in stores):
            return
        max(stores, key=RocksStore.flushable_bytes).begin_flush()

    def close(self) -> None:
        with self._lock:
            stores = list(self._stores)
            self._stores.clear()
        for store in stores:
            store.close()
