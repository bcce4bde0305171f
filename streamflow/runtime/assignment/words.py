"""What members say when they join, and what they are told: the words of assignment as bytes.

A version byte, then msgpack by field name. Within one version fields may come and go: those that are not known are
passed over, and those that are missing have their defaults. Only what could be misread gets a new version, and is then
to others as if nothing had been said.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias, TypeVar, overload

import msgspec

from streamflow.log.api import Shorter
from streamflow.runtime.assignment import packed_routes
from streamflow.runtime.assignment.cluster import TaskId

VERSION = 1

_Partition: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
_Tasks: TypeAlias = dict[str, list[_Partition]]
"""Tasks by sub-topology: its name, the longest part, stands once."""
_Lag: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
_Lags: TypeAlias = dict[str, dict[_Partition, _Lag]]
_Word = TypeVar("_Word", bound=msgspec.Struct)

_NO_COPIES = "where standbys are: reads with stale=ok ask owners only"
_NOBODY = "where tasks are: a worker reads tables in its own partitions only, others are 503"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Says:
    """What a worker says of itself when it joins. The defaults are those of one that says nothing.

    Attributes:
        url: Where its HTTP server is reached by other workers; empty where it is not.
        rack: Setting `rack`.
        capacity: Setting `capacity`.
        follows: Whether it takes standbys and warm-ups. If not, it gets a task with state only from who does not
            either, or if nobody has any of it.
        standby: Tasks it was told to be a standby of, as it was told last: they stay where they are if they can.
        lags: By task whose state is here, active or not: how many records it is behind. One that is restored says what
            is left.
        unpacks: Whether it reads routes that are packed, and what else `Told` has beside standbys, warm-ups and routes.
            Versions before do not: they are told the routes in full.
        refused: Tasks whose state it could not follow, and will not be able to for a while: others are to have them.
        transactional_id: What its commits are fenced by; empty where it has none (at least once, an older version).
        ran: Tasks that run here with all of their state, or did so when this worker last knew: one that somebody else
            has got since has gone on there. None where a version does not say: then it has the state of what it owns.
    """

    url: str = ""
    rack: str = ""
    capacity: int = 1
    follows: bool = False
    standby: frozenset[TaskId] = frozenset()
    lags: Mapping[TaskId, int] = field(default_factory=dict[TaskId, int])
    unpacks: bool = False
    refused: frozenset[TaskId] = frozenset()
    transactional_id: str = ""
    ran: frozenset[TaskId] | None = None

    @property
    def checksum(self) -> int:
        """Tells another worker in the same place: what stays while one runs, and its room, which is to be heard of."""
        return zlib.crc32(msgspec.msgpack.encode((self.url, self.rack, self.capacity, self.follows)))

    def encode(self) -> bytes:
        """As bytes, for `log.api.Group.say`."""
        lags: _Lags = {}
        for (sub_topology, partition), lag in sorted(self.lags.items()):
            lags.setdefault(sub_topology, {})[partition] = lag
        word = _Says(
            self.url,
            self.rack,
            self.capacity,
            self.follows,
            _nested(self.standby),
            lags,
            self.unpacks,
            _nested(self.refused),
            self.transactional_id,
            None if self.ran is None else _nested(self.ran),
        )
        return _write(word)

    @classmethod
    def decode(cls, data: bytes, who: str) -> Says:
        """Read what a worker of any version said; what cannot be read counts as nothing, with a warning.

        Args:
            data: The bytes; empty for nothing.
            who: The member that said it, for the warning.
        """
        word = _read(data, _read_says, f"member {who!r} says")
        if word is None:
            return cls()
        lags = {TaskId(name, partition): lag for name, by in word.lags.items() for partition, lag in by.items()}
        return cls(
            word.url,
            word.rack,
            word.capacity,
            word.follows,
            _flat(word.standby),
            lags,
            word.unpacks,
            _flat(word.refused),
            word.transactional_id,
            None if word.ran is None else _flat(word.ran),
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Where one worker is reached, and what is asked of it there.

    Attributes:
        url: Its HTTP server's; empty where it has none.
        active: Tasks it is the owner of, or about to be.
        standby: Tasks it is a standby of.
        transactional_id: What its commits are fenced by, as it says; empty where it says none. In packed routes only:
            who does not unpack does not know of it.
    """

    url: str = ""
    active: frozenset[TaskId] = frozenset()
    standby: frozenset[TaskId] = frozenset()
    transactional_id: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker is told beside its partitions. The defaults are for one that is told nothing.

    Attributes:
        standby: Tasks it is to keep a copy of.
        warm_up: Tasks it is to catch up with, and to ask for a new round (`log.api.Group.rejoin`) once it has with some
            of them. Some may be its own in this plan already: they come once their owner has given them up, and are
            to be followed until then.
        active: Tasks that are its own in this plan, whether they have come already or not; None where the leader is of
            a version that says it by `routes` only.
        routes: All workers', by any name; by member id where the leader says no `active`. Empty where they are left
            out, because the log cannot keep all that is told to all.
        said: Checksum of what the plan takes this worker for; None where the leader does not say it.
        acceptable_lag_records: What this plan took for caught up; None where the leader does not say it.
        behind: Tasks that go to a worker that is not caught up, since nobody said it was: who is asks for a new round.
            None of them where something is left out.
    """

    standby: frozenset[TaskId] = frozenset()
    warm_up: frozenset[TaskId] = frozenset()
    active: frozenset[TaskId] | None = None
    routes: Mapping[str, Route] = field(default_factory=dict[str, Route])
    said: int | None = None
    acceptable_lag_records: int | None = None
    behind: frozenset[TaskId] = frozenset()

    @classmethod
    def decode(cls, data: bytes) -> Told:
        """Read what a leader of any version tells; what cannot be read counts as nothing, with a warning.

        Args:
            data: The bytes; empty for nothing.
        """
        word = _read(data, _read_told, "the group's leader tells this worker")
        if word is None:
            return cls()
        active = None if word.active is None else _flat(word.active)
        lag = word.acceptable_lag_records
        return cls(
            _flat(word.standby), _flat(word.warm_up), active, _routes_of(word), word.said, lag, _flat(word.behind)
        )


class Teller:
    """Writes what each worker of one plan is told; the routes, which all share, are written once.

    Args:
        routes: By member id.
        acceptable_lag_records: See `cluster.Cluster`.
        behind: See `Told`.
    """

    def __init__(self, routes: Mapping[str, Route], acceptable_lag_records: int, behind: Iterable[TaskId] = ()) -> None:
        self._routes = routes
        self._acceptable_lag_records = acceptable_lag_records
        self._behind = _nested(behind)
        self._packed: dict[bool, bytes] = {}
        self._plain: dict[bool, msgspec.Raw] = {}

    def tell(
        self, member_id: str, says: Says, standby: Iterable[TaskId], warm_up: Iterable[TaskId]
    ) -> tuple[bytes, Sequence[Shorter]]:
        """What one worker is told, as bytes: see `Told`; and the same with less of the routes, written when looked at.

        Args:
            member_id: The worker.
            says: What it has said.
            standby: Its standbys.
            warm_up: Its warm-ups.
        """
        mine = _nested(standby), _nested(warm_up)
        if not says.unpacks:
            return _write(_Telling(*mine, self._write_plain(copies=True))), _InShort(
                lambda: _write(_Telling(*mine, self._write_plain(copies=False))),
                lambda: _write(_Telling(*mine, _NO_ROUTES)),
            )
        active, enough = _nested(self._routes[member_id].active), self._acceptable_lag_records

        def write(packed: bytes, behind: _Tasks) -> bytes:
            return _write(_TellingPacked(*mine, active, says.checksum, enough, packed, behind))

        return write(self._pack(copies=True), self._behind), _InShort(
            lambda: write(self._pack(copies=False), {}), lambda: write(b"", {})
        )

    def _pack(self, *, copies: bool) -> bytes:
        if copies not in self._packed:
            self._packed[copies] = packed_routes.pack(
                (route.url, route.active, route.standby if copies else frozenset(), route.transactional_id)
                for route in self._routes.values()
            )
        return self._packed[copies]

    def _write_plain(self, *, copies: bool) -> msgspec.Raw:
        if copies not in self._plain:
            word = {
                member_id: _Route(route.url, _nested(route.active), _nested(route.standby) if copies else {})
                for member_id, route in sorted(self._routes.items())
            }
            self._plain[copies] = msgspec.Raw(msgspec.msgpack.encode(word))
        return self._plain[copies]


class _InShort(Sequence[Shorter]):
    """The shorter forms: they are needed only where a log cannot keep the full one of all members, which is rare."""

    def __init__(self, brief: Callable[[], bytes], least: Callable[[], bytes]) -> None:
        self._forms = (brief, _NO_COPIES), (least, _NOBODY)

    def __len__(self) -> int:
        return len(self._forms)

    @overload
    def __getitem__(self, index: int) -> Shorter: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shorter]: ...
    def __getitem__(self, index: int | slice) -> Shorter | Sequence[Shorter]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        write, without = self._forms[index]
        return Shorter(write(), without)


# --- on the wire -------------------------------------------------------------------------------------------------


class _Says(msgspec.Struct, omit_defaults=True):
    url: str = ""
    rack: str = ""
    capacity: Annotated[int, msgspec.Meta(ge=1)] = 1
    follows: bool = False
    standby: _Tasks = {}
    lags: _Lags = {}
    unpacks: bool = False
    refused: _Tasks = {}
    transactional_id: str = ""
    ran: _Tasks | None = None


class _Route(msgspec.Struct, omit_defaults=True):
    url: str = ""
    active: _Tasks = {}
    standby: _Tasks = {}


class _Told(msgspec.Struct):
    standby: _Tasks = {}
    warm_up: _Tasks = {}
    active: _Tasks | None = None
    said: int | None = None
    acceptable_lag_records: _Lag | None = None
    packed: bytes = b""
    routes: dict[str, _Route] = {}
    behind: _Tasks = {}


class _Telling(msgspec.Struct, omit_defaults=True):
    """`_Told` with its routes in bytes."""

    standby: _Tasks
    warm_up: _Tasks
    routes: msgspec.Raw


class _TellingPacked(msgspec.Struct, omit_defaults=True):
    """`_Told` for who unpacks."""

    standby: _Tasks
    warm_up: _Tasks
    active: _Tasks
    said: int
    acceptable_lag_records: int
    packed: bytes = b""
    behind: _Tasks = {}


_NO_ROUTES = msgspec.Raw(msgspec.msgpack.encode({}))
_read_says = msgspec.msgpack.Decoder(_Says)
_read_told = msgspec.msgpack.Decoder(_Told)


def _write(word: msgspec.Struct) -> bytes:
    return bytes([VERSION]) + msgspec.msgpack.encode(word)


def _read(data: bytes, decoder: msgspec.msgpack.Decoder[_Word], whose: str) -> _Word | None:
    if not data:
        return None
    if data[0] != VERSION:
        logger.warning("what %s is of version %d; version %d is read here: taken for nothing", whose, data[0], VERSION)
        return None
    try:
        return decoder.decode(data[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        logger.warning("what %s cannot be read (%s): taken for nothing", whose, exc)
        return None


def _routes_of(word: _Told) -> dict[str, Route]:
    if word.packed:
        try:
            workers = packed_routes.unpack(word.packed)
        except ValueError as exc:
            logger.warning("where tasks are, as the group's leader tells, cannot be read (%s): taken for nothing", exc)
            return {}
        return {str(number): Route(*worker) for number, worker in enumerate(workers)}
    return {
        member_id: Route(each.url, _flat(each.active), _flat(each.standby)) for member_id, each in word.routes.items()
    }


def _nested(tasks: Iterable[TaskId]) -> _Tasks:
    nested: _Tasks = {}
    for sub_topology, partition in sorted(tasks):
        nested.setdefault(sub_topology, []).append(partition)
    return nested


def _flat(tasks: _Tasks) -> frozenset[TaskId]:
    return frozenset(TaskId(name, partition) for name, partitions in tasks.items() for partition in partitions)
