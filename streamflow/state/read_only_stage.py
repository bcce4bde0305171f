"""What a turn sees of a table that is filled from a topic: it reads, and has nothing to join when it is done.

It sees what the topic said before its record, whatever else of the task is in progress: records that fill the table
wait with their numbers like the writes of turns (`shared_stage.py`). Values that can be changed in place are handed out
as copies, one per read; what user code does to them is seen by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streamflow.errors import ProcessingError
from streamflow.state.shared_stage import Waiting, at_number
from streamflow.state.stage import Stage
from streamflow.state.values import MISSING

_ABSENT: Any = object()


class ReadOnlyStage(Stage):
    """A table in the hands of turns that only read it.

    Args:
        waiting: What the task has taken for the table and not merged yet.
        number: The number of the record in hand, of the last one for a unit.
    """

    __slots__ = ("_number", "_waiting")

    def __init__(self, waiting: Waiting, number: Callable[[], int]) -> None:
        super().__init__(waiting.overlay, _untold)
        self._waiting = waiting
        self._number = number

    def get(self, key: Any) -> Any:
        held = self._find(key)
        return held if held is MISSING else self.overlay.values.value(held, key)

    def _find(self, key: Any) -> Any:
        done = self._waiting.done
        held = at_number(done.get(key), self._number(), _ABSENT) if done else _ABSENT
        return self.overlay.find(key) if held is _ABSENT else held

    def contains(self, key: Any) -> bool:
        return self._find(key) is not MISSING

    def default(self, key: Any, make: Callable[[], Any]) -> Any:
        return make()

    def set(self, key: Any, value: Any) -> None:
        self._refuse()

    def delete(self, key: Any) -> None:
        self._refuse()

    def _refuse(self) -> None:
        raise ProcessingError(f"table {self.overlay.name!r} is filled from its source and is not written")

    def entries(self, start: bytes | None, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[Any, Any]]:
        overlay = self.overlay
        decode_key, decoded = overlay.keys.decode, overlay.values.decoded
        pairs = overlay.entries(start, stop, reverse=reverse, writes=self._waiting.at(self._number()))
        keyed = ((decode_key(store_key), payload) for store_key, payload in pairs)
        return ((key, decoded(payload, key)) for key, payload in keyed)


def _untold(_: Stage) -> None:
    """Nothing has to be looked at when the turn is over."""
