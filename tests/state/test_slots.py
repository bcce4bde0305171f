"""Slots among real processes: one owner each, the lowest free one; stores move between them."""

import os
import shutil
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow import disk
from streamflow.errors import ClosedError, StateLockedError, StateRefusedError
from streamflow.state import slots
from streamflow.state.memory import MemoryStores
from streamflow.state.rocksdb import RocksStores
from streamflow.state.store import Checkpoint, StoreBatch
from tests.state.processes import BUDGET, Child, identity

names = st.text(max_size=200) | st.sampled_from(
    ["a.b", "A.b", ".aside-", "x.aside-1", "con", "..", ".", "0", ".lock", "%2e"]
)


@given(st.lists(names, min_size=2, max_size=6, unique=True))
def test_safe_names_are_distinct_also_without_capitals(some):
    safe = [slots.safe_name(name) for name in some]
    assert len(set(safe)) == len(safe)
    for one in safe:
        assert one == one.lower()
        assert 0 < len(one.encode()) <= 120
        assert "/" not in one
        assert "\0" not in one
        assert not one.startswith(".")
        assert ".aside-" not in one


def test_usual_names_stay_as_they_are():
    assert slots.safe_name("total-orders.v1_x-12") == "total-orders.v1_x-12"


def test_a_restart_finds_its_slot_and_id_again(tmp_path):
    with slots.claim(str(tmp_path), "App") as slot:
        first = slot.id
        assert slot.path == str(tmp_path / "%41pp" / "0")
        assert slot.store_path("Total-0") == os.path.join(slot.path, "%54otal-0")
    with slots.claim(str(tmp_path), "App") as slot:
        assert (slot.number, slot.id) == (0, first)
        with slots.claim(str(tmp_path), "App") as other, slots.claim(str(tmp_path), "other") as stranger:
            assert (other.number, stranger.number) == (1, 0)
            assert len({first, other.id, stranger.id}) == 3


def test_the_lowest_free_slot_is_taken(tmp_path):
    held = [slots.claim(str(tmp_path), "app") for _ in range(4)]
    held[1].release()
    held[1].release()
    held[3].release()
    assert [slots.claim(str(tmp_path), "app").number for _ in range(3)] == [1, 3, 4]


def test_all_slots_are_locked_together_or_none(tmp_path):
    assert slots.claim_all(str(tmp_path), "app") == []
    assert not (tmp_path / "app").exists()
    first, second = (slots.claim(str(tmp_path), "app") for _ in range(2))
    first.release()
    with pytest.raises(StateLockedError, match=rf"{second.path}: a live process works in it \(process {os.getpid()}\)"):
        slots.claim_all(str(tmp_path), "app")
    second.release()
    every = slots.claim_all(str(tmp_path), "app")
    assert [(slot.number, slot.id) for slot in every] == [(0, first.id), (1, second.id)]
    with slots.claim(str(tmp_path), "app") as third:
        assert third.number == 2
    for slot in every:
        slot.release()


def test_who_has_a_name_finds_the_slot_that_it_had_whoever_comes_first(tmp_path):
    def claimed(*names):
        taken = [slots.claim(str(tmp_path), "app", name) for name in names]
        for slot in taken:
            slot.release()
        return [slot.number for slot in taken]

    assert claimed("a", "b") == [0, 1]
    assert claimed("b", "a") == [1, 0]
    assert claimed("b") == [1]
    assert claimed("b", "c", "a") == [1, 0, 2]  # that of a was free when c came: no slot is kept for who is away
    assert claimed("a", "b", "c") == [2, 1, 0]


def test_a_slot_without_a_name_is_taken_before_that_of_another(tmp_path):
    with slots.claim(str(tmp_path), "app", "a"), slots.claim(str(tmp_path), "app"):
        pass
    with slots.claim(str(tmp_path), "app", "b") as slot:
        assert slot.number == 1
        with slots.claim(str(tmp_path), "app") as other:
            assert other.number == 0
    with slots.claim(str(tmp_path), "app", "a") as slot:  # it has the name no more
        assert slot.number == 0


def test_two_with_one_name_have_a_slot_each(tmp_path):
    with slots.claim(str(tmp_path), "app", "a") as slot, slots.claim(str(tmp_path), "app", "a") as other:
        assert [slot.number, other.number] == [0, 1]


def test_a_slot_tells_what_is_in_it_but_for_its_own_files(tmp_path):
    with slots.claim(str(tmp_path), "app", "a") as slot:
        assert slot.contents() == []
        places = [os.path.join(slot.path, name) for name in ("total-0", "total-1.aside-app")]
        for place in places:
            os.mkdir(place)
        assert slot.contents() == places


def test_a_damaged_id_is_made_anew_and_said(tmp_path, caplog):
    with slots.claim(str(tmp_path), "app") as slot:
        first = slot.id
    (tmp_path / "app" / "0" / ".id").write_text("")
    with slots.claim(str(tmp_path), "app") as slot:
        assert slot.id != first
        assert len(slot.id) == 32
    assert "cannot be read" in caplog.text


def test_processes_that_claim_at_once_get_a_slot_each(tmp_path):
    children = [Child("hold", str(tmp_path)) for _ in range(5)]
    try:
        for child in children:
            assert child.line() == "ready"
        for child in children:
            child.tell("go")
        claimed = [child.line().split() for child in children]
        assert sorted(int(number) for number, _ in claimed) == [0, 1, 2, 3, 4]
        assert len({slot_id for _, slot_id in claimed}) == 5
        killed = next(child for child, (number, _) in zip(children, claimed, strict=True) if number == "2")
        killed.kill()
        with slots.claim(str(tmp_path), "app") as slot:
            assert [str(slot.number), slot.id] == next(one for one in claimed if one[0] == "2")
    finally:
        for child in children:
            child.__exit__()


def test_a_stopped_process_keeps_its_slot(tmp_path):
    with Child("hold", str(tmp_path)) as child:
        child.tell("go")
        assert [child.line(), child.line().split()[0], child.line()] == ["ready", "0", "nothing"]
        child.signal(signal.SIGSTOP)
        with slots.claim(str(tmp_path), "app") as slot:
            assert slot.number == 1


def test_a_forked_child_does_not_keep_the_slot_of_a_killed_process(tmp_path):
    with Child("fork", str(tmp_path)) as child:
        number, forked = child.line().split()
        assert number == "0"
        child.wait()
        os.kill(int(forked), 0)  # it lives
        try:
            with slots.claim(str(tmp_path), "app") as slot:
                assert slot.number == 0
        finally:
            os.kill(int(forked), signal.SIGKILL)


def test_network_file_systems_and_files_in_the_way_are_refused(tmp_path, monkeypatch):
    (tmp_path / "app").write_text("")
    with pytest.raises(StateRefusedError, match="app"):
        slots.claim(str(tmp_path), "app")
    monkeypatch.setattr(disk, "file_system_type", lambda path: "nfs4")
    with pytest.raises(StateRefusedError, match="nfs4"):
        slots.claim(str(tmp_path), "other")
    assert os.listdir(tmp_path) == ["app"]


# --- adoption --------------------------------------------------------------------------------------------------------


def fill(stores, path, position):
    store = stores.open(path, identity())
    batch = StoreBatch(Checkpoint({"x": position}))
    batch.put("x", b"k", b"%d" % position)
    store.write(batch)
    store.close()


@pytest.fixture
def stores():
    made = RocksStores(BUDGET)
    yield made
    made.close()


def three_slots(tmp_path, stores):
    held = [slots.claim(str(tmp_path), "app") for _ in range(3)]
    fill(stores, held[1].store_path("total-0"), 5)
    fill(stores, held[2].store_path("total-0"), 9)
    return held


def test_the_store_that_is_furthest_moves_from_a_free_slot(tmp_path, stores):
    held = three_slots(tmp_path, stores)
    assert not held[0].adopt("total-0", stores)  # both are in use
    held[1].release()
    held[2].release()
    assert not held[0].adopt("other-0", stores)
    assert held[0].adopt("total-0", stores)
    assert not os.path.exists(held[2].store_path("total-0"))
    store = stores.open(held[0].store_path("total-0"), identity())
    assert (store.checkpoint.changelogs["x"], store.get("x", b"k"), store.set_aside) == (9, b"9", None)
    assert not held[0].adopt("total-0", stores)  # it has one
    with slots.claim(str(tmp_path), "app") as again:  # all locks of free slots were given back
        assert again.number == 1
        assert again.adopt("total-0", stores) is False  # its own
    held[0].release()
    with pytest.raises(ClosedError):
        held[0].adopt("total-0", stores)


def test_of_two_only_the_free_one_is_taken_and_damage_stays_where_it_is(tmp_path, stores):
    held = three_slots(tmp_path, stores)
    held[1].release()
    assert held[0].adopt("total-0", stores)
    assert stores.peek(held[0].store_path("total-0")) == Checkpoint({"x": 5})
    shutil.rmtree(held[0].store_path("total-0"))
    held[2].release()
    with open(os.path.join(held[2].store_path("total-0"), "CURRENT"), "w") as file:
        file.write("nonsense")
    assert not held[0].adopt("total-0", stores)
    assert os.path.exists(held[2].store_path("total-0"))


def test_peek_tells_nothing_of_what_is_not_there(tmp_path):
    for stores in (RocksStores(BUDGET), MemoryStores()):
        assert stores.peek(str(tmp_path / "missing")) is None


def test_processes_that_adopt_at_once_share_what_there_is(tmp_path, stores):
    tasks = [f"total-{number}" for number in range(6)]
    with slots.claim(str(tmp_path), "app") as first:
        for number, task in enumerate(tasks):
            fill(stores, first.store_path(task), number)
        children = [Child("hold", str(tmp_path), *tasks) for _ in range(3)]
        for child in children:
            assert child.line() == "ready"
            child.tell("go")
        # They have slots 1 to 3 and find slot 0 in use; one that is free again gives its stores to whoever is first.
        found = [(child.line().split()[0], child.line()) for child in children]
        assert sorted(number for number, _ in found) == ["1", "2", "3"]
        assert {adopted for _, adopted in found} == {"nothing"}
        for child in children:
            child.__exit__()
    os.rename(tmp_path / "app" / "0", tmp_path / "app" / "7")  # so that nobody claims it
    children = [Child("hold", str(tmp_path), *tasks) for _ in range(3)]
    try:
        for child in children:
            assert child.line() == "ready"
        for child in children:
            child.tell("go")
        adopted = []
        for child in children:
            child.line()
            adopted += [task for task in child.line().split() if task != "nothing"]
        assert sorted(adopted) == tasks
    finally:
        for child in children:
            child.__exit__()
