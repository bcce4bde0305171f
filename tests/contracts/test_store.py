"""What every store promises, on each kind of store."""

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamflow.errors import ClosedError, StateLockedError
from streamflow.state.memory import MemoryStores
from streamflow.state.rocksdb import RocksStores
from streamflow.state.store import ATOMIC_CHANGES, Checkpoint, StoreBatch
from tests.state.processes import BUDGET, identity, table

KINDS = {"memory": MemoryStores, "rocksdb": lambda: RocksStores(BUDGET)}


@pytest.fixture(params=KINDS)
def stores(request):
    made = KINDS[request.param]()
    yield made
    made.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "slot" / "total-0")


@pytest.fixture
def store(stores, path):
    return stores.open(path, identity())


def batch(checkpoint=None, /, **tables) -> StoreBatch:
    made = StoreBatch(checkpoint)
    for name, changes in tables.items():
        for key, value in changes.items():
            if value is None:
                made.delete(name, key)
            else:
                made.put(name, key, value)
    return made


ABC = {b"a": b"1", b"b": b"2", b"c": b"3"}


def test_a_new_store_is_empty(store, path):
    assert store.checkpoint == Checkpoint()
    assert store.get("x", b"a") is None
    assert list(store.scan("x")) == []
    assert store.path == path
    assert store.set_aside is None
    assert store.identity == identity()


def test_what_was_written_is_read(store):
    store.write(batch(x=ABC | {b"": b"empty key", b"e": b""}, y={b"a": b"other table"}))
    assert store.get("x", b"a") == b"1"
    assert store.get("x", b"") == b"empty key"
    assert store.get("x", b"e") == b""
    assert store.getter("y")(b"a") == b"other table"
    assert store.getter("y")(b"b") is None
    assert store.get_many("x", [b"c", b"missing", b"a", b"c"]) == [b"3", None, b"1", b"3"]
    assert store.get_many("x", []) == []


def test_the_last_change_of_a_key_counts(store):
    made = batch(x=ABC)
    made.delete_range("x", b"a", b"c")
    made.put("x", b"b", b"again")
    made.delete("x", b"c")
    made.delete("x", b"missing")
    assert len(made) == 4
    store.write(made)
    assert list(store.scan("x")) == [(b"b", b"again")]


@pytest.mark.parametrize(
    ("start", "stop", "left"),
    [
        (b"", None, b""),
        (b"b", None, b"a"),
        (b"", b"b", b"bc"),
        (b"b", b"c", b"ac"),
        (b"c", b"a", b"abc"),
        (b"b", b"b", b"abc"),
        (b"d", None, b"abc"),
    ],
)
def test_a_range_is_deleted(store, start, stop, left):
    store.write(batch(x=ABC, y=ABC))
    made = StoreBatch()
    made.delete_range("x", start, stop)
    store.write(made)
    assert b"".join(key for key, _ in store.scan("x")) == left
    assert dict(store.scan("y")) == ABC


def test_the_checkpoint_is_the_last_one_written(stores, store, path):
    first = Checkpoint({"x": 5, "y": 2**53 + 1}, {"in": 7}, "id-1", 123)
    store.write(batch(first, x=ABC))
    assert store.checkpoint == first
    store.write(batch(x={b"d": b"4"}))
    assert store.checkpoint == first
    store.write(StoreBatch(Checkpoint({"x": 6})))
    assert store.checkpoint == Checkpoint({"x": 6})
    store.close()
    again = stores.open(path, identity())
    assert again.checkpoint == Checkpoint({"x": 6})
    assert dict(again.scan("x")) == ABC | {b"d": b"4"}


def test_an_unknown_table_is_an_error_and_nothing_is_written(store):
    for call in (
        lambda: store.get("z", b"a"),
        lambda: store.getter("z"),
        lambda: store.get_many("z", [b"a"]),
        lambda: store.scan("z"),
        lambda: store.clear("z"),
        lambda: store.write(batch(Checkpoint({"x": 1}), x=ABC, z=ABC)),
    ):
        with pytest.raises(KeyError, match="z"):
            call()
    assert store.checkpoint == Checkpoint()
    assert list(store.scan("x")) == []


# --- iteration -------------------------------------------------------------------------------------------------------

keys = st.binary(max_size=3) | st.lists(st.sampled_from([0, 1, 254, 255]), max_size=3).map(bytes)
changes = st.dictionaries(keys, st.none() | st.binary(max_size=2), max_size=12)


@given(
    steps=st.lists(changes | st.tuples(keys, st.none() | keys), max_size=4),
    start=st.none() | keys,
    stop=st.none() | keys,
    reverse=st.booleans(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_scan_is_a_sorted_dict(store, steps, start, stop, reverse):
    clean = StoreBatch()
    clean.delete_range("x")
    store.write(clean)
    model: dict[bytes, bytes] = {}
    made = StoreBatch()
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            low, high = step
            made.delete_range("x", low, high)
            model = {key: value for key, value in model.items() if key < low or (high is not None and key >= high)}
        else:
            for key, value in step.items():
                if value is None:
                    made.delete("x", key)
                    model.pop(key, None)
                else:
                    made.put("x", key, value)
                    model[key] = value
        if number % 2:
            store.write(made)
            made = StoreBatch()
    store.write(made)
    wanted = sorted(pair for pair in model.items() if pair[0] >= (start or b"") and (stop is None or pair[0] < stop))
    assert list(store.scan("x", start, stop, reverse=reverse)) == (wanted[::-1] if reverse else wanted)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_shows_the_moment_of_its_call(store, reverse):
    store.write(batch(x=ABC))
    scan = store.scan("x", reverse=reverse)
    untouched = store.scan("x", reverse=reverse)
    wanted = sorted(ABC.items(), reverse=reverse)
    assert next(scan) == wanted[0]
    made = batch(x={b"b": b"new", b"bb": b"added"})
    made.delete("x", b"c")
    made.delete("x", b"a")
    store.write(made)
    assert list(scan) == wanted[1:]
    assert list(untouched) == wanted
    assert list(scan) == []
    assert dict(store.scan("x")) == {b"b": b"new", b"bb": b"added"}


def test_a_scan_keeps_its_bounds_whatever_memory_is_used_for_meanwhile(store):
    keys = [b"key-%04d" % number for number in range(1000)]
    store.write(batch(x=dict.fromkeys(keys, b"")))
    for first in range(0, 400, 10):
        found = store.scan("x", b"key-%04d" % first, b"key-%04d" % (first + 500))
        used = [bytes([number % 256]) * (number % 64) for number in range(2000)]  # where a bound may have been
        assert [key for key, _ in found] == keys[first : first + 500]
        del used


def test_readers_go_on_while_a_thread_writes(store):
    store.write(batch(x={b"%04d" % number: b"0" for number in range(2000)}))
    problems = []

    def write():
        try:
            for version in range(1, 15):
                store.write(batch(x={b"%04d" % number: b"%d" % version for number in range(0, 2000, 2)}))
        except Exception as exc:
            problems.append(exc)

    thread = threading.Thread(target=write)
    thread.start()
    rounds = 0
    while thread.is_alive() or rounds == 0:
        rounds += 1
        assert sum(1 for _ in store.scan("x")) == 2000
        assert store.get("x", b"0001") == b"0"
        assert None not in store.get_many("x", [b"0002", b"1998"])
    thread.join()
    assert problems == []
    assert store.get("x", b"1998") == b"14"


# --- large batches, clearing, closing --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [ATOMIC_CHANGES, ATOMIC_CHANGES * 5 + 7])
def test_large_batches_are_whole(store, size):
    many = {b"%06d" % number: b"v" * (number % 50) for number in range(size)}
    store.write(batch(Checkpoint({"x": size}), x=many, y=many))
    assert dict(store.scan("x")) == dict(store.scan("y")) == many
    store.write(batch(Checkpoint({"x": size + 1}), x=dict.fromkeys(many)))
    assert list(store.scan("x")) == []
    assert store.checkpoint.changelogs == {"x": size + 1}


def test_clearing_a_table_forgets_its_position(stores, store, path):
    store.write(batch(Checkpoint({"x": 5, "y": 6}, {"in": 3}, "id"), x=ABC, y=ABC))
    store.clear("x")
    wanted = Checkpoint({"y": 6}, {"in": 3}, "id")
    assert (list(store.scan("x")), dict(store.scan("y")), store.checkpoint) == ([], ABC, wanted)
    store.close()
    assert stores.open(path, identity()).checkpoint == wanted


def test_after_close_everything_says_closed(store):
    store.write(batch(x=ABC))
    get, scan = store.getter("x"), store.scan("x")
    assert next(scan) == (b"a", b"1")
    store.close()
    store.close()
    for call in (
        lambda: store.get("x", b"a"),
        lambda: get(b"a"),
        lambda: store.getter("x"),
        lambda: store.get_many("x", [b"a"]),
        lambda: store.get_many("x", []),
        lambda: store.scan("x"),
        lambda: next(scan),
        lambda: store.write(StoreBatch()),
        lambda: store.clear("x"),
        lambda: store.checkpoint,
        lambda: store.stats(),
        lambda: store.flush(),
    ):
        with pytest.raises(ClosedError, match="total-0"):
            call()


def test_a_store_is_open_once(stores, store, path):
    for call in (
        lambda: stores.open(path, identity()),
        lambda: stores.peek(path),
        lambda: stores.set_aside(path, "x", "x"),
    ):
        with pytest.raises(StateLockedError, match="total-0"):
            call()
    store.write(batch(Checkpoint({"x": 1}), x=ABC))
    scan = store.scan("x")
    assert next(scan)
    store.close()
    assert stores.peek(path) == Checkpoint({"x": 1})
    assert dict(stores.open(path, identity()).scan("x")) == ABC


def test_closing_all_closes_each(stores, store, path):
    stores.close()
    with pytest.raises(ClosedError):
        store.get("x", b"a")
    assert stores.open(path, identity()).set_aside is None


def test_figures(store):
    store.write(batch(x=ABC))
    stats = store.stats()
    assert stats.entries == {"x": 3, "y": 0}
    assert stats.bytes_in_memory > 0
    store.flush()
    assert dict(store.scan("x")) == ABC


# --- identity --------------------------------------------------------------------------------------------------------

OTHERS = {
    "app": identity(app="other"),
    "task": identity(task="other"),
    "partition": identity(partition=1),
    "table": identity(tables={"x": table(topic_id="id-2"), "y": table()}),
    "newer": identity(format=0),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_what_belongs_to_something_else_is_set_aside(stores, store, path, reason, caplog):
    store.write(batch(Checkpoint({"x": 9}), x=ABC))
    store.close()
    other = stores.open(path, OTHERS[reason])
    assert other.set_aside is not None
    assert other.set_aside.reason == reason
    assert path in caplog.text
    assert other.set_aside.text in caplog.text
    assert (other.checkpoint, list(other.scan("x")), other.identity) == (Checkpoint(), [], OTHERS[reason])
    other.close()
    assert stores.open(path, OTHERS[reason]).set_aside is None


@pytest.mark.parametrize(
    "field", ["changelog", "topic_id", "key_order", "key_serializer", "value_serializer", "format"]
)
def test_every_part_of_a_tables_identity_counts(stores, store, path, field):
    store.close()
    changed = identity(tables={"x": table(), "y": table(**{field: 2 if field == "format" else "changed"})})
    aside = stores.open(path, changed).set_aside
    assert aside is not None
    assert "'y'" in aside.text
    assert field.replace("_", " ") in aside.text


def test_tables_come_and_go(stores, store, path):
    store.write(batch(Checkpoint({"x": 5, "y": 6}, {"in": 3}), x=ABC, y=ABC))
    store.close()
    store = stores.open(path, identity("y", "z"))
    assert store.set_aside is None
    assert store.checkpoint == Checkpoint({"y": 6}, {"in": 3})
    assert (dict(store.scan("y")), list(store.scan("z"))) == (ABC, [])
    with pytest.raises(KeyError):
        store.get("x", b"a")
    store.write(batch(Checkpoint({"y": 7, "z": 1}), z=ABC))
    store.close()
    store = stores.open(path, identity("x", "y", "z"))
    assert store.checkpoint == Checkpoint({"y": 7, "z": 1})  # x starts anew, also in what it holds
    assert (list(store.scan("x")), dict(store.scan("z"))) == ([], ABC)


def test_a_store_is_set_aside_on_request(stores, store, path, caplog):
    store.write(batch(Checkpoint({"x": 5}), x=ABC))
    store.close()
    aside = stores.set_aside(path, "stale", "it missed deletes")
    assert (aside.reason, aside.text) == ("stale", "it missed deletes")
    assert "it missed deletes" in caplog.text
    assert stores.set_aside(path, "stale", "nothing is there") is None
    assert stores.open(path, identity()).checkpoint == Checkpoint()
