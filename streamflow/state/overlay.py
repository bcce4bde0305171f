"""One table's values in one task: those that are not in the local store yet, over the store.

From the newest to the oldest:

- `dirty`: written, and in no commit yet: by turns that are done, and by the plain stages of the one in progress, whose
  writes are taken out while a commit is sealed (`state/undo.py`);
- sealed: in a commit that the log has not confirmed yet, one layer per commit;
- settled: committed, and waiting in memory for the next write of the store (or being written);
- the store.

`live` is a cache over all of them, which may be emptied at any moment. Committed reads look at the settled layers and
the store only. Above the store all layers are by key, with what is held of it; store keys and packed values are made
where the store is written, since most values are written again before that.

Invariants: a key's newest value is in `live` or found in the layers below; nothing enters the store that the log has
not committed; a layer moves down whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from streamflow.errors import ProductionError, StateCorruptedError
from streamflow.model.serde import BoundCodec
from streamflow.state.format import pack, unpack, unpack_expiry
from streamflow.state.keys import KeyOrder
from streamflow.state.memory_index import MemoryIndex
from streamflow.state.merge import merged
from streamflow.state.store import Store
from streamflow.state.values import MISSING, Values

Layer = dict[Any, Any]
"""Keys to what is held of them; `MISSING` deletes."""
Record = tuple[bytes, bytes | None, int]
"""A changelog record: key, value, timestamp in milliseconds."""
Append = Callable[[Iterable[Record]], None]
"""Adds changelog records."""
Changes = dict[bytes, bytes | None]
"""Store keys to values as the store has them; None deletes."""

ABSENT: Any = object()
"""Stands for what a layer says nothing about."""


class Packed:
    """A layer on its way into the store: packed when it is asked for, in the thread that writes the store.

    Args:
        layer: The layer, which nobody changes any more.
        pack_item: Makes store key and stored value of a key and what is held of it.
    """

    __slots__ = ("_layer", "_pack_item")

    def __init__(self, layer: Layer, pack_item: Callable[[tuple[Any, Any]], tuple[bytes, bytes | None]]) -> None:
        self._layer = layer
        self._pack_item = pack_item

    def __len__(self) -> int:
        return len(self._layer)

    def items(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Store keys and values as the store has them; None deletes."""
        return map(self._pack_item, self._layer.items())


class Overlay:
    """One table of one task.

    Args:
        name: The table's name.
        partition: The task's partition.
        keys: Order-preserving encoding of its keys.
        key_codec: Writes keys as the changelog has them.
        values: How its values are held.
        store: The task's store.
        live_entries: How many values `live` holds, about.
        ttl_ms: How long a value lives after its last write, in stream time; None for ever.
        check_home: Told keys that are new, and their bytes in the changelog: raises for one of another partition.
        damaged: Told when the store turns out to be damaged, before whoever reads learns it by the error.
        max_key_bytes: Largest key, as the changelog has it.

    Attributes:
        live: See the module.
        memory: The keys of all layers above the store, where scans ask for them.
        dirty: See the module.
        stream_time_ms: Greatest timestamp of the turns that are done; moves expiry.
        committed_stream_time_ms: The same of what is committed.
        settling: Counts up when a commit begins to be settled, and again when it is: even, and the same before and
            after, says to who reads in another thread that what is committed did not change meanwhile.
        sure_key_type: See `KeyOrder`.
    """

    def __init__(
        self,
        name: str,
        partition: int,
        *,
        keys: KeyOrder,
        key_codec: BoundCodec[Any],
        values: Values,
        store: Store,
        live_entries: int,
        ttl_ms: int | None = None,
        check_home: Callable[[Any, bytes], None] | None = None,
        damaged: Callable[[StateCorruptedError], None] | None = None,
        max_key_bytes: int = 64 * 1024,
    ) -> None:
        self.name = name
        self.partition = partition
        self.keys = keys
        self.values = values
        self.ttl_ms = ttl_ms
        self.live: Layer = {}
        self.dirty: Layer = {}
        self.stream_time_ms = -1
        self.committed_stream_time_ms = -1
        self.settling = 0
        self.sure_key_type = keys.sure_type
        self._older: Layer = {}
        self._renewing = threading.Lock()
        self._live_entries = max(1024, live_entries // 2)
        # Other threads read what follows while the event loop moves layers down: each step leaves every value visible
        # to who looks from the newest to the oldest.
        self._sealed: tuple[Layer, ...] = ()
        self._settled: Layer = {}
        self._being_stored: Layer = {}
        self._is_stored_in_vain = False
        self.memory = MemoryIndex()
        self._committed_memory = MemoryIndex()
        self._store = store
        self._store_get = store.getter(name)
        self._encode_key = keys.encode
        self._changelog_key: Callable[[Any], bytes | None] = key_codec.encode if keys.is_canonical else self._canonical
        self._key_codec = key_codec
        self._check_home = check_home
        self._damaged = damaged or _nobody_is_told
        self._telling_of_damage = _Telling(self._damaged)
        self._max_key_bytes = max_key_bytes

    # --- what turns do -----------------------------------------------------------------------------------------

    def find(self, key: Any, time_ms: int = -1) -> Any:
        """What is held of a key's newest value, those in no commit yet included; `MISSING` where there is none.

        Args:
            key: The key.
            time_ms: Event time of the asking turn, where values expire.
        """
        held = self.live.get(key, ABSENT)
        if held is ABSENT:
            held = self.load(key)
        return held if self.ttl_ms is None or held is MISSING else self._unexpired(held, time_ms)

    def load(self, key: Any) -> Any:
        """What is held of a key that is not in `live`, which it joins; in a thread, too, while others are merged."""
        live = self.live
        held = self._older.get(key, ABSENT)
        if held is ABSENT:
            held = self.dirty.get(key, ABSENT)
        if held is ABSENT:
            held = self._newest(key)
        if len(live) >= self._live_entries:
            self._renew_live(live)
        return live.setdefault(key, held)  # what was merged since the look stays

    def _renew_live(self, live: dict[Any, Any]) -> None:
        """Begin `live` anew. `_older` is always the one before: what was merged into it has to be found there first."""
        with self._renewing:
            if live is self.live:
                self._older, self.live = live, {}

    def _newest(self, key: Any) -> Any:
        held = self._sealed_or_committed(key)
        return self._in_store(key) if held is ABSENT else held

    def _newest_committed(self, key: Any) -> Any:
        held = self._committed_in_memory(key)
        return self._in_store(key) if held is ABSENT else held

    def _sealed_or_committed(self, key: Any) -> Any:
        for layer in self._sealed:
            held = layer.get(key, ABSENT)
            if held is not ABSENT:
                return held
        return self._committed_in_memory(key)

    def _committed_in_memory(self, key: Any) -> Any:
        held = self._settled.get(key, ABSENT)
        return self._being_stored.get(key, ABSENT) if held is ABSENT else held

    def _in_store(self, key: Any) -> Any:
        store_key = self._encode_key(key)
        try:
            return self._held(self._store_get(store_key), key)
        except StateCorruptedError as error:  # `with` would cost time where each record has a key of its own
            self._damaged(error)
            raise

    def _held(self, data: bytes | None, key: Any) -> Any:
        if data is None:
            return MISSING
        payload, expires_ms = unpack(data, table=self.name)
        held = self.values.from_payload(payload, key)
        return held if self.ttl_ms is None else (expires_ms, held)

    def _canonical(self, key: Any) -> bytes | None:
        """The changelog's bytes of a key whose equals may be written otherwise: 0.0 and -0.0, a time in two zones."""
        return self._key_codec.encode(self.keys.decode(self._encode_key(key)))

    def take_back(self, store_key: bytes) -> None:
        """Write the committed value of a key once more, over what the changelog has of it."""
        key = self.keys.decode(store_key)
        self._write_again(key, self._newest_committed(key))

    def write_again(self, store_key: bytes, data: bytes | None) -> None:
        """Write a key without a turn.

        Args:
            store_key: As the store has it.
            data: Its value as the store has it; None deletes.
        """
        key = self.keys.decode(store_key)
        with self._telling_of_damage:
            held = self._held(data, key)
        self._write_again(key, held)

    def _write_again(self, key: Any, held: Any) -> None:
        self.dirty[key] = held
        if self.memory.is_in_use:
            self.index([key])

    def is_committed(self, store_key: bytes) -> bool:
        """Whether a key has a committed value."""
        held = self._committed_in_memory(self.keys.decode(store_key))
        if held is not ABSENT:
            return held is not MISSING
        with self._telling_of_damage:
            return self._store_get(store_key) is not None

    def advance(self, timestamp_ms: int) -> None:
        """Move stream time."""
        if timestamp_ms > self.stream_time_ms:
            self.stream_time_ms = timestamp_ms

    def _unexpired(self, held: Any, time_ms: int) -> Any:
        expires_ms, value = held
        return MISSING if expires_ms is not None and expires_ms <= max(self.stream_time_ms, time_ms) else value

    def check_key(self, key: Any) -> None:
        """Check a key that is new.

        Raises:
            ProductionError: It is not of the table's key type, cannot be written, or belongs to another partition.
        """
        if key is None:
            raise ProductionError(f"table {self.name!r}: a key cannot be None")
        self.keys.check(key)  # first: it names the table
        data = self._key_codec.encode(key)
        if data is None:
            raise ProductionError(f"table {self.name!r}: the key {key!r} is written as null, so it cannot be one")
        if len(data) > self._max_key_bytes:
            raise ProductionError(
                f"table {self.name!r}: a key of {len(data):,} bytes is too large; {self._max_key_bytes:,} are the limit"
            )
        if self._check_home is not None:
            self._check_home(key, data)

    def check_equal_key(self, key: Any) -> None:
        """Check a key that equals a known one and may yet be of another type, as True equals 1.

        Raises:
            ProductionError: It is not of the table's key type.
        """
        if not self.keys.equal_is_same:
            self.keys.check(key)

    def merge(self, writes: Mapping[Any, Any]) -> None:
        """Take what a turn that is done has written, in the order of its records."""
        if self.ttl_ms is not None:
            expires_ms = self.stream_time_ms + self.ttl_ms
            writes = {key: held if held is MISSING else (expires_ms, held) for key, held in writes.items()}
        self.live.update(writes)
        self.dirty.update(writes)
        if self.memory.is_in_use:
            self.index(writes)

    def take_out(self, key: Any, live_before: Any, dirty_before: Any) -> None:
        """Undo a write that is not sealed.

        Args:
            key: The key.
            live_before: What `live` had of it before, `ABSENT` for nothing.
            dirty_before: The same of `dirty`.
        """
        if live_before is ABSENT:
            self.live.pop(key, None)
            self._older.pop(key, None)  # where `live` was begun anew since
        else:
            self.live[key] = live_before
        if dirty_before is ABSENT:
            self.dirty.pop(key, None)
        else:
            self.dirty[key] = dirty_before

    def index(self, writes: Iterable[Any]) -> None:
        """Add keys to the index of what is in memory, which is in use."""
        self.memory.add(map(self._encode_key, writes), writes)

    # --- iteration ---------------------------------------------------------------------------------------------

    def entries(
        self,
        start: bytes | None,
        stop: bytes | None,
        *,
        reverse: bool = False,
        writes: Mapping[Any, Any] | None = None,
        time_ms: int = -1,
        committed: bool = False,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Store keys and payloads of a range in key order, as they are at the time of the call.

        Args:
            start: First key, inclusive; None for the beginning.
            stop: End, exclusive; None for the end.
            reverse: From the end to the start.
            writes: What the asking turn has written itself.
            time_ms: Its event time, where values expire.
            committed: Committed values only.
        """
        if committed:
            now_ms = self.committed_stream_time_ms
            changes, _ = self._committed_changes(start, stop, None, now_ms)
        else:
            now_ms = max(self.stream_time_ms, time_ms)
            changes = self._changes(start, stop, writes)
        return self._over_store(changes, start, stop, reverse=reverse, now_ms=now_ms)

    def first_committed(self, start: bytes, stop: bytes | None, count: int) -> Iterator[tuple[bytes, bytes]]:
        """The first committed entries of a range, in key order: `count` of them, or more, or all that there are.

        They are as at one moment where `settling` says so. What is in memory behind them is not looked at: who reads a
        table page by page would look at all of it with each page.

        Args:
            start: First key, inclusive.
            stop: End, exclusive; None for the end.
            count: How many are wanted, >= 1.
        """
        now_ms = self.committed_stream_time_ms
        changes, stop = self._committed_changes(start, stop, count, now_ms)
        return self._over_store(changes, start, stop, reverse=False, now_ms=now_ms)

    def _over_store(
        self, changes: Changes, start: bytes | None, stop: bytes | None, *, reverse: bool, now_ms: int
    ) -> Iterator[tuple[bytes, bytes]]:
        with self._telling_of_damage:
            stored = self._store.scan(self.name, start, stop, reverse=reverse)
        return self._payloads(merged(stored, changes, start, stop, reverse=reverse), now_ms)

    def _committed_changes(
        self, start: bytes | None, stop: bytes | None, count: int | None, now_ms: int
    ) -> tuple[Changes, bytes | None]:
        """What is in memory of a range, up to `count` values that live; and where that ends."""
        memory = self._committed_memory
        if not memory.is_in_use:
            memory.fill(lambda: self._keys_of(self._settled, self._being_stored))
        changes: Changes = {}
        alive = 0
        for store_key, key in memory.walk(start, stop):
            held = self._committed_in_memory(key)
            if held is ABSENT:
                continue
            changes[store_key] = self._pack(held)
            alive += self._lives(held, now_ms)
            if alive == count:
                return changes, store_key + b"\0"
        return changes, stop

    def _lives(self, held: Any, now_ms: int) -> bool:
        if held is MISSING:
            return False
        return self.ttl_ms is None or held[0] is None or held[0] > now_ms

    def _changes(self, start: bytes | None, stop: bytes | None, writes: Mapping[Any, Any] | None) -> Changes:
        """What is in memory of a range; the index spares a look at all the rest for each of many small scans."""
        memory = self.memory
        if not memory.is_in_use:
            memory.fill(lambda: self._keys_of(self.dirty, *self._sealed, self._settled, self._being_stored))
        changes: Changes = {}
        for store_key, key in memory.between(start, stop):
            held = self.dirty.get(key, ABSENT)
            if held is ABSENT:
                held = self._sealed_or_committed(key)
            if held is not ABSENT:  # else it is in the store meanwhile, or its turn was undone
                changes[store_key] = self._pack(held)
        if writes:
            changes.update(self._as_changes(writes if self.ttl_ms is None else self._never_expiring(writes)))
        return changes

    def _keys_of(self, *layers: Layer) -> Iterator[tuple[Iterable[bytes], Iterable[Any]]]:
        """Store keys and keys of layers, from the newest to the oldest.

        Each is copied at once: where a turn runs in a thread, values move to older layers meanwhile, and new ones come.
        """
        for layer in layers:
            keys = list(layer)
            yield map(self._encode_key, keys), keys

    def _payloads(self, pairs: Iterator[tuple[bytes, bytes]], now_ms: int) -> Iterator[tuple[bytes, bytes]]:
        with self._telling_of_damage:
            for key, data in pairs:
                payload, expires_ms = unpack(data, table=self.name)
                if expires_ms is None or expires_ms > now_ms:
                    yield key, payload

    def _as_changes(self, held: Mapping[Any, Any]) -> Changes:
        return dict(map(self._pack_item, held.items()))

    def _never_expiring(self, writes: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: held if held is MISSING else (None, held) for key, held in writes.items()}

    def _pack_item(self, item: tuple[Any, Any]) -> tuple[bytes, bytes | None]:
        key, held = item
        return self._encode_key(key), self._pack(held)

    def _pack(self, held: Any) -> bytes | None:
        if held is MISSING:
            return None
        if self.ttl_ms is None:
            return pack(self.values.payload(held), None)
        expires_ms, value = held
        return pack(self.values.payload(value), expires_ms)

    def stored_key_after(self, start: bytes, count: int) -> bytes | None:
        """The key in the store that has `count` others before it from `start` on; None where there are fewer."""
        with self._telling_of_damage:
            found = next(islice(self._store.scan(self.name, start, None), count, None), None)
        return None if found is None else found[0]

    # --- committed reads ---------------------------------------------------------------------------------------

    def committed(self, key: Any) -> Any:
        """What is held of a key's committed value; `MISSING` where there is none."""
        held = self._newest_committed(key)
        if self.ttl_ms is None or held is MISSING:
            return held
        expires_ms, value = held
        return MISSING if expires_ms is not None and expires_ms <= self.committed_stream_time_ms else value

    # --- commits -----------------------------------------------------------------------------------------------

    def seal(self, append: Append, now_ms: int) -> bool:
        """Close the layer of dirty values and write them as changelog records.

        Args:
            append: Takes the records, one per changed key.
            now_ms: Their timestamp where values do not expire.

        Returns:
            Whether there were any.
        """
        dirty = self.dirty
        if not dirty:
            return False
        append(self._plain_records(dirty, now_ms) if self.ttl_ms is None else self._expiring_records(dirty))
        self._sealed = (dirty, *self._sealed)
        self.dirty = {}  # last: a turn in a thread that finds nothing here looks into what was sealed
        if len(self.live) >= self._live_entries:
            self._renew_live(self.live)
        return True

    def _plain_records(self, dirty: Layer, now_ms: int) -> Iterator[Record]:
        key_of: Callable[[Any], Any] = self._encode_key if self.keys.same_as_serialized else self._changelog_key
        payload_of = self.values.payload
        return ((key_of(key), None if held is MISSING else payload_of(held), now_ms) for key, held in dirty.items())

    def _expiring_records(self, dirty: Layer) -> Iterator[Record]:
        """The record's timestamp is that of the write, so that a restore finds the same expiry."""
        ttl_ms = self.ttl_ms or 0
        for key, held in dirty.items():
            changelog_key: Any = self._changelog_key(key)
            if held is MISSING:
                yield changelog_key, None, max(0, self.stream_time_ms)
            else:
                expires_ms, value = held
                yield changelog_key, self.values.payload(value), max(0, (expires_ms or 0) - ttl_ms)

    def settle(self) -> None:
        """The log has committed the oldest sealed layer."""
        layer = self._sealed[-1]
        self.settling += 1
        if self._committed_memory.is_in_use:
            self._committed_memory.add(map(self._encode_key, layer), layer)
        if self._settled:
            self._settled.update(layer)
        else:
            self._settled = layer
        self._sealed = self._sealed[:-1]
        self.settling += 1

    # --- the store ---------------------------------------------------------------------------------------------

    @property
    def settled_entries(self) -> int:
        """How many committed values wait for the store."""
        return len(self._settled) + (len(self._being_stored) if self._is_stored_in_vain else 0)

    def take_settled(self) -> Packed:
        """What is to be written to the store now; it stays readable until `stored`."""
        self._being_stored = {**self._being_stored, **self._settled} if self._being_stored else self._settled
        self._settled = {}
        self._is_stored_in_vain = False
        return Packed(self._being_stored, self._pack_item)

    def stored(self) -> None:
        """What `take_settled` gave is in the store."""
        self._being_stored = {}
        self.memory = MemoryIndex()
        self._committed_memory = MemoryIndex()

    def not_stored(self) -> None:
        """What `take_settled` gave is not in the store: it waits again."""
        self._is_stored_in_vain = True

    # --- expiry ------------------------------------------------------------------------------------------------

    def expired(self, after: bytes, limit: int) -> tuple[list[Any], bytes | None]:
        """Keys whose values have expired and are still in the store.

        Args:
            after: Where to begin, a store key.
            limit: How many stored values to look at.

        Returns:
            The keys, and where to go on; None at the end.
        """
        with self._telling_of_damage:
            return self._expired(after, limit)

    def _expired(self, after: bytes, limit: int) -> tuple[list[Any], bytes | None]:
        found: list[Any] = []
        for number, (store_key, data) in enumerate(self._store.scan(self.name, after, None)):
            if number == limit:
                return found, store_key
            expires_ms = unpack_expiry(data, table=self.name)
            if expires_ms is not None and expires_ms <= self.stream_time_ms:
                key = self.keys.decode(store_key)
                if not self._is_renewed(key):
                    found.append(key)
        return found, None

    def _is_renewed(self, key: Any) -> bool:
        """Whether something in memory is newer than the expired value in the store: one that lives, or a deletion."""
        held = self.dirty.get(key, ABSENT)
        if held is ABSENT:
            held = self._sealed_or_committed(key)
        if held is ABSENT:
            return False
        return held is MISSING or held[0] is None or held[0] > self.stream_time_ms


class _Telling:
    """A block that reads the store: who has to know of damage is told before the error goes on."""

    __slots__ = ("_damaged",)

    def __init__(self, damaged: Callable[[StateCorruptedError], None]) -> None:
        self._damaged = damaged

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, StateCorruptedError):
            self._damaged(error)


def _nobody_is_told(_: StateCorruptedError) -> None:
    """The error says it all to who reads."""
