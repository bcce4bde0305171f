"""Global tables: mappings of which every worker holds all, filled from a topic and read-only to the app's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Never, NoReturn, Protocol, TypeVar, cast

from streamflow.errors import ConfigurationError, NotHeld, TopologyError
from streamflow.model.record import TopicPartition
from streamflow.processing.ordered_mapping import OrderedMapping
from streamflow.processing.places import place_of_call
from streamflow.processing.topic import Topic, check_name
from streamflow.state.keys import key_order
from streamflow.state.values import MISSING, Values

K = TypeVar("K")
V = TypeVar("V")


class Copy(Protocol):
    """All of a global table, as a worker in this process holds it."""

    @property
    def partitions(self) -> frozenset[int]:
        """The partitions of the source."""
        ...

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        """The offset that follows what has arrived, by partition of the source."""
        ...

    def get(self, key: Any, /) -> Any:
        """The value of a key, `MISSING` where there is none."""
        ...

    def entries(self, start: bytes | None, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[Any, Any]]:
        """Keys and values of a range in key order."""
        ...

    @property
    def lag(self) -> int:
        """Records between what it has and the known end of its source."""
        ...

    async def caught_up(self, timeout_s: float) -> None:
        """Wait until it has everything that is in the source now."""


class GlobalTable(OrderedMapping[K, V], Generic[K, V]):
    """A global table; made by `app.global_table(...)`.

    Every worker holds all of it and follows its source topic, outside of commits: a read sees what has arrived here,
    which may be newer or older than what another worker, or the same record at a replay, sees. It is read anywhere:
    agents, timers, HTTP handlers, threads. Values that could be changed in place are copies, one per read: what is done
    to them is seen by nobody. To write, send to the source topic; a null value deletes.

    Iteration is in key order, over the table as it was when the iteration began. `len` counts by iterating.

    Attributes:
        app: The app that declared it.
        name: Its name.
        source: The topic it is filled from.
        key_type: Type of its keys.
        value_type: Type of its values.
        on_recover: Called when a worker has all of it.
        help: What it holds, for people.
        place: Where it was declared, `file:line`.
    """

    kind: ClassVar[str] = "global table"

    def __init__(
        self,
        app: Any,
        name: str,
        source: Topic[K, V],
        *,
        on_recover: Callable[[], Any] | None = None,
        help: str = "",
    ) -> None:
        self.app = app
        self.name = check_name(name, self.kind)
        self.place = place_of_call()
        self.source = source
        self.key_type = source.key_type
        self.value_type = source.value_type
        self.on_recover = on_recover
        self.help = help
        self.keys_in_order = key_order(source.key_codec, table=name)
        self.held_values = Values(name, source.value_codec)
        # Where it is held in this process, the newest first; the runtime's.
        self.copies: list[Copy] = []

    def difference(self, other: GlobalTable[Any, Any]) -> str | None:
        """What differs from another declaration of the same name, in words; None when nothing does."""
        if self.source is not other.source:
            return f"another source= ({self.place} and {other.place})"
        if self.on_recover != other.on_recover:
            return f"another on_recover= ({self.place} and {other.place})"
        return None

    # --- where it is -------------------------------------------------------------------------------------------

    def _copy(self) -> Copy:
        """The copy in this process.

        Raises:
            NotHeld: There is none, or it is not complete yet.
        """
        try:
            return self.copies[0]
        except IndexError:
            raise NotHeld(
                f"global table {self.name!r}: app {self.app.id!r} does not run in this process, or has not read the "
                "table yet: read it from an agent, a timer, a hook, or within `async with app.running():`"
            ) from None

    @property
    def partitions(self) -> frozenset[int]:
        """The partitions of the source that reads and iteration cover here: all, or none where the app does not run."""
        return self.copies[0].partitions if self.copies else frozenset()

    @property
    def lag(self) -> int:
        """Records of the source that are known to be there and have not arrived here."""
        return self._copy().lag

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        """The offset that follows what has arrived here, by partition of the source."""
        return self._copy().positions

    async def caught_up(self, *, timeout_s: float = 30.0) -> None:
        """Wait until everything that is in the source now has arrived here.

        What was sent and acknowledged before the call is then seen; in exactly-once that is what was committed.

        Args:
            timeout_s: Seconds to wait, above 0.

        Raises:
            TimeoutError: It took longer.
            NotHeld: The app does not run in this process.
        """
        if not timeout_s > 0:
            raise ConfigurationError(f"{self.name}.caught_up(timeout_s={timeout_s!r}): seconds, above 0")
        await self._copy().caught_up(timeout_s)

    # --- reading -----------------------------------------------------------------------------------------------

    def __getitem__(self, key: K) -> V:
        value = self._copy().get(key)
        if value is MISSING:
            raise KeyError(key)
        return cast("V", value)

    def found(self, key: K) -> V | Any:
        """The value there is of a key, `MISSING` where there is none."""
        return self._copy().get(key)

    def between(self, low: bytes | None, high: bytes | None, *, reverse: bool) -> Iterator[tuple[K, V]]:
        """Keys and values of a range of stored keys, as they are at the time of the call."""
        return self._copy().entries(low, high, reverse=reverse)

    # --- writing is for its source -----------------------------------------------------------------------------

    def _refuse(self) -> NoReturn:
        raise TopologyError(
            f"global table {self.name!r} is what its source says, and is not written: send to the topic, "
            f"`await {self.name}.source.send(key=..., value=...)`, or value=None to delete"
        )

    def __setitem__(self, key: Never, value: Never) -> None:
        self._refuse()

    def __delitem__(self, key: Never) -> None:
        self._refuse()

    def pop(self, *_: Never) -> NoReturn:
        """Not for global tables."""
        self._refuse()

    def setdefault(self, *_: Never) -> NoReturn:
        """Not for global tables."""
        self._refuse()

    def update(self, *_: Never, **__: Never) -> NoReturn:
        """Not for global tables."""
        self._refuse()

    def clear(self, *_: Never) -> NoReturn:
        """Not for global tables."""
        self._refuse()

    async def update_async(self, *_: Never) -> NoReturn:
        """Not for global tables."""
        self._refuse()
