"""What a worker says to its group, and when it asks for a round."""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import streamflow as sf
from streamflow.clock import VirtualClock
from streamflow.log.api import Membership
from streamflow.log.api import Told as ToldBytes
from streamflow.runtime import conversation
from streamflow.runtime.abandoned_transactions import AbandonedTransactions
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route, Says, Teller
from streamflow.runtime.conversation import Conversation
from streamflow.runtime.routes import Routes
from streamflow.runtime.standbys import Standbys

ONE, TWO, THREE = (TaskId("numbers", number) for number in range(3))


class Standby:
    def __init__(self, lag: int | None = None, given_up: str = "") -> None:
        self.lag, self.given_up = lag, given_up
        self.is_stuck, self.has_no_room = bool(given_up), False


class FakeStandbys(Standbys):
    """Those that are told, with the lags that the test gives them."""

    def __init__(self) -> None:
        self.told: frozenset[TaskId] = frozenset()
        self.warm_ups: frozenset[TaskId] = frozenset()
        self._held: dict[TaskId, Any] = {}
        self._refused = {}
        self._no_room_until_s = 0.0
        self._clock = VirtualClock()
        self.dormant: Any = SimpleNamespace(lags={})

    async def follow(self, standby: Iterable[TaskId], warm_up: Iterable[TaskId], running: Any) -> None:
        self.told, self.warm_ups = frozenset(standby), frozenset(warm_up)
        self._held = {task: self._held.get(task) or Standby() for task in self.told | self.warm_ups}

    def are(self, **lags: int | None) -> None:
        """Set how far those of partitions `p0` and `p1` are behind; None for one that is given up."""
        for name, lag in lags.items():
            self._held[TaskId("numbers", int(name[1:]))] = Standby(lag, "damaged" if lag is None else "")


class Group:
    def __init__(self) -> None:
        self.membership: Membership | None = Membership("app", "me", 1)
        self.asked: list[str] = []
        self.said = b""

    def say(self, words: bytes) -> None:
        self.said = words

    def rejoin(self, why: str) -> None:
        self.asked.append(why)


class Manager:
    is_finishing = False

    def __init__(self) -> None:
        self.running: set[TaskId] = set()
        self.lost: set[TaskId] = set()

    def has(self, task: TaskId) -> bool:
        return task in self.running

    def lags(self) -> dict[TaskId, int]:
        return {ONE: 7}

    def ran(self) -> frozenset[TaskId]:
        return frozenset({THREE})


class Side:
    """One member's side of the conversation."""

    def __init__(self) -> None:
        self.standbys, self.group, self.manager = FakeStandbys(), Group(), Manager()
        settings = sf.App("app").settings({"rack": "a", "capacity": 3, "acceptable_lag_records": 10})
        routes: Any = Routes()
        self.url = "http://here"
        self.abandoned = AbandonedTransactions("app-1", self.fence, VirtualClock())
        self.conversation = Conversation(
            settings,
            lambda: self.url,
            self.manager,  # type: ignore[arg-type]
            self.standbys,
            routes,
            self.abandoned,
            self.group,  # type: ignore[arg-type]
        )

    def word(self) -> Says:
        return conversation.says(
            self.conversation._settings, self.url, self.standbys, {ONE: 7}, "app-1", frozenset({THREE})
        )

    async def fence(self, transactional_id: str) -> None:
        raise AssertionError("nobody is gone")

    async def hear(
        self,
        *,
        standby: Iterable[TaskId] = (),
        warm_up: Iterable[TaskId] = (),
        active: Iterable[TaskId] = (),
        behind: Iterable[TaskId] = (),
        acceptable_lag_records: int = 10,
        said: Says | None = None,
    ) -> None:
        """Be told by a leader that has heard `said`, what this worker says if that is left out."""
        all_routes = {"me": Route("http://here", frozenset(active))}
        teller = Teller(all_routes, acceptable_lag_records, behind)
        told, _ = teller.tell("me", said or self.word(), standby, warm_up)
        await self.conversation.heard(ToldBytes(told, 1))

    def ask(self) -> list[str]:
        self.conversation._ask(self.word())
        return self.group.asked


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    at = [100.0]
    monkeypatch.setattr(conversation.anyio, "current_time", lambda: at[0])
    return at


async def test_what_is_followed_is_told_apart_by_what_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    side, three = Side(), TaskId("numbers", 2)
    await side.hear()
    await side.hear(standby=[three], warm_up=[ONE, TWO])
    await side.hear(standby=[three], warm_up=[ONE, TWO])  # nothing new
    await side.hear(standby=[three], warm_up=[ONE, TWO], active=[TWO])
    side.manager.running = {TWO}
    await side.hear(standby=[three], warm_up=[ONE, TWO], active=[TWO])
    await side.hear()
    warming = "warming up, to run here once they have caught up"
    assert caplog.messages == [
        f"standbys: numbers-2; {warming}: numbers-0, numbers-1",
        f"standbys: numbers-2; {warming}: numbers-0; about to run here: numbers-1",
        f"standbys: numbers-2; {warming}: numbers-0",
        "standbys: none",
    ]


async def test_a_round_is_asked_for_once_when_all_warm_ups_are_near_enough(at: list[float]) -> None:
    side = Side()
    assert not side.ask()
    await side.hear(warm_up={ONE, TWO})
    assert not side.ask()
    side.standbys.are(p0=0, p1=11)
    assert not side.ask()
    side.standbys.are(p0=0, p1=10)
    assert side.ask() == ["warmed up numbers-0, numbers-1"]
    assert len(side.ask()) == 1
    at[0] += 29
    assert len(side.ask()) == 1
    at[0] += 2
    assert len(side.ask()) == 2  # what it was told stayed the same: the round came when they had fallen behind
    await side.hear(warm_up={TWO})
    side.standbys.are(p1=0)
    assert side.ask()[-1] == "warmed up numbers-1"


async def test_nothing_is_asked_for_what_comes_by_itself() -> None:
    side = Side()
    await side.hear(warm_up={ONE, TWO}, active={ONE})
    side.standbys.are(p0=50, p1=0)
    assert side.ask() == ["warmed up numbers-1"]
    await side.hear(warm_up={ONE}, active={ONE})
    side.standbys.are(p0=0)
    assert len(side.ask()) == 1


async def test_what_had_come_and_was_lost_is_asked_for_again_at_once(at: list[float]) -> None:
    """It is told to be warmed up all the time: at first to get it, then as it comes, then to get it back."""
    side = Side()
    await side.hear(warm_up={ONE})
    side.standbys.are(p0=0)
    assert side.ask() == ["warmed up numbers-0"]
    await side.hear(warm_up={ONE}, active={ONE})
    side.standbys.are(p0=0)
    assert len(side.ask()) == 1
    at[0] += 7
    await side.hear(warm_up={ONE})
    side.standbys.are(p0=0)
    assert len(side.ask()) == 2


async def test_one_that_is_done_does_not_wait_for_one_that_takes_hours(at: list[float]) -> None:
    side = Side()
    await side.hear(warm_up={ONE, TWO})
    side.standbys.are(p0=0, p1=5_000_000)
    assert not side.ask()
    at[0] += 4
    assert not side.ask()  # the other one may be done in a moment, too
    at[0] += 2
    assert side.ask() == ["warmed up numbers-0"]
    side.standbys.are(p1=3)
    assert len(side.ask()) == 1
    at[0] += 6
    assert side.ask()[1:] == ["warmed up numbers-0, numbers-1"]  # it was not one a moment ago


async def test_for_one_that_cannot_be_followed_a_round_is_asked_for_once(at: list[float]) -> None:
    side = Side()
    await side.hear(warm_up={ONE, TWO})
    side.standbys.are(p0=None, p1=0)
    assert side.ask() == ["warmed up numbers-1; cannot follow numbers-0"]
    await side.hear(standby={ONE})  # of a leader that does not know what is refused
    side.standbys.are(p0=None)
    at[0] += 3_600
    assert len(side.ask()) == 1
    side.standbys.are(p0=3)
    assert len(side.ask()) == 1


async def test_what_cannot_be_followed_is_said() -> None:
    side = Side()
    await side.hear(warm_up={ONE, TWO})
    side.standbys.are(p0=None, p1=5)

    def said() -> Says:
        return Says.decode(side.word().encode(), "w")

    assert (said().refused, said().follows) == (frozenset({ONE}), True)
    side.standbys._held[TWO].has_no_room = True
    assert (said().refused, said().follows) == (frozenset({ONE}), False)


async def test_a_standby_whose_task_comes_is_followed_until_it_is_assigned() -> None:
    side = Side()
    await side.hear(standby={ONE})
    await side.hear(active={ONE, TWO})
    assert side.standbys.held().keys() == {ONE}
    await side.hear()
    assert not side.standbys.held()


async def test_what_is_said() -> None:
    side = Side()
    await side.hear(standby={TWO})
    assert side.word() == Says(
        "http://here",
        "a",
        3,
        True,
        frozenset({TWO}),
        {ONE: 7},
        unpacks=True,
        transactional_id="app-1",
        ran=frozenset({THREE}),
    )
    assert Says.decode(side.word().encode(), "w") == side.word()


async def test_how_near_is_near_enough_says_the_leader() -> None:
    """Its own value may be another one while the setting changes from worker to worker."""
    side = Side()
    await side.hear(warm_up={ONE}, acceptable_lag_records=5)
    side.standbys.are(p0=6)
    assert not side.ask()
    side.standbys.are(p0=5)
    assert len(side.ask()) == 1
    await side.hear(warm_up={ONE}, acceptable_lag_records=50)
    side.standbys.are(p0=50)
    assert len(side.ask()) == 2


@pytest.mark.parametrize(
    "changed", [{"url": "http://there"}, {"rack": "b"}, {"capacity": 2}, {"url": "", "rack": "", "capacity": 1}]
)
async def test_who_is_taken_for_who_was_there_before_asks_for_a_round_once(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "_ASK_AGAIN_S", 0.0)
    side = Side()
    await side.hear()
    assert not side.ask()
    before = replace(side.word(), **changed)
    await side.hear(said=before)
    assert side.ask() == ["the others know another address, rack, capacity or room of this worker"]
    # A leader that cannot read what it says goes on with that.
    await side.hear(said=before)
    assert len(side.ask()) == 1
    side.url = "http://elsewhere"
    assert len(side.ask()) == 2


async def test_who_is_told_by_a_leader_of_before_asks_once_where_its_address_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversation, "_ASK_AGAIN_S", 0.0)
    side = Side()
    old = Says()  # it unpacks nothing, so it is told as such a leader tells
    await side.hear(said=old, active={ONE})
    assert side.conversation.told.said is None
    assert side.conversation._own() == {ONE}
    assert not side.ask()
    side.url = "http://there"
    assert len(side.ask()) == 1
    await side.hear(said=old, active={ONE})
    assert len(side.ask()) == 1


async def test_a_round_is_asked_for_once_for_what_was_lost_and_lies_here_and_others_restore() -> None:
    side = Side()
    lost = side.manager.lost = {ONE, TWO}
    side.standbys.dormant.lags = {ONE: 11, TWO: 10, THREE: 0}
    await side.hear(active={TWO})
    assert not side.ask()  # who has it is caught up
    await side.hear(active={TWO}, behind={ONE, TWO, THREE})
    assert not side.ask()  # one is its own, one it lacks as much of as its owner, and one it has not lost
    side.standbys.dormant.lags = {ONE: 10}
    assert side.ask() == ["the state of numbers-0 is here, and is restored elsewhere"]
    await side.hear(behind={ONE})
    assert len(side.ask()) == 1  # the leader knew, and decided otherwise
    lost.add(ONE)
    side.group.membership = None
    assert len(side.ask()) == 1  # who is no member cannot ask: it has yet to
    side.group.membership = Membership("app", "me", 2)
    assert len(side.ask()) == 2
    assert lost == {TWO}
