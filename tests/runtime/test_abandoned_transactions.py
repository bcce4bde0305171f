"""Who ends what is left open by whom, and what becomes of it when that fails."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from streamflow.clock import VirtualClock
from streamflow.errors import AuthorizationError, ConfigurationError, LogUnavailableError, ProducerFencedError
from streamflow.runtime.abandoned_transactions import AbandonedTransactions, left_behind
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route


def route(number: int, *partitions: int) -> Route:
    return Route(active=frozenset(TaskId("s", each) for each in partitions), transactional_id=f"id-{number}")


A, B, C = route(1, 0, 1), route(2, 2, 3), route(3, 4, 5)
TOGETHER = {"a": A, "b": B, "c": C}


def fenced_by(before: dict[str, Route], now: dict[str, Route]) -> dict[str, set[str]]:
    """Which worker of now fences which id."""
    return {name: left_behind(before.values(), now.values(), route.transactional_id) for name, route in now.items()}


def test_who_gets_a_task_of_one_that_is_gone_fences_it() -> None:
    now = {"a": route(1, 0, 1), "b": route(2, 2, 3, 4), "c2": route(4, 5)}
    assert fenced_by({**TOGETHER, "d": route(4)}, {**now})["b"] == {"id-3"}
    now = {"a": route(1, 0, 1), "b": route(2, 2, 3, 4, 5)}
    assert fenced_by(TOGETHER, now)["b"] == {"id-3"}


def test_the_first_that_was_there_does_it_too_for_who_has_just_come() -> None:
    """Its tasks went to one that was told nothing before."""
    before = {"a": A, "b": B}
    now = {"a": A, "new": route(5, 2, 3), "z": route(6)}
    assert fenced_by(before, now)["a"] == {"id-2"}
    assert left_behind([], now.values(), "id-5") == set()


def test_the_first_does_it_for_tasks_that_were_on_their_way() -> None:
    """What the one that is gone had was another's by the plan already."""
    assert fenced_by({"a": A, "b": B, "c": route(3)}, {"a": A, "b": B}) == {"a": {"id-3"}, "b": set()}


def test_who_is_back_under_another_member_id_is_not_gone() -> None:
    assert fenced_by(TOGETHER, {"a": A, "b2": B, "c": C}) == {"a": set(), "b2": set(), "c": set()}


def test_all_that_are_gone_are_fenced() -> None:
    assert fenced_by(TOGETHER, {"b": route(2, 0, 1, 2, 3, 4, 5)}) == {"b": {"id-1", "id-3"}}


def test_a_static_member_that_is_back_with_another_id_fences_the_one_it_had() -> None:
    assert fenced_by({"a": A, "b": B}, {"a": A, "b2": route(7, 2, 3)}) == {"a": {"id-2"}, "b2": {"id-2"}}


class Log:
    """Fences, unless `errors` has something to say first."""

    def __init__(self) -> None:
        self.fenced: list[str] = []
        self.tried: list[str] = []
        self.errors: list[Exception] = []
        self.open: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def fence(self, transactional_id: str) -> bool:
        self.tried.append(transactional_id)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.fenced.append(transactional_id)
        return transactional_id in self.open


class Worker:
    """Number 2, beside 1 and 3."""

    def __init__(self, own_id: str = "id-2") -> None:
        self.log, self.clock = Log(), VirtualClock()
        self.abandoned = AbandonedTransactions(own_id, self.log.fence, self.clock)

    @asynccontextmanager
    async def runs(self) -> AsyncGenerator["Worker"]:
        task = asyncio.create_task(self.abandoned.run())
        self.abandoned.told(TOGETHER.values())
        await self.rest()
        assert not self.log.tried
        yield self
        task.cancel()
        await asyncio.wait([task])

    async def rest(self, seconds: float = 0.0) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        if seconds:
            self.clock.advance(seconds)
            await self.rest()


WITHOUT_3 = {"a": A, "b": route(2, 2, 3, 4, 5)}


async def test_one_that_is_gone_is_fenced_once() -> None:
    async with Worker().runs() as worker:
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest()
        assert worker.log.fenced == ["id-3"]
        worker.abandoned.told([route(2, 0, 1, 2, 3, 4, 5)])
        worker.abandoned.told([route(2, 0, 1, 2, 3, 4, 5), route(8)])
        await worker.rest(60)
        assert worker.log.fenced == ["id-3", "id-1"]


async def test_only_what_was_open_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Every worker that leaves in good order is fenced, and has left nothing."""
    caplog.set_level("INFO", "streamflow.tasks")
    async with Worker().runs() as worker:
        worker.log.open = {"id-1"}
        worker.abandoned.told([route(2, 0, 1, 2, 3, 4, 5)])
        await worker.rest()
        assert worker.log.fenced == ["id-1", "id-3"]
    assert caplog.messages == ["what transactional id id-1 has left open is ended: its worker is gone"]


async def test_what_an_unanswered_try_may_have_ended_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "streamflow.tasks")
    async with Worker().runs() as worker:
        worker.log.errors = [LogUnavailableError("no answer")]
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest(1)
        assert worker.log.fenced == ["id-3"]
    assert caplog.messages[-1] == "what transactional id id-3 has left open is ended: its worker is gone"


async def test_what_fails_is_tried_again_and_the_others_do_not_wait_for_it(caplog: pytest.LogCaptureFixture) -> None:
    async with Worker().runs() as worker:
        worker.log.errors = [LogUnavailableError("no answer")]
        worker.abandoned.told([route(2, 0, 1, 2, 3, 4, 5)])
        await worker.rest()
        assert worker.log.fenced == ["id-3"]
        assert worker.log.tried == ["id-1", "id-3"]
        await worker.rest(1)
        assert worker.log.fenced == ["id-3", "id-1"]
        assert caplog.text.count("trying again") == 1


async def test_one_that_comes_back_meanwhile_is_left_alone() -> None:
    async with Worker().runs() as worker:
        worker.log.errors = [LogUnavailableError("no answer")]
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest()
        worker.abandoned.told(TOGETHER.values())
        await worker.rest(60)
        assert worker.log.tried == ["id-3"]
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest(60)
        assert worker.log.fenced == ["id-3"]


async def test_one_that_comes_back_while_it_is_fenced_is_let_alone() -> None:
    """What is asked again and again would end what it has begun meanwhile."""
    async with Worker().runs() as worker:
        worker.log.gate.clear()
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest()
        assert worker.log.tried == ["id-3"]
        worker.abandoned.told(TOGETHER.values())
        worker.log.gate.set()
        await worker.rest(60)
        assert worker.log.fenced == []


async def test_one_that_comes_and_goes_while_it_is_fenced_is_fenced_again() -> None:
    async with Worker().runs() as worker:
        worker.log.gate.clear()
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest()
        worker.abandoned.told(TOGETHER.values())
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest()
        assert worker.log.tried == ["id-3"] * 2
        worker.log.gate.set()
        await worker.rest(60)
        assert worker.log.fenced == ["id-3"]


async def test_who_is_fenced_by_another_one_meanwhile_is_fenced_again() -> None:
    async with Worker().runs() as worker:
        worker.log.errors = [ProducerFencedError("a later producer has the id")]
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest()
        await worker.rest(1)
        assert worker.log.fenced == ["id-3"]


async def test_no_error_stops_the_worker_or_keeps_it_from_ending_others(caplog: pytest.LogCaptureFixture) -> None:
    """The brokers' settings may have changed since it was started."""
    async with Worker().runs() as worker:
        worker.log.errors = [ConfigurationError("the brokers do not allow transaction_timeout_ms=600000")]
        worker.abandoned.told([route(2, 0, 1, 2, 3, 4, 5)])
        await worker.rest(60)
        assert (worker.log.tried, worker.log.fenced) == (["id-1", "id-3"], ["id-3"])
        assert caplog.text.count("cannot be ended from here") == 1


@pytest.mark.parametrize(
    "now",
    [{"b": B, "old": Route()}, {"b": Route(active=B.active)}, {}],
    ids=["a worker of before", "a leader of before", "told nothing"],
)
async def test_where_somebody_says_no_id_it_is_left_to_the_log(now: dict[str, Route]) -> None:
    """It may be the one that has gone, under the same id."""
    async with Worker().runs() as worker:
        worker.log.errors = [LogUnavailableError("no answer")]
        worker.abandoned.told([B, C])
        await worker.rest()
        assert worker.log.tried == ["id-1"]
        worker.abandoned.told(now.values())
        await worker.rest(60)
        assert worker.log.tried == ["id-1"]
        worker.abandoned.told([B])  # and is done when all say theirs again
        await worker.rest()
        assert worker.log.fenced == ["id-3"]


async def test_a_worker_without_an_id_fences_nobody() -> None:
    async with Worker("").runs() as worker:
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest(60)
        assert worker.log.tried == []


async def test_who_may_not_says_so_once_and_leaves_it_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with Worker().runs() as worker:
        worker.log.errors = [AuthorizationError("no"), AuthorizationError("no")]
        worker.abandoned.told([route(2, 0, 1, 2, 3, 4, 5)])
        await worker.rest(60)
        assert worker.log.fenced == []
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "transaction_timeout_ms" in caplog.text
        worker.abandoned.told(TOGETHER.values())
        worker.abandoned.told(WITHOUT_3.values())
        await worker.rest(60)
        assert worker.log.tried == ["id-1"]
