"""A table in turns, held against a dict: whatever is written, dropped, sealed, settled and stored in between."""

from __future__ import annotations

import datetime
import math
import sys
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamflow.errors import ClosedError, ProcessingError, ProductionError
from streamflow.state.shared_stage import SharedStage, Waiting
from streamflow.state.stage import Stage
from streamflow.state.values import MISSING
from tests.state.table_parts import Parts


class Frozen(msgspec.Struct, frozen=True):
    n: int


class Loose(msgspec.Struct):
    n: int
    more: list[int] = []


KEYS = st.sampled_from(["", "a", "ab", "b", "ba", "c\xff", "z"])
MAKERS: dict[str, tuple[Any, Any]] = {
    "float": (float, float),
    "int": (int, int),
    "str": (str, str),
    "frozen": (Frozen, Frozen),
    "loose": (Loose, lambda n: Loose(n, [n])),
    "list": (list[int], lambda n: [n]),
    "dict": (dict[str, list[int]], lambda n: {"x": [n]}),
}


def grow(value: Any) -> None:
    """Change a value in place."""
    if isinstance(value, Loose):
        value.more.append(1)
    elif isinstance(value, dict):
        value["x"].append(1)
    elif isinstance(value, list):
        value.append(1)


class TableMachine(RuleBasedStateMachine):
    """One stage, turn after turn; the model is a dict per turn."""

    @initialize(kind=st.sampled_from(sorted(MAKERS)))
    def start(self, kind: str) -> None:
        self.form, self.make = MAKERS[kind]
        self.parts = Parts(str, self.form)
        self.parts.overlay._live_entries = 3
        self.stage = self.parts.stage()
        self.done: dict[str, Any] = {}
        self.turn: dict[str, Any] = {}
        self.sealed: list[dict[str, Any]] = []
        self.committed: dict[str, Any] = {}

    def _copy(self, values: dict[str, Any]) -> dict[str, Any]:
        return {key: msgspec.json.decode(msgspec.json.encode(value), type=self.form) for key, value in values.items()}

    @rule(key=KEYS, n=st.integers(0, 5))
    def write(self, key: str, n: int) -> None:
        value = self.make(n)
        self.stage.set(key, value)
        self.turn[key] = value

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.stage.delete(key)
        self.turn.pop(key, None)

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        value = self.stage.get(key)
        assert value == self.turn.get(key, MISSING)
        assert self.stage.get(key) is value or self.parts.overlay.values.are_objects
        assert self.stage.contains(key) == (key in self.turn)

    @rule(key=KEYS)
    def change_in_place(self, key: str) -> None:
        value = self.stage.get(key)
        if value is not MISSING:
            if value is not self.turn[key]:
                grow(value)
            grow(self.turn[key])

    @rule(key=KEYS, changes=st.booleans())
    def default(self, key: str, changes: bool) -> None:
        if key not in self.turn:
            value = self.stage.default(key, lambda: self.make(0))
            if changes and not self.parts.overlay.values.are_objects:
                grow(value)
                self.turn[key] = self.make(0)
                grow(self.turn[key])

    @rule(start=st.none() | KEYS, stop=st.none() | KEYS, reverse=st.booleans())
    def scan(self, start: str | None, stop: str | None, reverse: bool) -> None:
        low, high = self.parts.table.keys_in_order.range(start, stop)
        wanted = sorted(self.turn.items(), key=lambda item: item[0].encode(), reverse=reverse)
        wanted = [
            (key, value)
            for key, value in wanted
            if (start is None or key.encode() >= start.encode()) and (stop is None or key.encode() < stop.encode())
        ]
        assert list(self.stage.entries(low, high, reverse=reverse)) == wanted

    @rule()
    def write_while_iterating(self) -> None:
        before = self._copy(self.turn)
        keys = []
        for key, value in self.stage.entries(None, None):
            assert value == before[key]
            keys.append(key)
            self.stage.set("new" + key, self.make(9))
            self.turn["new" + key] = self.make(9)
            self.stage.delete(key)
            del self.turn[key]
            assert not self.stage.contains(key)
        assert keys == sorted(before, key=str.encode)

    @rule()
    def done_with_it(self) -> None:
        self.parts.done(self.stage)
        self.done, self.turn = self._copy(self.turn), self._copy(self.turn)

    @rule()
    def fail(self) -> None:
        self.parts.failed(self.stage)
        self.turn = self._copy(self.done)

    @rule()
    def seal(self) -> None:
        if self.parts.seal():
            self.sealed.append(self._copy(self.done))

    @precondition(lambda self: bool(self.sealed))
    @rule()
    def settle(self) -> None:
        self.parts.overlay.settle()
        self.committed = self.sealed.pop(0)

    @rule(fails=st.booleans())
    def store(self, fails: bool) -> None:
        if fails:
            self.parts.overlay.take_settled()
            self.parts.overlay.not_stored()
        else:
            self.parts.write_store()
            assert not self.parts.overlay.settled_entries

    @rule()
    def forget_what_is_cached(self) -> None:
        self.parts.overlay.live.clear()
        self.parts.overlay._older.clear()

    @invariant()
    def committed_reads_see_what_is_committed(self) -> None:
        overlay = self.parts.overlay
        values = overlay.values
        seen = overlay.entries(None, None, committed=True)
        assert {key.decode(): values.decoded(data, key) for key, data in seen} == self.committed
        found, low = {}, b""
        while page := list(islice(overlay.first_committed(low, None, 2), 2)):
            found.update({key.decode(): values.decoded(data, key) for key, data in page})
            low = page[-1][0] + b"\0"
        assert found == self.committed
        for key in ("a", "ab"):
            held = overlay.committed(key)
            assert (MISSING if held is MISSING else values.value(held, key)) == self.committed.get(key, MISSING)

    def teardown(self) -> None:
        self.parts.done(self.stage)
        self.parts.seal()
        assert self.parts.fold() == self.turn == dict(self.stage.entries(None, None))


TestTable = TableMachine.TestCase
TestTable.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def shared(parts: Parts, numbers: dict[str, int]) -> dict[str, SharedStage]:
    waiting = Waiting(parts.overlay)
    return {
        name: SharedStage(waiting, lambda _: None, lambda number=number: number) for name, number in numbers.items()
    }


def test_a_turn_does_not_see_what_a_later_record_wrote():
    stages = shared(Parts(str, int), {"first": 1, "second": 2})
    stages["second"].set("k", 5)
    assert stages["second"].close() is not None
    assert stages["first"].get("k") is MISSING
    assert list(stages["first"].entries(None, None)) == []


def test_a_write_over_a_later_records_write_is_refused():
    stages = shared(Parts(str, int), {"first": 1, "second": 2})
    stages["second"].set("k", 5)
    stages["second"].close()
    with pytest.raises(Exception, match="two records in progress at once write the key 'k'"):
        stages["first"].set("k", 1)
    stages["first"].drop()
    stages["first"].set("other", 1)


def test_a_write_on_what_an_earlier_record_has_changed_since_is_refused():
    stages = shared(Parts(str, int), {"first": 1, "second": 2})
    assert stages["second"].get("k") is MISSING
    stages["first"].set("k", 1)
    stages["first"].close()
    with pytest.raises(Exception, match="two records in progress"):
        stages["second"].set("k", 2)


class Measured(NamedTuple):
    count: int | bool


@dataclass(frozen=True)
class Remarked:
    count: int
    remark: str = field(default="", compare=False)


@pytest.mark.parametrize(
    ("form", "first", "second"),
    [(Remarked, Remarked(1), Remarked(1, "counted")), (Measured, Measured(1), Measured(True))],
)
def test_a_change_that_equality_passes_over_is_a_change_to_other_turns(form: Any, first: Any, second: Any) -> None:
    parts = Parts(str, form)
    parts.overlay.merge({"k": first})
    stages = shared(parts, {"first": 1, "second": 2})
    assert stages["second"].get("k") == first
    stages["first"].set("k", second)
    stages["first"].close()
    with pytest.raises(ProcessingError, match="two records in progress"):
        stages["second"].set("k", first)


def test_what_is_read_from_the_store_again_is_no_change() -> None:
    forms: list[tuple[Any, Any]] = [(frozenset[str], frozenset("abcdef")), (float, math.nan), (str, "x" * 100)]
    for form, value in forms:
        parts = Parts(str, form)
        parts.overlay.merge({"k": value})
        parts.seal()
        parts.overlay.settle()
        parts.write_store()
        parts.overlay.live.clear()
        (stage,) = shared(parts, {"only": 1}).values()
        stage.get("k")
        parts.overlay.live.clear()
        stage.set("k", value)


def test_what_iteration_gave_out_counts_as_read():
    parts = Parts(str, int)
    stages = shared(parts, {"first": 1, "second": 2})
    parts.overlay.merge({"k": 1})
    assert list(stages["second"].entries(None, None)) == [("k", 1)]
    stages["first"].set("k", 10)
    stages["first"].close()
    with pytest.raises(Exception, match="two records in progress"):
        stages["second"].set("k", 2)


def test_a_refused_value_leaves_no_claim_on_its_key():
    parts = Parts(str, int)
    touched: list[Stage] = []
    waiting = Waiting(parts.overlay)
    first = SharedStage(waiting, touched.append, lambda: 1)
    with pytest.raises(ProductionError):
        first.set("k", "no number")
    assert touched == [first, *touched[1:]]
    for stage in touched:
        stage.drop()
    assert waiting.is_empty
    SharedStage(waiting, touched.append, lambda: 2).set("k", 2)


def test_merged_in_the_order_of_records_whatever_order_they_end_in():
    parts = Parts(str, int)
    stages = shared(parts, {"one": 1, "two": 2, "three": 3})
    stages["one"].set("k", 1)
    effects = [stages["one"].close()]
    stages["two"].set("k", stages["two"].get("k") + 1)
    effects.append(stages["two"].close())
    stages["three"].set("k", stages["three"].get("k") + 1)
    effects.append(stages["three"].close())
    for each in effects:
        assert each is not None
        each.merge()
    assert parts.overlay.find("k") == 3
    assert stages["one"]._waiting.is_empty


@pytest.mark.parametrize(
    ("key_type", "known", "like"),
    [(int, 1, True), (int, 1, 1.0), (tuple[int, str], (1, "a"), (True, "a")), (float, 1.0, True)],
)
def test_a_key_that_only_equals_a_known_one_is_refused_in_the_turn(key_type, known, like):
    parts = Parts(key_type, int)
    for stage in (parts.stage(), shared(parts, {"s": 0})["s"]):
        stage.set(known, 1)
        parts.done(stage)
        with pytest.raises(ProductionError, match="takes keys of type"):
            stage.set(like, 2)
        with pytest.raises(ProductionError, match="takes keys of type"):
            stage.delete(like)
        parts.failed(stage)
        assert parts.seal()
        assert parts.fold() == {known: 1}


class Place(msgspec.Struct, frozen=True):
    name: str
    number: int


class Thing(msgspec.Struct, frozen=True, eq=False):
    name: str


@pytest.mark.parametrize(
    ("key_type", "known", "like"),
    [
        (Place, Place("a", 1), Place("a", "1")),  # type: ignore[arg-type]
        (Place, Place("a", 1), Place("a", True)),
        (Place, Place("a", 1), Place("a", 1.0)),  # type: ignore[arg-type]
        (tuple[int | str, int], ("a", 1), (1.5, 1)),
        (Thing, None, Thing("a")),
    ],
)
def test_a_key_that_would_read_back_as_another_one_is_refused_in_the_turn(key_type, known, like):
    parts = Parts(key_type, int)
    stage = parts.stage()
    if known is not None:
        stage.set(known, 1)
        parts.done(stage)
    with pytest.raises(ProductionError, match="read back"):
        stage.set(like, 2)
    parts.done(stage)
    parts.seal()
    assert parts.fold() == ({} if known is None else {known: 1})


@pytest.mark.parametrize("key", [None, 5, b"a", "x" * 70_000, "\ud800"])
def test_a_key_that_cannot_be_written_is_refused_in_the_turn(key):
    with pytest.raises(ProductionError):
        Parts(str, int).stage().set(key, 1)


@pytest.mark.parametrize(
    ("value_type", "value"),
    [(int, None), (int, "x"), (int, 1 << 70), (bytes, b"x" * 200_000), (str, "x" * 200_000), (list[int], ["x"])],
)
def test_a_value_that_cannot_be_written_is_refused_in_the_turn(value_type, value):
    stage = Parts(str, value_type).stage()
    with pytest.raises(ProductionError, match="table 't'"):
        stage.set("k", value)
    assert stage.get("k") is MISSING
    assert stage.close() is None


def test_nan_is_no_key():
    with pytest.raises(ProductionError, match="NaN"):
        Parts(float, int).stage().set(float("nan"), 1)


@pytest.mark.parametrize(
    ("key_type", "one", "other"),
    [
        (float, 0.0, -0.0),
        (
            datetime.datetime,
            datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC),
            datetime.datetime(2024, 1, 1, 14, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
        ),
    ],
)
def test_keys_that_are_equal_have_one_record_in_the_changelog(key_type, one, other):
    parts = Parts(key_type, int)
    stage = parts.stage()
    stage.set(one, 1)
    parts.done(stage)
    parts.seal()
    parts.overlay.live.clear()
    stage.set(other, 2)
    parts.done(stage)
    parts.seal()
    assert list(parts.fold().values()) == [2]


def test_a_value_kept_from_an_earlier_turn_is_a_copy_that_changes_nothing():
    parts = Parts(str, list[int])
    stage = parts.stage()
    stage.set("k", [1])
    parts.done(stage)
    kept = stage.get("k")
    parts.done(stage)
    kept.append(2)
    assert stage.get("k") == [1]
    parts.done(stage)
    assert parts.overlay.committed("k") is MISSING
    parts.seal()
    assert parts.fold() == {"k": [1]}


def test_an_iteration_kept_from_an_earlier_turn_gives_out_no_old_values():
    parts = Parts(str, list[int])
    stage = parts.stage()
    stage.set("a", [1])
    stage.set("b", [1])
    parts.done(stage)
    kept = stage.entries(None, None)
    assert next(kept) == ("a", [1])
    parts.done(stage)
    stage.get("b").append(2)
    parts.done(stage)
    with pytest.raises(ClosedError, match="began in an earlier record's turn"):
        next(kept)
    stage.get("b").append(3)
    parts.done(stage)
    parts.seal()
    assert parts.fold() == {"a": [1], "b": [1, 2, 3]}


def test_what_cannot_be_changed_is_never_copied():
    parts = Parts(str, Frozen)
    stage = parts.stage()
    value = Frozen(1)
    stage.set("k", value)
    held = stage.get("k")
    assert held == value
    parts.done(stage)
    assert stage.get("k") is held


def test_reading_writes_nothing():
    parts = Parts(str, dict[str, list[int]])
    stage = parts.stage()
    stage.set("k", {"x": [1]})
    parts.done(stage)
    parts.seal()
    stage.get("k")
    list(stage.entries(None, None))
    stage.default("other", dict)
    parts.done(stage)
    assert not parts.seal()


def test_a_set_that_was_only_read_is_not_written():
    parts = Parts(str, set[str])
    parts.overlay.dirty["k"] = b'["b","a","d","c","e"]'
    parts.seal()
    stage = parts.stage()
    assert stage.get("k") == {"a", "b", "c", "d", "e"}
    parts.done(stage)
    assert not parts.seal()
    stage.get("k").add("f")
    parts.done(stage)
    assert parts.seal()
    assert parts.fold() == {"k": {"a", "b", "c", "d", "e", "f"}}


def test_expiry_moves_with_turns_that_are_done_only():
    parts = Parts(str, int, ttl_s=10)
    stage = parts.stage()
    stage.advance(1_000)
    stage.set("k", 1)
    parts.done(stage)
    stage.advance(50_000)
    assert stage.get("k") is MISSING
    stage.drop()
    assert stage.get("k") == 1
    stage.advance(10_999)
    assert stage.get("k") == 1
    assert list(stage.entries(None, None)) == [("k", 1)]
    parts.done(stage)
    stage.advance(11_000)
    assert stage.get("k") is MISSING
    assert list(stage.entries(None, None)) == []
    parts.done(stage)
    assert parts.overlay.stream_time_ms == 11_000


def test_a_value_written_again_lives_on():
    parts = Parts(str, list[int], ttl_s=10)
    stage = parts.stage()
    for at_ms in (0, 9_000, 18_000):
        stage.advance(at_ms)
        stage.set("k", [*(stage.get("k") if stage.contains("k") else []), at_ms])
        parts.done(stage)
    assert stage.get("k") == [0, 9_000, 18_000]
    parts.seal()
    assert [at_ms for _, _, at_ms in parts.records] == [18_000]


def test_a_turn_in_a_thread_sees_what_is_being_sealed() -> None:
    parts = Parts(str, int)
    parts.overlay.merge({"a": 1})
    parts.overlay.live.clear()
    seen: list[Any] = []
    parts.overlay.seal(lambda _: seen.append(parts.overlay.find("a")), 7)
    assert seen == [1]


def test_a_look_into_the_store_by_a_thread_does_not_undo_what_is_merged_meanwhile() -> None:
    parts = Parts(str, int)
    overlay = parts.overlay
    overlay.merge({"a": 1})
    parts.seal()
    overlay.settle()
    parts.write_store()
    overlay.live.clear()
    look = overlay._store_get

    def slowly(key: bytes) -> bytes | None:
        found = look(key)
        overlay.merge({"a": 2})
        return found

    overlay._store_get = slowly
    overlay.find("a")
    assert overlay.find("a") == 2


def test_keys_that_are_merged_while_a_thread_begins_to_scan_are_found() -> None:
    parts = Parts(str, int)
    overlay = parts.overlay
    overlay.merge(dict.fromkeys("abc", 1))
    encode, other = overlay._encode_key, threading.Thread(target=overlay.merge, args=({"d": 1},))

    def encode_while_others_merge(key: str) -> bytes:
        if threading.current_thread() is not other and not other.ident:
            other.start()
            other.join(0.05)  # it may have to wait for this one
        return encode(key)

    overlay._encode_key = encode_while_others_merge
    assert [parts.table.key_codec.decode(key) for key, _ in overlay.entries(None, None)][:3] == ["a", "b", "c"]
    other.join(5)
    assert [parts.table.key_codec.decode(key) for key, _ in overlay.entries(None, None)] == ["a", "b", "c", "d"]


def test_an_index_of_keys_that_could_not_be_made_is_made_by_the_next_scan() -> None:
    parts = Parts(str, int)
    parts.overlay.merge({"a": 1})
    encode = parts.overlay._encode_key
    parts.overlay._encode_key = lambda _: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(MemoryError):
        list(parts.overlay.entries(None, None))
    parts.overlay._encode_key = encode
    assert len(list(parts.overlay.entries(None, None))) == 1


class Rivals:
    """Turns of one table in threads, merged by the main thread in the order of their records."""

    THREADS, TURNS, KEYS = 3, 8000, 1

    def __init__(self) -> None:
        self.parts = Parts(int, int)
        self.waiting = Waiting(self.parts.overlay)
        self.expected = [0] * self.KEYS
        self.done: deque[tuple[int, Any]] = deque()
        self.closing = threading.Lock()
        self.errors: list[BaseException] = []

    def work(self, number: int) -> None:
        """Each turn adds one to a key, and looks at all of them; a rival's key fails it."""
        try:
            stage = SharedStage(self.waiting, lambda _: None, lambda: 0)
            for turn in range(self.TURNS):
                key = (turn + number) % self.KEYS
                try:
                    stage.set(key, stage.get(key) + 1)
                    if not turn % 20:
                        assert len(list(stage.entries(None, None))) == self.KEYS
                except ProcessingError:
                    stage.drop()
                    continue
                while len(self.done) > 50:
                    time.sleep(0)
                with self.closing:
                    self.done.append((key, stage.close()))
        except BaseException as error:
            self.errors.append(error)

    def run(self) -> None:
        self.parts.overlay.merge(dict.fromkeys(range(self.KEYS), 0))
        threads = [threading.Thread(target=self.work, args=(number,)) for number in range(self.THREADS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or self.done:
            while self.done:
                key, effects = self.done.popleft()
                effects.merge()
                self.expected[key] += 1
            if self.parts.seal():
                self.parts.overlay.settle()
                self.parts.write_store()
        for thread in threads:
            thread.join()


def test_turns_in_several_threads_lose_nothing() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        rivals = Rivals()
        rivals.run()
    finally:
        sys.setswitchinterval(before)
    assert rivals.errors == []
    assert [rivals.parts.overlay.find(key) for key in range(rivals.KEYS)] == rivals.expected
    assert sum(rivals.expected) > 100
    assert rivals.waiting.is_empty


class Numbered(msgspec.Struct, frozen=True):
    numbers: tuple[int, ...]
    name: str = ""


class Point(NamedTuple):
    numbers: tuple[int, ...]


@pytest.mark.parametrize("kind", [Numbered, Point])
def test_what_an_unchangeable_value_was_made_of_changes_nothing(kind: Any) -> None:
    parts, made_of = Parts(str, kind), [1, 2]
    stage = parts.stage()
    stage.set("k", kind(made_of))
    parts.done(stage)
    made_of.append(3)
    assert stage.get("k") == kind((1, 2))


def test_a_value_is_held_as_it_will_be_read() -> None:
    stage = Parts(str, Numbered).stage()
    stage.set("k", Numbered((), uuid.UUID(int=1)))  # type: ignore[arg-type]
    assert stage.get("k") == Numbered((), "00000000-0000-0000-0000-000000000001")


@dataclass
class Tagged:
    tags: set[str]
    number: int | bool = 0
    note: str = field(default="", compare=False)


@pytest.mark.parametrize(("name", "new"), [("note", "new"), ("number", True), ("tags", {"b", "c"})])
def test_a_change_that_equality_passes_over_is_written_beside_sets(name: str, new: object) -> None:
    parts = Parts(str, Tagged)
    stage = parts.stage()
    stage.set("k", Tagged({"a"}, 1))
    parts.done(stage)
    setattr(stage.get("k"), name, new)
    parts.done(stage)
    assert repr(getattr(stage.get("k"), name)) == repr(new) or name == "tags"
    assert getattr(stage.get("k"), name) == new


class Least(msgspec.Struct):
    least: float | None = None
    others: list[Any] = []


@pytest.mark.parametrize(
    "value", [Least(math.inf), Least(-math.inf), Least(math.nan), Least(others=[{"a": (math.inf, None)}])]
)
def test_a_float_that_json_has_not_is_refused_where_it_would_be_read_as_none(value: Least) -> None:
    stage = Parts(str, Least).stage()
    with pytest.raises(ProductionError, match="JSON has no infinity"):
        stage.set("k", value)
    stage.set("k", Least(1.5, [None, "null"]))
    changed = stage.get("k")
    changed.least, changed.others = value.least, value.others
    with pytest.raises(ProductionError, match="JSON has no infinity"):
        stage.close()
    stage.drop()
    whole = Parts(str, Least, value_serializer="msgpack").stage()
    whole.set("k", value)
    assert repr(whole.get("k").least) == repr(value.least)
