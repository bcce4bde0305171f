"""The contract of a task's local state: ordered bytes keys to bytes values, a column family per table, one checkpoint.

The changelogs are the truth and a store is a copy that may lag behind them, never lead: only values that the log has
committed are written, and the checkpoint says up to where of each changelog they reach. A killed process loses nothing
that `write` returned for; a dead machine may lose the end, checkpoint and entries alike.

Threads: one thread writes at a time; any number read meanwhile. `close` is called when nobody reads or writes.
"""

from __future__ import annotations

import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from streamflow.state.identity import Difference, Identity

logger = logging.getLogger(__name__)

META = "meta"
"""Name of the column family of checkpoint and identity; tables get names of their own kind."""


class Checkpoint(msgspec.Struct, frozen=True):
    """How far a store has come.

    Args:
        changelogs: By table: the next offset to read of its changelog. A table that is missing starts at the beginning.
        inputs: By source topic: the next offset to process.
        commit_id: Id of the last commit whose effects are in the store; empty when there is none.
        caught_up_at_ms: Wall-clock time at which the store was last known to be level with the log, milliseconds since
            the epoch; 0 for never.
    """

    changelogs: Mapping[str, int] = {}
    inputs: Mapping[str, int] = {}
    commit_id: str = ""
    caught_up_at_ms: int = 0

    def encode(self) -> bytes:
        """The checkpoint as bytes."""
        return _encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Checkpoint:
        """Read what `encode` made.

        Raises:
            msgspec.MsgspecError: The bytes are something else.
        """
        return _decode(data)

    def without(self, tables: frozenset[str]) -> Checkpoint:
        """The same, with those tables starting at the beginning."""
        kept = {table: offset for table, offset in self.changelogs.items() if table not in tables}
        return msgspec.structs.replace(self, changelogs=kept)


_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(Checkpoint).decode


class Changes(Protocol):
    """Changes of one table: store keys to new values, None to delete."""

    def __len__(self) -> int: ...

    def items(self) -> Iterable[tuple[bytes, bytes | None]]:
        """The changes, in their order; each call begins anew."""
        ...


class StoreBatch:
    """Changes of several tables and the checkpoint that covers them.

    Changes take effect in the order in which they were given; the last one of a key counts. All changes of a table may
    be put straight into `changes[table]`, where it has no others.

    Args:
        checkpoint: What the store records with it; None leaves the recorded one.

    Attributes:
        ranges: By table: ranges to delete, (start inclusive, stop exclusive or None for the end), before its changes.
        changes: By table: key to new value, None to delete.
    """

    __slots__ = ("changes", "checkpoint", "ranges")

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self.ranges: dict[str, list[tuple[bytes, bytes | None]]] = {}
        self.changes: dict[str, Changes] = {}

    def __len__(self) -> int:
        """Number of changes and ranges."""
        return sum(map(len, self.changes.values())) + sum(map(len, self.ranges.values()))

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set a key."""
        self._own_changes(table)[key] = value

    def delete(self, table: str, key: bytes) -> None:
        """Delete a key, whether there is one or not."""
        self._own_changes(table)[key] = None

    def _own_changes(self, table: str) -> dict[bytes, bytes | None]:
        changes = self.changes.setdefault(table, {})
        assert isinstance(changes, dict)
        return changes

    def delete_range(self, table: str, start: bytes = b"", stop: bytes | None = None) -> None:
        """Delete all keys of a range, those put into this batch before included.

        Args:
            table: The table.
            start: First key, inclusive.
            stop: End, exclusive; None for the end of the table.
        """
        if stop is not None and stop <= start:
            return
        if self.changes.get(table):
            changes = self._own_changes(table)
            for key in [key for key in changes if key >= start and (stop is None or key < stop)]:
                del changes[key]
        self.ranges.setdefault(table, []).append((start, stop))


@dataclass(frozen=True, slots=True)
class SetAside:
    """A store that was not used and not deleted.

    Args:
        reason: One word, part of the new name.
        text: Why, for people.
        path: Where it is now; empty for a store in memory, which is gone.
    """

    reason: str
    text: str
    path: str


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Figures of one store, estimates where counting would cost.

    Args:
        entries: By table: about how many keys.
        bytes_on_disk: Size of its files; 0 in memory.
        bytes_in_memory: Its write buffers (and, in memory, everything).
        files: Number of its data files; 0 in memory.
    """

    entries: Mapping[str, int]
    bytes_on_disk: int
    bytes_in_memory: int
    files: int


class Store(ABC):
    """The local state of one task. Every call after `close` raises `ClosedError`.

    Attributes:
        path: Its directory.
        identity: What it belongs to.
        set_aside: The store that stood in its place and did not fit, None when there was none.
    """

    path: str
    identity: Identity
    set_aside: SetAside | None

    @property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """What the last write that had one recorded; an empty one for a new store."""

    @abstractmethod
    def get(self, table: str, key: bytes) -> bytes | None:
        """Read one value.

        Raises:
            KeyError: There is no such table.
            StateCorruptedError: The stored bytes are damaged.
        """

    @abstractmethod
    def getter(self, table: str) -> Callable[[bytes], bytes | None]:
        """`get` of one table, for many calls."""

    @abstractmethod
    def get_many(self, table: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Read several values, in the order of their keys; raises as `get`."""

    @abstractmethod
    def scan(
        self, table: str, start: bytes | None = None, stop: bytes | None = None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Iterate over a range in key order; the values are those of the moment of the call, whatever is written later.

        Args:
            table: The table.
            start: First key, inclusive; None for the first there is.
            stop: End, exclusive; None for after the last.
            reverse: From the end to the start.

        Raises:
            KeyError: There is no such table.
            StateCorruptedError: While iterating: the stored bytes are damaged.
            ClosedError: While iterating: the store was closed.
        """

    @abstractmethod
    def write(self, batch: StoreBatch) -> None:
        """Apply a batch and record its checkpoint; blocks, so call it in a worker thread when it is large.

        The checkpoint is recorded together with the last changes, never before any of them. Up to `ATOMIC_CHANGES`
        changes of at most `ATOMIC_BYTES` are one atomic write. A larger batch goes in slices, so that other threads run
        in between (the native library holds the interpreter's lock while it writes): a process killed half-way leaves
        some of its changes under the old checkpoint, and since the log has committed them, replay from there makes them
        whole. A reader of another thread may see a part of a large batch; keep what is being written readable above the
        store.

        Raises:
            StateFullError: No room; the checkpoint is as before, and the same batch may be written again.
            StateCorruptedError: The store is damaged.
            KeyError: A table is not known; nothing was written.
        """

    @abstractmethod
    def clear(self, table: str) -> None:
        """Drop all entries of a table together with its position in the checkpoint: it will be restored from the start.

        For a deletion that belongs to a commit use `StoreBatch.delete_range`.
        """

    @abstractmethod
    def stats(self) -> StoreStats:
        """Figures for metrics and people; cheap enough for every few seconds."""

    @abstractmethod
    def flush(self) -> None:
        """Move what was written into data files, so that the next open has nothing to replay; blocks."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; its iterators end with `ClosedError`. Does nothing when it is closed. Blocks briefly."""


ATOMIC_CHANGES = 512
"""How many changes `Store.write` makes in one atomic step; about half a millisecond."""

ATOMIC_BYTES = 512 * 1024
"""How many bytes of changes it makes in one atomic step, up to the size of the 64 next changes more."""


class Stores(ABC):
    """Where the stores of a process come from; they share its memory budget."""

    @abstractmethod
    def open(self, path: str, identity: Identity) -> Store:
        """Open the store in a directory, or make one.

        What does not fit its identity, is damaged or was written by a newer version is set aside, reported in the log
        and in `Store.set_aside`, and a new one is made. Tables that are declared no more are dropped; new ones are
        added, empty and without a position in the checkpoint.

        Args:
            path: Its directory; parents are made.
            identity: What it belongs to.

        Raises:
            StateLockedError: A live process has it open.
            StateFullError: No room.
            StateRefusedError: The directory cannot be used.
        """

    @abstractmethod
    def peek(self, path: str) -> Checkpoint | None:
        """The checkpoint of a store that nobody has open, which is left as it is.

        Args:
            path: Its directory.

        Returns:
            None when there is no store, or it cannot be read.

        Raises:
            StateLockedError: Somebody has it open.
        """

    @abstractmethod
    def set_aside(self, path: str, reason: str, text: str) -> SetAside | None:
        """Move a closed store out of the way, so that the next `open` makes a new one.

        Args:
            path: Its directory.
            reason: One word, which becomes part of the new name, as in `0.aside-20250102T030405Z-stale`.
            text: Why, for the log.

        Returns:
            Where it went; None when there was none.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every store that is still open; the object can be used again. Idempotent."""


def name_aside(path: str, reason: str, *, now_s: float | None = None) -> str:
    """A free name for a store that is set aside."""
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    wanted = f"{path}.aside-{at}-{re.sub(r'[^a-z0-9]+', '-', reason.lower())}"
    name, number = wanted, 1
    while os.path.lexists(name):
        number += 1
        name = f"{wanted}-{number}"
    return name


def report_set_aside(path: str, aside: SetAside) -> None:
    """Say in the log that a store was set aside."""
    where = f"moved to {aside.path}; delete it when you do not need it" if aside.path else "dropped from memory"
    logger.warning(
        "state %s cannot be used: %s. It was %s. The task is restored from its changelogs", path, aside.text, where
    )


def dropped_tables(stored: Identity, wanted: Identity) -> frozenset[str]:
    """Tables whose entries and positions are no longer valid, because they are declared no more or were not before."""
    return frozenset(stored.tables.keys() ^ wanted.tables.keys())


def damaged(exc: Exception | str) -> Difference:
    """What is said of a store that cannot be read."""
    return Difference("damaged", f"it is damaged ({exc})")
