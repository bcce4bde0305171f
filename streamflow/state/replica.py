"""A whole table's copy on this machine: read by anybody, written by the one that follows its topic.

Reads come from the event loop and from threads while a write goes on. A value may be kept decoded; a reader that loaded
one while it was being replaced finds the version moved and keeps nothing, so that an old value never stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from streamflow.errors import StateCorruptedError, StateError
from streamflow.state.format import unpack
from streamflow.state.keys import KeyOrder
from streamflow.state.store import Checkpoint, Store, StoreBatch
from streamflow.state.values import MISSING, Values

logger = logging.getLogger("streamflow.tables")

_ABSENT: Any = object()


class Replica:
    """The copy of one table.

    Args:
        name: The table's name.
        keys: Order-preserving encoding of its keys.
        values: How its values are held.
        store: Its store, open; it holds this table alone.
        cached_values: How many values are kept decoded, about.

    Attributes:
        damage: What showed that the store is damaged; None while nothing did.
    """

    def __init__(self, name: str, *, keys: KeyOrder, values: Values, store: Store, cached_values: int) -> None:
        self.name = name
        self._encode_key = keys.encode
        self._decode_key = keys.decode
        self._values = values
        self._are_objects = values.are_objects
        self._store = store
        self._store_get: Callable[[bytes], bytes | None] = store.getter(name)
        self._cached_values = max(512, cached_values // 2)
        self._cache: dict[bytes, Any] = {}
        self._older: dict[bytes, Any] = {}
        self._version = 0
        self._told = False
        self.damage: StateCorruptedError | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """How far it has come."""
        return self._store.checkpoint

    # --- reading -----------------------------------------------------------------------------------------------

    def get(self, key: Any) -> Any:
        """The value of a key, a copy where it could be changed in place; `MISSING` where there is none.

        Raises:
            ProductionError: The key is not of the table's key type.
        """
        store_key = self._encode_key(key)
        held = self._cache.get(store_key, _ABSENT)
        if held is _ABSENT:
            held = self._load(store_key)
        return held if self._are_objects or held is MISSING else self._readable(held, store_key)

    def __contains__(self, key: Any) -> bool:
        return self.get(key) is not MISSING

    def _load(self, store_key: bytes) -> Any:
        version = self._version
        held = self._older.get(store_key, _ABSENT)
        if held is _ABSENT:
            data = self._read(store_key)
            held = MISSING if data is None else unpack(data, table=self.name)[0]
            if self._are_objects and held is not MISSING:
                held = self._readable(held, store_key)
        if len(self._cache) >= self._cached_values:
            self._older, self._cache = self._cache, {}
        self._cache[store_key] = held
        if self._version != version:
            self._cache.pop(store_key, None)
            self._older.pop(store_key, None)
        return held

    def _read(self, store_key: bytes) -> bytes | None:
        try:
            return self._store_get(store_key)
        except StateCorruptedError as error:
            self.damage = error
            raise

    def _readable(self, payload: bytes, store_key: bytes) -> Any:
        """A stored value decoded; one that today's type does not read counts as passed over, like a record."""
        try:
            return self._values.decoded(payload, self._decode_key(store_key))
        except StateError as error:
            if not self._told:
                self._told = True
                logger.warning("%s; until then such keys are read as if there were no value", error)
            return MISSING

    def entries(self, start: bytes | None, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[Any, Any]]:
        """Keys and values of a range in key order, as they are at the time of the call.

        Args:
            start: First store key, inclusive; None for the beginning.
            stop: End, exclusive; None for the end.
            reverse: From the end to the start.
        """
        return self._decoded(self._store.scan(self.name, start, stop, reverse=reverse))

    def _decoded(self, pairs: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[Any, Any]]:
        try:
            for store_key, data in pairs:
                value = self._readable(unpack(data, table=self.name)[0], store_key)
                if value is not MISSING:
                    yield self._decode_key(store_key), value
        except StateCorruptedError as error:
            self.damage = error
            raise

    # --- writing: one at a time --------------------------------------------------------------------------------

    def write(self, changes: Mapping[bytes, bytes | None], checkpoint: Checkpoint) -> None:
        """Take changes and record how far they reach; blocks.

        Args:
            changes: Store keys to packed values, None deletes.
            checkpoint: What they reach.

        Raises:
            StateFullError: No room; the same may be written again.
            StateCorruptedError: The store is damaged.
        """
        batch = StoreBatch(checkpoint)
        batch.changes[self.name] = dict(changes)
        try:
            self._store.write(batch)
        except StateCorruptedError as error:
            self.damage = error
            raise
        self._forget(changes)

    def _forget(self, keys: Mapping[bytes, bytes | None]) -> None:
        self._version += 1
        if len(keys) > len(self._cache) + len(self._older):
            self._cache, self._older = {}, {}
            return
        for key in keys:
            self._cache.pop(key, None)
            self._older.pop(key, None)

    def clear(self, checkpoint: Checkpoint) -> None:
        """Drop everything, to be filled anew; blocks.

        Args:
            checkpoint: What is recorded before anything is dropped, so that a crash in between leaves no holes.
        """
        self._store.write(StoreBatch(checkpoint))
        self._store.clear(self.name)
        self._version += 1
        self._cache, self._older = {}, {}

    def close(self) -> None:
        """Let go of the store; blocks."""
        self._store.close()
