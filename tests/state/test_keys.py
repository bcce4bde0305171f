"""Order of bytes = order of keys; every key reads back as it was; prefixes are prefixes."""

import datetime
import enum
import math
import uuid
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.errors import ProductionError, SchemaError, StateCorruptedError
from streamflow.model.serde import bind_codec
from streamflow.state.keys import BytesOrder, SerializedOrder, StrOrder, after_prefix, key_order


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue\0"
    NONE = ""


class Level(enum.IntEnum):
    LOW = -5
    HIGH = 7


class Place(NamedTuple):
    country: str
    number: int


class Route(msgspec.Struct, frozen=True):
    origin: str
    to: int


def order(form, serializer=None):
    return key_order(bind_codec(form, serializer, topic="app-t-changelog", part="key"), table="t")


int64 = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.text("\0\1\xffa", max_size=4)
blobs = st.binary(max_size=6) | st.lists(st.sampled_from([0, 1, 255, 97]), max_size=4).map(bytes)
floats = st.floats(allow_nan=False)
naive = st.datetimes()
EAST, WEST = (datetime.timezone(datetime.timedelta(hours=hours)) for hours in (1, -7))
aware = st.datetimes(
    datetime.datetime(1, 1, 2),  # noqa: DTZ001
    datetime.datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.sampled_from([datetime.UTC, WEST, ZoneInfo("UTC")]),
)
KEYS = {
    "str": (str, texts),
    "bytes": (bytes, blobs),
    "int": (int, int64),
    "float": (float, floats),
    "bool": (bool, st.booleans()),
    "uuid": (uuid.UUID, st.uuids()),
    "date": (datetime.date, st.dates()),
    "naive": (datetime.datetime, naive),
    "aware": (datetime.datetime, aware),
    "(str, int)": (tuple[str, int], st.tuples(texts, int64)),
    "(bytes, float, bool)": (tuple[bytes, float, bool], st.tuples(blobs, floats, st.booleans())),
    "((str, str), bytes)": (tuple[tuple[str, str], bytes], st.tuples(st.tuples(texts, texts), blobs)),
    "(str, ...)": (tuple[str, ...], st.lists(texts, max_size=3).map(tuple)),
    "((int, ...), str)": (tuple[tuple[int, ...], str], st.tuples(st.lists(int64, max_size=3).map(tuple), texts)),
    "(uuid, date)": (tuple[uuid.UUID, datetime.date], st.tuples(st.uuids(), st.dates())),
    "Place": (Place, st.builds(Place, texts, int64)),
}


@pytest.mark.parametrize("name", KEYS)
def test_bytes_are_ordered_as_keys_and_read_back(name):
    form, keys = KEYS[name]
    encoding = order(form)

    @given(st.lists(keys, min_size=1, max_size=8))
    def check(some):
        assert sorted(some, key=encoding.encode) == sorted(some)
        for key in some:
            data = encoding.encode(key)
            found = encoding.decode(data)
            assert found == key
            assert type(found) is type(key)
            assert encoding.encode(found) == data
        for one in some:
            for other in some:
                assert (encoding.encode(one) == encoding.encode(other)) == (one == other)

    check()


@pytest.mark.parametrize(
    ("form", "rising"),
    [
        (str | None, [None, "", "\0", "a"]),
        (int | None, [None, -1, 0]),
        (tuple[str | None, int], [(None, 5), ("", -1), ("", 3), ("a", 0)]),
        (tuple[int | None, str | None], [(None, None), (None, ""), (-1, None), (0, "x")]),
        (Colour, [Colour.NONE, Colour.BLUE, Colour.RED]),
        (Level, [Level.LOW, Level.HIGH]),
        (tuple[Level, Colour | None], [(Level.LOW, None), (Level.LOW, Colour.RED), (Level.HIGH, None)]),
        (float, [-math.inf, -1e300, -1.5, -5e-324, 0.0, 5e-324, 1.5, math.inf]),
    ],
)
def test_optional_and_enumerated_keys_have_their_order(form, rising):
    encoding = order(form)
    encoded = [encoding.encode(key) for key in rising]
    assert encoded == sorted(set(encoded))
    assert [encoding.decode(data) for data in encoded] == rising


def test_zero_has_one_key_and_a_whole_number_is_a_float():
    encoding = order(float)
    assert encoding.encode(-0.0) == encoding.encode(0.0) == encoding.encode(0)
    assert math.copysign(1, encoding.decode(encoding.encode(-0.0))) == 1


@given(texts, st.lists(texts, max_size=8))
def test_a_prefix_of_text_holds_exactly_what_begins_with_it(prefix, some):
    encoding = order(str)
    start, stop = encoding.prefix(prefix)
    for key in some:
        data = encoding.encode(key)
        assert (start <= data and (stop is None or data < stop)) == key.startswith(prefix)


@given(blobs, st.lists(blobs, max_size=8))
def test_a_prefix_of_bytes_holds_exactly_what_begins_with_it(prefix, some):
    start, stop = order(bytes).prefix(prefix)
    for key in some:
        assert (start <= key and (stop is None or key < stop)) == key.startswith(prefix)


@pytest.mark.parametrize("name", ["(str, int)", "(bytes, float, bool)", "(str, ...)"])
def test_first_elements_hold_exactly_the_tuples_that_begin_with_them(name):
    form, elements = KEYS[name]
    encoding = order(form)

    @given(st.lists(elements, min_size=1, max_size=6), st.integers(0, 3))
    def check(some, length):
        first = some[0][:length]
        start, stop = encoding.prefix(first)
        low, high = encoding.range(first, None)
        assert high is None
        for key in some:
            data = encoding.encode(key)
            assert (start <= data and (stop is None or data < stop)) == (key[: len(first)] == first)
            assert (low <= data) == (first <= key)

    check()


@given(st.lists(int64, min_size=3, max_size=8))
def test_a_range_is_a_range(some):
    encoding = order(int)
    start, stop = encoding.range(some[0], some[1])
    assert stop is not None
    for key in some:
        assert (start <= encoding.encode(key) < stop) == (some[0] <= key < some[1])
    assert encoding.range() == (b"", None)


@pytest.mark.parametrize(
    ("form", "key", "reason"),
    [
        (int, 2**63, "64 bits"),
        (int, -(2**63) - 1, "64 bits"),
        (int, True, "no int"),
        (int, "1", "no int"),
        (float, math.nan, "NaN"),
        (float, 10**400, "too large"),
        (float, 2**53 + 1, "no float is exactly that number"),
        (datetime.datetime, datetime.datetime(2025, 10, 26, 2, tzinfo=ZoneInfo("Europe/Berlin")), "no fixed offset"),
        (datetime.datetime, datetime.datetime.min.replace(tzinfo=EAST), "years 1 to 9999"),
        (datetime.datetime, datetime.datetime.max.replace(tzinfo=WEST), "years 1 to 9999"),
        (str, b"a", "bytes"),
        (str, "\ud800", "surrogates"),
        (bytes, "a", "no bytes"),
        (bool, 1, "no bool"),
        (tuple[str, int], ("a",), "1 elements of 2"),
        (tuple[str, int], ("a", 1, 2), "3 elements of 2"),
        (tuple[str, int], ["a", 1], "no tuple"),
        (tuple[str, int], ("a", "b"), "no int"),
        (datetime.date, datetime.datetime(2020, 1, 1), "no date"),  # noqa: DTZ001
        (Colour, "red", "no Colour"),
        (uuid.UUID, "x", "no UUID"),
        (Route, "x", "Route"),
        (Route, None, "null"),
    ],
)
def test_what_is_no_key_is_refused_and_named(form, key, reason):
    with pytest.raises(ProductionError, match=r"table 't'|the key of topic") as caught:
        order(form).encode(key)
    assert reason in str(caught.value)


@pytest.mark.parametrize("form", [int, Colour, Route])
def test_types_without_prefixes_say_so(form):
    with pytest.raises(ProductionError, match="have no prefixes"):
        order(form).prefix("a")


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (str, b"\xff"),
        (int, b"1234567"),
        (int, b"123456789"),
        (bool, b"\2"),
        (bool, b""),
        (tuple[str, int], b"a\0\0"),
        (tuple[str, int], b"a"),
        (str | None, b"\2"),
        (tuple[int, ...], b"\3"),
        (uuid.UUID, b"short"),
        (datetime.date, b"\xff\xff\xff\xff"),
        (datetime.datetime, b"\1\xff\xff\xff\xff\xff\xff\xff\xff"),
        (Level, order(int).encode(3)),
        (Route, b"{}"),
    ],
)
def test_other_bytes_are_damage(form, data):
    with pytest.raises(StateCorruptedError, match="table 't'"):
        order(form).decode(data)


@pytest.mark.parametrize(
    ("form", "serializer", "kind", "same"),
    [
        (str, None, StrOrder, True),
        (str, "json", StrOrder, False),
        (bytes, None, BytesOrder, True),
        (bytes, "json", BytesOrder, False),
        (Route, None, SerializedOrder, True),
        (tuple[str, Route], None, SerializedOrder, True),
        (dict[str, int], "msgpack", SerializedOrder, True),
        (int | str, None, SerializedOrder, True),
    ],
)
def test_one_encoding_serves_where_the_log_has_the_same_bytes(form, serializer, kind, same):
    encoding = order(form, serializer)
    assert type(encoding) is kind
    assert encoding.same_as_serialized is same


@pytest.mark.parametrize(
    ("form", "keys"),
    [
        (str, ["", "ä"]),
        (bytes, [b"\0"]),
        (Route, [Route("a", 1)]),
        (int | str, [1, "1"]),
    ],
)
def test_same_bytes_are_the_same(form, keys):
    codec = bind_codec(form, None, topic="c", part="key")
    encoding = key_order(codec, table="t")
    assert encoding.same_as_serialized
    for key in keys:
        assert encoding.encode(key) == codec.encode(key)
        assert encoding.decode(encoding.encode(key)) == key


def test_names_tell_types_apart():
    forms = [
        str,
        bytes,
        int,
        float,
        bool,
        Route,
        str | None,
        tuple[str, int],
        tuple[str, ...],
        tuple[str],
        Colour,
        Level,
    ]
    assert len({order(form).name for form in forms}) == len(forms)


def test_after_the_last_prefix_comes_nothing():
    assert after_prefix(b"\xff\xff") is None
    assert after_prefix(b"") is None
    assert after_prefix(b"a\xff") == b"b"


class Priced(msgspec.Struct, frozen=True):
    price: float


@dataclass(frozen=True)
class Noted:
    name: str
    note: str = field(default="", compare=False)


@dataclass(frozen=True)
class Likened:
    name: str
    note: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Likened) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Alike(msgspec.Struct, frozen=True):
    name: str
    note: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


@pytest.mark.parametrize(
    "form",
    [Decimal, Priced, int | float, int | bool, tuple[Decimal, str], dict[str, float], Any, Noted, Likened, Alike],
)
def test_keys_that_are_equal_and_written_differently_are_refused(form: Any) -> None:
    codec = bind_codec(form, None, topic="t", part="key")
    with pytest.raises(SchemaError, match="one key would be two"):
        key_order(codec, table="prices")
