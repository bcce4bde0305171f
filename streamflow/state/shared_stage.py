"""A table in the hands of several turns in progress at once: `concurrency=N`, several agents, a worker thread.

Turns may be done in another order than that of their records, and join the task's values in the order of the records.
Until then what they have written waits, with the record's number. A turn sees what records up to its own have written,
never what later ones have: those are committed after it, or not at all.

Invariant: no update is lost. Of two turns that write one key, the one that cannot have seen the other's write fails.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from streamflow.errors import ProcessingError
from streamflow.state.overlay import Overlay
from streamflow.state.stage import Effects, Stage

_ABSENT: Any = object()

Version = tuple[int, Any, Effects]
"""What waits of a key: number of the record, what is held, the turn's effects."""

_NUMBER: Callable[[Version], int] = itemgetter(0)


class Waiting:
    """The writes of one table by turns that are in progress, or done while an earlier record is not.

    Turns in threads end, read and claim keys while the event loop merges others: each look at `done` or `writers` is
    one step, and what is found there is never changed; `changing` is held by who replaces it.

    Args:
        overlay: The table.

    Attributes:
        done: By key, in the order of the records.
        writers: The turn in progress that has written a key.
        changing: Held while `done` is changed.
    """

    __slots__ = ("changing", "done", "overlay", "writers")

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self.changing = threading.Lock()
        self.done: dict[Any, tuple[Version, ...]] = {}
        self.writers: dict[Any, Stage] = {}

    @property
    def is_empty(self) -> bool:
        """Whether every turn's writes have joined the task's values."""
        return not self.done and not self.writers

    def at(self, number: int) -> dict[Any, Any]:
        """What waits for the turn of a record to see, by key."""
        found = ((key, at_number(versions, number, _ABSENT)) for key, versions in list(self.done.items()))
        return {key: held for key, held in found if held is not _ABSENT}


def at_number(versions: tuple[Version, ...] | None, number: int, otherwise: Any) -> Any:
    """What is held of a key for the turn of a record.

    Args:
        versions: See `Waiting.done`.
        number: The record's number.
        otherwise: What to return where nothing up to it waits.
    """
    at = bisect_right(versions, number, key=_NUMBER) if versions else 0
    return versions[at - 1][1] if versions and at else otherwise


class SharedEffects(Effects):
    """Effects that turns of later records see before they are merged.

    Args:
        waiting: Where they see them.
        writes: See `Effects`.
        time_ms: See `Effects`.
        number: The record's number.
    """

    __slots__ = ("_waiting",)

    def __init__(self, waiting: Waiting, writes: dict[Any, Any], time_ms: int, number: int) -> None:
        super().__init__(waiting.overlay, writes, time_ms)
        self._waiting = waiting
        done = waiting.done
        with waiting.changing:
            for key, held in writes.items():
                versions = done.get(key, ())
                at = bisect_right(versions, number, key=_NUMBER)
                done[key] = (*versions[:at], (number, held, self), *versions[at:])

    def merge(self) -> None:
        super().merge()
        done = self._waiting.done
        with self._waiting.changing:
            for key in self.writes:
                left = tuple(version for version in done[key] if version[2] is not self)
                if left:
                    done[key] = left
                else:
                    del done[key]


class SharedStage(Stage):
    """A table in the hands of one of several turns in progress at once.

    Args:
        waiting: What the task's turns share of the table.
        touched: See `Stage`.
        number: The number of the record in hand, of the last one for a unit.
    """

    __slots__ = ("_claimed", "_number", "_seen", "_waiting")

    def __init__(self, waiting: Waiting, touched: Callable[[Stage], None], number: Callable[[], int]) -> None:
        super().__init__(waiting.overlay, touched)
        self._waiting = waiting
        self._number = number
        # What the turn found when it first looked at a key.
        self._seen: dict[Any, Any] = {}
        self._claimed: set[Any] = set()

    def _find(self, key: Any) -> Any:
        held = self._newest(key)
        if key not in self._seen:
            self._seen[key] = held
            self._touched(self)
        return held

    def _newest(self, key: Any) -> Any:
        held = at_number(self._waiting.done.get(key), self._number(), _ABSENT)
        return self.overlay.find(key, self.time_ms) if held is _ABSENT else held

    def set(self, key: Any, value: Any) -> None:
        self._claim(key)
        super().set(key, value)

    def delete(self, key: Any) -> None:
        self._claim(key)
        super().delete(key)

    def _claim(self, key: Any) -> None:
        """Be the only turn in progress that writes a key, on what it found there.

        Raises:
            ProcessingError: Another one has written it meanwhile.
        """
        self._touched(self)
        writer = self._waiting.writers.setdefault(key, self)
        if writer is self:
            self._claimed.add(key)
        if writer is not self or (key not in self.writes and self._has_changed(key)):
            raise ProcessingError(
                f"table {self.overlay.name!r}: two records in progress at once write the key {key!r}, and one would "
                "undo the other: key the table by the record's key (records of one key are processed in order), or "
                "leave concurrency= out"
            )

    def _has_changed(self, key: Any) -> bool:
        """Whether a later record's turn has written a key, or an earlier one's since this one looked at it."""
        versions = self._waiting.done.get(key)
        if versions and versions[-1][0] > self._number():
            return True
        before = self._seen.get(key, _ABSENT)
        return before is not _ABSENT and not self.overlay.values.are_same(before, self._newest(key))

    def _saw(self, key: Any, held: Any) -> None:
        if key not in self._seen and key not in self.writes:
            self._seen[key] = held
            self._touched(self)

    def _visible_writes(self) -> dict[Any, Any]:
        return {**self._waiting.at(self._number()), **self.writes}

    def _write(self, key: Any, held: Any) -> None:
        self._claim(key)
        super()._write(key, held)

    def _effects(self) -> Effects:
        return SharedEffects(self._waiting, self.writes, self.time_ms, self._number())

    def _forget(self) -> None:
        for key in self._claimed:
            del self._waiting.writers[key]
        self._claimed, self._seen = set(), {}
        super()._forget()
