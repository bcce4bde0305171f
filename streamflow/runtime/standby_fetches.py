"""What one standby reads: its partitions in the lane that all share, and the places that what it lacks needs there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from streamflow.clock import Clock
from streamflow.log.api import Fetched, Reader
from streamflow.model.record import TopicPartition
from streamflow.runtime.fetch_places import FetchPlaces
from streamflow.runtime.followed import Filled, Span

_NEAR = 1_000
"""Who lacks no more offsets than this needs no place: such fetches are small, and mostly wait for what comes."""
_PARKED_S = 5.0


class StandbyFetches:
    """Asks for what is wanted of the partitions of a standby.

    Args:
        reader: The lane of all standbys.
        places: For fetches of what they lack.
        clock: Time.
        wake: Called when a place that there was none of may be taken.

    Attributes:
        spans: What is followed.
        arrived: What was fetched and is not applied yet.
    """

    def __init__(self, reader: Reader, places: FetchPlaces, clock: Clock, wake: Callable[[], None]) -> None:
        self.spans: dict[TopicPartition, Span] = {}
        self.arrived: deque[Fetched] = deque()
        self._reader = reader
        self._places = places
        self._clock = clock
        self._wake = wake

    def each(self) -> Iterator[tuple[Span, Filled]]:
        """The tables that are filled, with what they are filled from."""
        return ((span, each) for span in self.spans.values() for each in span.filled)

    @property
    def positions(self) -> dict[str, int]:
        """By table: the offset that follows what the store has."""
        return {each.table.name: each.position for _, each in self.each()}

    @property
    def level_at_ms(self) -> int:
        """When the store had all that was there, as far as that is known; wall clock."""
        return min((each.level_at_ms for _, each in self.each()), default=0)

    def begin(self) -> None:
        """Read `spans` from where they are."""
        for span in self.spans.values():
            self._reader.add(span.tp, span.position)

    def again(self, span: Span) -> None:
        """Read one from where it is: more was fetched of it than is to be applied."""
        self._reader.remove(span.tp)
        self._reader.add(span.tp, span.position)

    def let_go(self) -> None:
        """Read nothing any more."""
        for tp, span in self.spans.items():
            self._reader.remove(tp)
            self.leave_place(span)
        self.arrived.clear()
        self.spans = {}

    def end(self, span: Span) -> int:
        """The offset that one is to come to, as far as is known."""
        if span.limit is not None:
            return span.limit
        return max(span.end, self._reader.end_offset(span.tp) or 0)

    def ask(self) -> None:
        """Ask for one more fetch of each that has not come to its limit, and of which nothing waits to be applied.

        What waits may say that the partition cannot be read any more.
        """
        waiting = {fetched.tp for fetched in self.arrived}
        for span in self.spans.values():
            is_wanted = span.tp not in waiting and (span.limit is None or span.position < span.limit)
            if is_wanted and (span.asked_at_ms is not None or self._has_place(span)):
                if span.asked_at_ms is None:
                    span.asked_at_ms = self._clock.now_ms()
                self._reader.ask(span.tp)

    def _has_place(self, span: Span) -> bool:
        """Whether one more fetch may be asked for now."""
        if self.end(span) - span.position <= _NEAR:
            return True
        if span.place_since_s is None and self._places.take(self._wake):
            span.place_since_s = self._clock.monotonic()
        return span.place_since_s is not None

    def leave_place(self, span: Span) -> None:
        """Give back the place of one, if it has one."""
        if span.place_since_s is not None:
            span.place_since_s = None
            self._places.give_back()

    def leave_parked(self) -> None:
        """What waits for the end of a transaction has nothing on its way that takes a place."""
        due_s = self._clock.monotonic() - _PARKED_S
        for span in self.spans.values():
            if span.asked_at_ms is not None and span.place_since_s is not None and span.place_since_s < due_s:
                self.leave_place(span)
