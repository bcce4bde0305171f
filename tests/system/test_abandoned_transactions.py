"""Workers that are killed or stopped with a transaction open, which the broker would not abort while a test runs."""

import asyncio
import signal

import pytest

from tests.system.harness import STOPPED, System, Worker, until
from tests.system.test_local_state import restored
from tests.system.test_standbys import is_settled, partitions_of, restored_since
from tests.system.test_state_faults import SUMS, _is_stopped, check_stores, check_sums, write_app

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.kafka, pytest.mark.timeout(180)]

ON_SIGN = """
import signal
from streamflow.log.kafka.transaction_coordinator import TransactionCoordinator

end = TransactionCoordinator.commit

async def end_later(self, *args):
    if (HERE / f"sign-{os.environ.get('NAME')}").exists():
        (HERE / f"sign-{os.environ.get('NAME')}").unlink()
        os.kill(os.getpid(), signal.SIGKILL if os.environ["NAME"] == "killed" else signal.SIGSTOP)
    return await end(self, *args)

TransactionCoordinator.commit = end_later
"""
"""Who has a name is killed or stopped on a sign, when it has sent all of a transaction but its end."""


def give_sign(system: System, name: str) -> None:
    (system.folder / f"sign-{name}").touch()


async def two_workers(kafka: System, name: str, standby_replicas: int) -> tuple[Worker, Worker]:
    """One that goes on and one that has the name, with two of four partitions each."""
    write_app(kafka, ON_SIGN + SUMS, log_level="INFO", commit_interval_ms=50, standby_replicas=standby_replicas)
    await kafka.create("numbers", "results")
    lives = await kafka.started()
    other = await kafka.started(NAME=name)
    if standby_replicas:
        await is_settled(kafka, lives, other)
    await lives.owns(kafka.topic("numbers"), 2)
    await other.owns(kafka.topic("numbers"), 2)
    return lives, other


@pytest.mark.parametrize("standby_replicas", [0, 1])
async def test_what_was_killed_in_mid_commit_goes_on_elsewhere_when_its_session_ends(
    standby_replicas: int, kafka: System
) -> None:
    """Nobody waits for the transaction's time-out, which is ten minutes here."""
    lives, killed = await two_workers(kafka, "killed", standby_replicas)
    async with kafka.load("numbers", per_s=400) as sent:
        await kafka.has("results", 400)
        before, moving = restored(lives), await partitions_of(killed, kafka)
        give_sign(kafka, "killed")
        assert await killed.ends() == -signal.SIGKILL, killed.said
        at_death = await kafka.committed("numbers")

        async def goes_on() -> bool:
            now = await kafka.committed("numbers")
            return all(now[partition] > at_death[partition] for partition in moving)

        await until(goes_on, lambda: f"commits of partitions {moving}; {kafka.told()}")
    await kafka.has_committed("numbers", sent.total())
    if standby_replicas:
        assert set(restored_since(lives, before).values()) == {0}, lives.said
    assert await lives.stops() == STOPPED, lives.said
    assert "has left open is ended: its worker is gone" in lives.said
    assert "Traceback" not in lives.said, lives.said
    await check_sums(kafka)
    await check_stores(kafka)


async def test_who_was_taken_for_dead_in_mid_commit_wakes_up_and_goes_on(kafka: System) -> None:
    """Its transaction was ended by who took over: it opens another producer, and joins anew."""
    lives, stopped = await two_workers(kafka, "stopped", 0)
    async with kafka.load("numbers", per_s=400) as sent:
        await kafka.has("results", 400)
        moving = await partitions_of(stopped, kafka)
        give_sign(kafka, "stopped")
        await until(lambda: _is_stopped(stopped.pid), "the stop")
        at_stop = await kafka.committed("numbers")

        async def goes_on() -> bool:
            now = await kafka.committed("numbers")
            return all(now[partition] > at_stop[partition] for partition in moving)

        await until(goes_on, lambda: f"commits of partitions {moving}; {kafka.told()}")
        stopped.signal(signal.SIGCONT)
        await stopped.says("lost: ")
        await stopped.owns(kafka.topic("numbers"), 2)
        taken = await partitions_of(stopped, kafka)
        at_return = await kafka.committed("numbers")

        async def takes_part() -> bool:
            now = await kafka.committed("numbers")
            return all(now[partition] > at_return[partition] for partition in taken)

        await until(takes_part, lambda: f"commits of partitions {taken}; {kafka.told()}")
    await kafka.has_committed("numbers", sent.total())
    for worker in (stopped, lives):
        assert await worker.stops() == STOPPED, worker.said
        assert "Traceback" not in worker.said, worker.said
    assert "a new producer takes its place" in stopped.said
    await check_sums(kafka)
    await check_stores(kafka)


async def test_who_comes_back_under_its_id_while_the_others_end_what_it_left_goes_on(kafka: System) -> None:
    """A supervisor starts it at once, again and again: it may be fenced by those that have heard of its death only."""
    lives, killed = await two_workers(kafka, "killed", 0)
    async with kafka.load("numbers", per_s=400) as sent:
        for _ in range(3):
            await kafka.has("results", await kafka.count("results") + 200)
            give_sign(kafka, "killed")
            assert await killed.ends() == -signal.SIGKILL, killed.said
            await asyncio.sleep(2.0)  # of the session: its end and the start come at about one time
            killed = await kafka.started(NAME="killed")
            await killed.owns(kafka.topic("numbers"), 2)
    await kafka.has_committed("numbers", sent.total())
    for worker in (killed, lives):
        assert await worker.stops() == STOPPED, worker.said
        assert "Traceback" not in worker.said, worker.said
    await check_sums(kafka)
    await check_stores(kafka)
