"""RocksDB under real faults: killed processes, damaged files, full disks, locks."""

import contextlib
import glob
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time

import pytest
from rocksdict import Options, Rdict

from streamflow.errors import ClosedError, StateCorruptedError, StateFullError, StateLockedError, StateRefusedError
from streamflow.state import rocksdb_faults
from streamflow.state.rocksdb import RocksStores
from streamflow.state.rocksdb_options import Memory
from streamflow.state.store import ATOMIC_CHANGES, Checkpoint, StoreBatch
from tests.state.processes import BATCH, BUDGET, Child, expected, identity

NOBODY = 65534


@pytest.fixture
def stores():
    made = RocksStores(BUDGET)
    yield made
    made.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "total-0")


def filled(stores, path, entries=3000):
    store = stores.open(path, identity())
    batch = StoreBatch(Checkpoint({"x": entries}, {"in": entries}, "id"))
    for number in range(entries):
        batch.put("x", b"%06d" % number, b"value-%d" % number)
    store.write(batch)
    return store


# --- scans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [6, 8, 16, 32])
def test_a_scan_goes_to_its_bound_whatever_happens_in_memory_meanwhile(stores, path, reverse, size):
    store = stores.open(path, identity())
    keys = [b"\x80" + number.to_bytes(size - 1, "big") for number in range(100)]
    batch = StoreBatch(Checkpoint())
    for key in keys:
        batch.put("x", key, b"value")
    store.write(batch)
    for _ in range(50):
        scan = store.scan("x", bytes(bytearray(keys[5])), bytes(bytearray(keys[25])), reverse=reverse)
        reused = [bytes([7] * size) for _ in range(2000)]  # takes the place of what was freed
        wanted = keys[5:25]
        assert [key for key, _ in scan] == (wanted[::-1] if reverse else wanted)
        del reused


class Slow:
    """A native iterator that stands in the middle of a step until it may go on."""

    def __init__(self, native):
        self._native = native
        self.is_inside, self.may_go_on = threading.Event(), threading.Event()

    def next(self):
        self.is_inside.set()
        self.may_go_on.wait(10)
        self._native.next()

    def __getattr__(self, name):
        return getattr(self._native, name)


def test_a_store_that_is_closed_while_a_thread_iterates_waits_for_its_step_and_is_not_locked(stores, path):
    store = filled(stores, path)
    scan = store.scan("x")
    slow = scan._native = Slow(scan._native)
    rows, errors = [], []

    def iterate():
        try:
            rows.extend(scan)
        except ClosedError as error:
            errors.append(error)

    iterating, closing = threading.Thread(target=iterate), threading.Thread(target=store.close)
    iterating.start()
    assert slow.is_inside.wait(10)
    closing.start()
    closing.join(0.2)
    waited = closing.is_alive()
    slow.may_go_on.set()
    del slow
    closing.join(10)
    reopened = stores.open(path, identity())  # nobody has it open any more
    iterating.join(10)
    assert waited
    assert len(list(reopened.scan("x"))) == 3000
    assert len(errors) == 1 or len(rows) == 3000


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_killed_process_leaves_whole_batches_and_all_that_it_acknowledged(stores, path):
    assert BATCH < ATOMIC_CHANGES
    acknowledged = 0
    for seed in range(6):
        with Child("write", path, str(seed)) as child:
            acknowledged = int(child.line())
            time.sleep(0.02 * seed)
            rest = child.kill()
        acknowledged = int(rest[-1]) if rest else acknowledged
        store = stores.open(path, identity())
        assert store.set_aside is None
        reached = store.checkpoint.inputs["in"]
        assert acknowledged <= reached <= acknowledged + 1
        assert store.checkpoint == Checkpoint(
            {"x": reached, "y": reached}, {"in": reached}, f"commit-{reached}", reached
        )
        assert {name: dict(store.scan(name)) for name in ("x", "y")} == expected(reached)
        store.close()


def test_a_large_batch_that_was_interrupted_is_at_most_ahead_of_its_checkpoint(stores, path):
    """Each value is that of the checkpoint or of the batch in hand: replay makes the store whole."""
    interrupted = 0
    for turn in range(8):
        with Child("write_large", path) as child:
            first = child.line()
            assert first.startswith("from")
            assert child.line() == first.split()[1]
            assert child.line().startswith("from")
            time.sleep(0.002 * turn)
            said = [line for line in child.kill() if not line.startswith("from")]
        acknowledged = int(said[-1]) if said else int(first.split()[1])
        store = stores.open(path, identity())
        reached = store.checkpoint.inputs["in"]
        assert acknowledged <= reached <= acknowledged + 1
        values = {int(value) for _, value in store.scan("x")}
        assert reached in values or reached + 1 in values
        assert values <= {reached, reached + 1}
        assert store.stats().entries["x"] > 0
        interrupted += len(values) == 2
        store.close()
    assert interrupted  # or the test has seen nothing


def test_what_a_crash_leaves_half_done_while_tables_change_is_finished(stores, path, monkeypatch):
    """Tables x, y become y, z; the process ends after each of the steps in turn."""
    filled(stores, path).close()
    whole = path + "-whole"
    shutil.copytree(path, whole)
    for failing in ("drop_column_family", "create_column_family", "second record"):
        shutil.rmtree(path)
        shutil.copytree(whole, path)
        _open_until(failing, path)
        store = stores.open(path, identity("y", "z"))
        assert store.set_aside is None
        assert (store.checkpoint.changelogs, list(store.scan("z"))) == ({}, [])
        store.close()
        store = stores.open(path, identity("x", "y", "z"))
        assert (store.checkpoint.changelogs, list(store.scan("x"))) == ({}, [])
        store.close()


class _Crash(BaseException):
    pass


def _open_until(failing, path):
    from streamflow.state import rocksdb_store

    class Crashing(rocksdb_store.RocksStore):
        records = 0

        def _record(self, identity):
            self.records += 1
            if failing == "second record" and self.records == 2:
                raise _Crash
            super()._record(identity)

    class CrashingDb:
        list_cf = staticmethod(Rdict.list_cf)

        def __init__(self, *arguments):
            self._db = Rdict(*arguments)

        def __getattr__(self, name):
            if name == failing:
                raise _Crash
            return getattr(self._db, name)

    store = Crashing(path, identity("y", "z"), Memory(BUDGET), lambda: None)
    original, rocksdb_store.Rdict = rocksdb_store.Rdict, CrashingDb
    try:
        with pytest.raises(_Crash):
            store.open()
    finally:
        rocksdb_store.Rdict = original
        store.close()


# --- damaged ---------------------------------------------------------------------------------------------------------


def one(path, pattern):
    return max(glob.glob(os.path.join(path, pattern)))


def flip(file, at, count=40):
    with open(file, "r+b") as opened:
        opened.seek(at)
        bytes_there = opened.read(count)
        assert bytes_there
        opened.seek(at)
        opened.write(bytes(byte ^ 0xFF for byte in bytes_there))


DAMAGE = {
    "CURRENT deleted": lambda path: os.remove(path + "/CURRENT"),
    "CURRENT empty": lambda path: open(path + "/CURRENT", "w").close(),
    "MANIFEST deleted": lambda path: os.remove(one(path, "MANIFEST-*")),
    "MANIFEST flipped": lambda path: flip(one(path, "MANIFEST-*"), 60),
    "MANIFEST cut": lambda path: os.truncate(one(path, "MANIFEST-*"), 30),
    "data deleted": lambda path: os.remove(one(path, "*.sst")),
    "data cut": lambda path: os.truncate(one(path, "*.sst"), 1000),
    "footer flipped": lambda path: flip(one(path, "*.sst"), os.path.getsize(one(path, "*.sst")) - 45),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_store_is_set_aside_and_begun_anew(stores, path, what, caplog):
    store = filled(stores, path)
    store.flush()
    store.close()
    DAMAGE[what](path)
    assert stores.peek(path) is None or what in {"data deleted", "data cut", "footer flipped"}
    store = stores.open(path, identity())
    assert store.set_aside is not None
    assert store.set_aside.reason == "damaged"
    assert store.set_aside.path in caplog.text
    assert os.listdir(store.set_aside.path)
    assert (store.checkpoint, list(store.scan("x"))) == (Checkpoint(), [])
    store.write(StoreBatch(Checkpoint({"x": 1})))
    store.close()
    assert stores.open(path, identity()).checkpoint == Checkpoint({"x": 1})


def test_damage_found_while_reading_is_named_and_never_a_value(stores, path):
    store = filled(stores, path)
    store.flush()
    store.close()
    tables = glob.glob(path + "/*.sst")
    flip(max(tables, key=os.path.getsize), 9000, 8000)
    again = RocksStores(BUDGET)  # with an empty cache
    store = again.open(path, identity())
    assert store.set_aside is None  # an open does not read all there is
    with pytest.raises(StateCorruptedError, match=r"total-0.*set aside"):
        list(store.scan("x"))
    every = [b"%06d" % number for number in range(3000)]
    with pytest.raises(StateCorruptedError):
        store.get_many("x", every)
    read = 0
    for key in every:
        try:
            assert store.get("x", key) == b"value-%d" % int(key)
            read += 1
        except StateCorruptedError:
            pass
    assert 0 < read < 3000
    store.close()
    assert again.set_aside(path, "damaged", "found while reading") is not None
    assert again.open(path, identity()).checkpoint == Checkpoint()
    again.close()


def test_a_damaged_end_of_the_write_ahead_log_only_makes_the_store_lag(stores, path):
    with Child("write_some", path, "5") as child:
        child.line()
        child.kill()
    (log,) = (name for name in glob.glob(path + "/*.log") if os.path.getsize(name))
    flip(log, os.path.getsize(log) - 2000)
    store = stores.open(path, identity())
    assert store.set_aside is None
    reached = store.checkpoint.inputs["in"]
    assert 0 < reached < 5
    assert {name: dict(store.scan(name)) for name in ("x", "y")} == expected(reached)


def test_a_manifest_that_is_cut_between_its_entries_is_damage_and_no_new_store(stores, path):
    store = filled(stores, path)
    store.flush()
    store.close()
    manifest = one(path, "MANIFEST-*")
    os.truncate(manifest, os.path.getsize(manifest) // 3)
    store = stores.open(path, identity())
    assert store.set_aside.reason == "damaged"
    assert list(store.scan("x")) == []


def test_something_else_in_its_place_is_set_aside(stores, path):
    theirs = Rdict(path, Options(raw_mode=True))
    theirs[b"a"] = b"1"
    theirs.close()
    aside = stores.open(path, identity()).set_aside
    assert (aside.reason, Rdict(aside.path, Options(raw_mode=True))[b"a"]) == ("unknown", b"1")


def test_a_store_that_was_never_completed_is_simply_made(stores, path):
    os.makedirs(path)
    for name in ("LOCK", "IDENTITY", "MANIFEST-000001"):
        open(os.path.join(path, name), "w").close()
    store = stores.open(path, identity())
    assert store.set_aside is None
    assert store.checkpoint == Checkpoint()


def test_two_that_are_set_aside_at_once_both_stay(stores, path):
    for _ in range(3):
        filled(stores, path).close()
        stores.set_aside(path, "Any Reason", "twice")
    assert len(glob.glob(path + ".aside-*-any-reason*")) == 3


# --- locked ----------------------------------------------------------------------------------------------------------


def test_a_store_that_a_live_process_has_open_is_refused_with_its_pid(stores, path):
    with Child("open", path) as child:
        assert child.line() == "open"
        with pytest.raises(StateLockedError) as caught:
            stores.open(path, identity())
        assert f"process {child.pid} " in str(caught.value)
        assert path in str(caught.value)
        child.kill()
    assert stores.open(path, identity()).set_aside is None


# --- no room, no right -----------------------------------------------------------------------------------------------


@pytest.fixture
def file_size_limit():
    """Sets how large a file may get, which RocksDB meets as it meets a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def large(number: int) -> StoreBatch:
    batch = StoreBatch(Checkpoint({"x": number}, {}, f"id-{number}"))
    for key in range(300):
        batch.put("x", b"%d" % key, b"%d" % number + os.urandom(3000))
    return batch


def survives_no_room(store, fill, empty):
    written = 0
    fill()
    for number in range(1, 30):
        try:
            store.write(large(number))
        except StateFullError:
            break
        written = number
    else:
        pytest.fail("there was always room")
    for _ in range(3):  # it stays so, reads go on, and the checkpoint is that of the last write
        with pytest.raises(StateFullError, match="free space"):
            store.write(large(written + 1))
        assert store.checkpoint.changelogs == {"x": written}
        assert store.get("x", b"7").startswith(b"%d" % written)
    scan = store.scan("x")
    assert next(scan)
    empty()
    with pytest.raises(StateFullError, match="iterate"):
        store.write(large(written + 1))
    del scan
    get = store.getter("x")
    store.write(large(written + 1))
    assert store.checkpoint.changelogs == {"x": written + 1}
    assert get(b"299").startswith(b"%d" % (written + 1))
    store.write(large(written + 2))
    store.flush()
    assert store.stats().entries["x"] >= 300


def test_a_file_that_goes_while_figures_are_made_is_not_counted(stores, path, monkeypatch):
    """RocksDB deletes files that it has merged, whenever it is done with them."""
    store = filled(stores, path)
    store.flush()
    gone, scandir = os.path.join(path, "999999.sst"), os.scandir
    with open(gone, "wb") as file:
        file.write(b"x")

    @contextlib.contextmanager
    def one_goes(folder):
        with scandir(folder) as entries:
            listed = list(entries)
            os.unlink(gone)
            yield listed

    monkeypatch.setattr(os, "scandir", one_goes)
    stats = store.stats()
    assert stats.files > 0
    monkeypatch.undo()
    assert stats == store.stats()


def test_a_full_disk_loses_nothing_and_writing_goes_on_when_there_is_room(stores, path, file_size_limit):
    store = stores.open(path, identity())
    store.write(large(0))
    survives_no_room(store, lambda: file_size_limit(950_000), lambda: file_size_limit(None))


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 12 MiB; skipped loudly where none can be mounted."""
    place = str(tmp_path / "disk")
    os.mkdir(place)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_really_full_disk_is_survived_as_well(stores, tiny_disk):
    store = stores.open(os.path.join(tiny_disk, "total-0"), identity())
    store.write(large(0))
    ballast = os.path.join(tiny_disk, "ballast")

    def fill():
        with open(ballast, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    survives_no_room(store, fill, lambda: os.remove(ballast))
    store.close()
    assert stores.open(os.path.join(tiny_disk, "total-0"), identity()).set_aside is None


def test_a_disk_that_is_full_at_the_start_is_said_to_be(stores, path, file_size_limit):
    store = filled(stores, path)
    store.close()
    file_size_limit(10)
    try:
        with pytest.raises(StateFullError, match="total-0"):
            stores.open(path, identity())
    finally:
        file_size_limit(None)
    store = stores.open(path, identity())
    assert (store.set_aside, store.checkpoint.commit_id) == (None, "id")


def test_a_place_that_cannot_be_used_is_refused_and_nothing_is_moved(stores, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "total-0"):
        with pytest.raises(StateRefusedError, match="file"):
            stores.open(str(place), identity())
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_store_of_another_user_is_refused_and_nothing_is_moved(stores):
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o755)
    path = os.path.join(directory, "total-0")
    filled(stores, path).close()
    try:
        os.seteuid(NOBODY)
        with pytest.raises(StateRefusedError, match="total-0"):
            stores.open(path, identity())
    finally:
        os.seteuid(0)
        assert os.listdir(directory) == ["total-0"]
        shutil.rmtree(directory)


# --- memory and files ------------------------------------------------------------------------------------------------


def test_write_buffers_of_all_stores_stay_in_their_share_and_files_few(tmp_path):
    stores = RocksStores(24 << 20)
    opened = [stores.open(str(tmp_path / str(number)), identity()) for number in range(6)]
    highest = 0
    for turn in range(60):
        store = opened[turn % 6] if turn < 30 else opened[0]  # five fall idle with full buffers
        batch = StoreBatch(Checkpoint({"x": turn}))
        for key in range(1500):
            batch.put("x", b"%08d" % (key * 7 % 5000), os.urandom(300))
        store.write(batch)
        highest = max(highest, stores.memory.buffers.get_usage())
    assert highest < 2 * stores.memory.buffer_bytes
    assert stores.memory.cache.get_usage() <= 1.2 * stores.memory.cache_bytes
    assert max(store.stats().files for store in opened) < 30
    stores.close()


def test_a_write_waits_for_nothing_while_rocksdb_holds_the_lock(stores, path, monkeypatch):
    """What RocksDB would stall is refused at once, and tried again outside of it."""
    store = stores.open(path, identity())
    slept = []
    real = store._db.write
    refusals = iter([Exception("Result incomplete: Write stall"), Exception("Result incomplete: Write stall")])

    class Stalling:
        def write(self, batch, options):
            assert options.no_slowdown
            for refusal in refusals:
                raise refusal
            real(batch, options)

    monkeypatch.setattr(store, "_db", Stalling())
    monkeypatch.setattr("streamflow.state.rocksdb_store.time.sleep", slept.append)
    batch = StoreBatch(Checkpoint({"x": 1}))
    batch.put("x", b"a", b"1")
    store.write(batch)
    monkeypatch.undo()
    assert (store.get("x", b"a"), len(slept)) == (b"1", 2)


@pytest.mark.parametrize("text", ["Corruption: x", "IO error: Input/output error"])
def test_what_else_rocksdb_says_is_damage(text):
    assert isinstance(rocksdb_faults.translate(Exception(text), "/p"), StateCorruptedError)
