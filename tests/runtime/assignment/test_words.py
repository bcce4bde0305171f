"""What workers of several versions understand of one another."""

import zlib
from collections.abc import Iterable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.runtime.assignment import words
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import VERSION, Route, Says, Teller, Told

TASKS = st.builds(TaskId, st.text(max_size=5), st.integers(0, 2_000))
SETS = st.frozensets(TASKS, max_size=20)
SAYS = st.builds(
    Says,
    url=st.text(max_size=9),
    rack=st.text(max_size=9),
    capacity=st.integers(1, 99),
    follows=st.booleans(),
    standby=SETS,
    lags=st.dictionaries(TASKS, st.integers(0, 2**62), max_size=20),
    unpacks=st.booleans(),
    transactional_id=st.text(max_size=9),
    ran=st.none() | SETS,
)
NAMED = st.dictionaries(st.text(max_size=9), st.builds(Route, st.text(max_size=9), SETS, SETS), max_size=9)
ROUTES = st.dictionaries(
    st.text(max_size=9), st.builds(Route, st.text(max_size=9), SETS, SETS, st.text(max_size=9)), max_size=9
)

NEW = Says("http://new", "a", 3, unpacks=True)


def packed(version: int = VERSION, **fields: object) -> bytes:
    return bytes([version]) + msgspec.msgpack.encode(fields)


@given(SAYS)
def test_what_is_said_is_heard(says: Says) -> None:
    assert Says.decode(says.encode(), "w") == says


def without_copies(routes: Iterable[Route]) -> list[Route]:
    return [replace(route, standby=frozenset()) for route in routes]


def in_order(routes: Iterable[Route]) -> list[Route]:
    return sorted(
        routes, key=lambda route: (route.url, sorted(route.active), sorted(route.standby), route.transactional_id)
    )


@given(SETS, SETS, ROUTES.filter(bool), SETS)
def test_what_is_told_is_heard_in_full_and_in_short(
    standby: frozenset[TaskId], warm_up: frozenset[TaskId], routes: dict[str, Route], behind: frozenset[TaskId]
) -> None:
    me = min(routes)
    told, (brief, least) = Teller(routes, 7, behind).tell(me, NEW, standby, warm_up)
    for data, expected in (
        (told, list(routes.values())),
        (brief.told, without_copies(routes.values())),
        (least.told, []),
    ):
        heard = Told.decode(data)
        assert (heard.standby, heard.warm_up, heard.active) == (standby, warm_up, routes[me].active)
        assert (heard.said, heard.acceptable_lag_records) == (NEW.checksum, 7)
        assert in_order(heard.routes.values()) == in_order(expected)
        assert heard.behind == (behind if data is told else frozenset())


def test_the_shorter_forms_are_written_only_where_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round of every group would pay for what one near the broker's limit needs."""
    written: list[msgspec.Struct] = []
    write = words._write

    def note(word: msgspec.Struct) -> bytes:
        written.append(word)
        return write(word)

    monkeypatch.setattr(words, "_write", note)
    routes = {name: Route(f"http://{name}") for name in "abc"}
    teller = Teller(routes, 7)
    told = [teller.tell(name, says, [], []) for name, says in zip("abc", (NEW, NEW, Says()), strict=True)]
    assert len(written) == 3
    assert len(teller._packed) == len(teller._plain) == 1
    for full, shorter in told:
        assert len(shorter) == 2
        assert len(shorter[-1].told) < len(full)
    assert len(written) == 6


@given(SETS, SETS, NAMED.filter(bool))
def test_who_reads_no_packed_routes_is_told_them_by_name(
    standby: frozenset[TaskId], warm_up: frozenset[TaskId], routes: dict[str, Route]
) -> None:
    told, (brief, least) = Teller(routes, 7).tell(min(routes), Says(), standby, warm_up)
    assert Told.decode(told) == Told(standby, warm_up, None, routes)
    short = dict(zip(routes, without_copies(routes.values()), strict=True))
    assert Told.decode(brief.told) == Told(standby, warm_up, None, short)
    assert Told.decode(least.told) == Told(standby, warm_up)


def test_many_workers_fit_into_two_bytes_each() -> None:
    routes = {f"w{number}": Route(f"http://w{number}", frozenset({TaskId("s", number)})) for number in range(300)}
    told, _ = Teller(routes, 7).tell("w299", NEW, [], [])
    assert in_order(Told.decode(told).routes.values()) == in_order(routes.values())


@pytest.mark.parametrize(
    "routes",
    [
        b"?",
        zlib.compress(b"\xc1"),
        zlib.compress(msgspec.msgpack.encode({"urls": ["u"]}))[:-1],
        zlib.compress(msgspec.msgpack.encode({"urls": ["u"], "active": {"s": [b"\x02"]}})),
        zlib.compress(msgspec.msgpack.encode({"urls": ["u"], "bytes_each": 2, "active": {"s": [b"\x01"]}})),
        zlib.compress(msgspec.msgpack.encode({"urls": [b"\xff"]})),
        zlib.compress(msgspec.msgpack.encode({"urls": ["u", "v"], "ids": ["x"]})),
        zlib.compress(b"\x81\xa4urls\x91\xa1\xff"),
        zlib.compress(bytes(65 * 1024 * 1024)),
    ],
)
def test_packed_routes_that_cannot_be_read_take_nothing_else_with_them(
    routes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told.decode(packed(standby={"s": [1]}, active={"s": [0]}, packed=routes))
    assert told == Told(frozenset({TaskId("s", 1)}), active=frozenset({TaskId("s", 0)}))
    assert "where tasks are" in caplog.text


def test_what_may_change_while_a_worker_runs_is_not_in_its_checksum() -> None:
    assert NEW.checksum == replace(NEW, standby=frozenset({TaskId("s", 1)}), lags={TaskId("s", 1): 3}).checksum
    others = [replace(NEW, **changed) for changed in ({"url": "u"}, {"rack": "b"}, {"capacity": 4}, {"follows": True})]
    assert len({each.checksum for each in (NEW, *others)}) == 5
    assert NEW.checksum == 397581601, "other versions have to come to the same"


def test_who_says_nothing_takes_part_without_state_rack_or_address() -> None:
    assert Says.decode(b"", "w") == Says("", "", 1, follows=False, standby=frozenset(), lags={}, ran=None)
    assert Told.decode(b"") == Told(frozenset(), frozenset(), None, {}, None, None, frozenset())


def test_what_a_newer_version_adds_is_passed_over() -> None:
    says = packed(rack="a", capacity=3, lags={"s": {1: 5}}, cpus=4, zones={"a": [1]})
    assert Says.decode(says, "w") == Says(rack="a", capacity=3, lags={TaskId("s", 1): 5})
    told = packed(standby={"s": [0]}, routes={"m": {"url": "u", "load": 3}}, epoch=7)
    assert Told.decode(told) == Told(frozenset({TaskId("s", 0)}), routes={"m": Route("u")})


def test_what_an_older_version_does_not_say_has_its_default() -> None:
    assert Says.decode(packed(), "w") == Says()
    assert Says.decode(packed(url="http://a"), "w") == Says(url="http://a")
    assert Told.decode(packed()) == Told()
    assert Told.decode(packed(routes={"m": {}})) == Told(routes={"m": Route()})


@pytest.mark.parametrize(
    "data",
    [
        packed(VERSION + 1, rack="a", standby={"s": [1]}),
        bytes([VERSION]),
        bytes([VERSION, 0xC1]),
        packed(capacity=0, standby={"s": [-1]}),
        packed(lags={"s": {1: -5}}, routes=3),
        packed(rack=b"\xff", warm_up="all"),
        packed(url=1, standby=2),
        b"\xff" * 9,
    ],
)
def test_what_cannot_be_read_is_as_if_it_were_not_said_and_is_logged(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert Says.decode(data, "w") == Says()
    assert "member 'w' says" in caplog.text
    caplog.clear()
    assert Told.decode(data) == Told()
    assert "tells this worker" in caplog.text


def test_words_are_short() -> None:
    """About three bytes a task, so that a thousand tasks fit into a group's metadata many times."""
    names = ["orders", "payments"]
    routes = {
        f"worker-{number}": Route(
            f"http://10.0.0.{number}:6066",
            frozenset(TaskId(name, number * 10 + k) for name in names for k in range(10)),
        )
        for number in range(50)
    }
    told, _ = Teller(routes, 7).tell("worker-1", Says(), [], [])
    assert len(told) < 50 * (20 * 3 + 80)
    assert len(Says().encode()) < 10
