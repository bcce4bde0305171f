"""How much of what standbys lack may be on its way at a time: a fetch may be 1 MiB, and there may be hundreds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class FetchPlaces:
    """Places for fetches that are asked for and not applied yet, shared by the standbys of a worker.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, wake: Callable[[], None]) -> bool:
        """Take a place, if there is one.

        Args:
            wake: Called once when there is one again, if there is none now.
        """
        if self._free:
            self._free -= 1
            return True
        if wake not in self._waiting:
            self._waiting.append(wake)
        return False

    def give_back(self) -> None:
        """Let go of a place."""
        self._free += 1
        if self._waiting:
            self._waiting.popleft()()
