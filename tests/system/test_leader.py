"""`on_leader=True`: once per cluster, by one worker at a time, whoever is killed or stopped in its tracks."""

import signal

import pytest

from tests.system.harness import STOPPED, System, Worker

pytestmark = [pytest.mark.system, pytest.mark.slow]

APP = """
ticks = app.topic(ID + "-ticks", key_type=str, value_type=int, partitions=1)

def write(line):
    with (HERE / "story").open("a") as story:
        story.write(f"{line}\\n")

@app.on_assigned
def led_by_me(partitions):
    if (ID + "-numbers", 0) in partitions:
        write(f"+{os.getpid()}")

@app.agent(numbers)
async def nothing(number: int) -> None: ...

@app.timer(0.1, on_leader=True)
async def tick() -> None:
    write(os.getpid())
    await ticks.send(key="tick", value=os.getpid())
"""


def check(system: System, sent: list[int]) -> None:
    """Nobody runs the timer but who was given the leader's partition last, and what is committed is in that order."""
    led: list[int] = []
    for line in (system.folder / "story").read_text().split():
        if line.startswith("+"):
            led.append(int(line[1:]))
        else:
            assert int(line) == led[-1], f"{line} ran the timer; it is {led[-1]}'s"
    order = iter(led)
    reigns = [pid for number, pid in enumerate(sent) if number == 0 or sent[number - 1] != pid]
    assert all(pid in order for pid in reigns), f"{reigns} have sent, {led} have led"


async def started(system: System, **options: object) -> list[Worker]:
    system.write_app(APP, partitions=6, **options)
    workers = [system.start() for _ in range(3)]
    for worker in workers:
        await worker.owns(system.topic("numbers"), 2)
    return workers


async def told(system: System) -> list[int]:
    """What leaders have sent, in the order of the log, as readers of committed records see it."""
    return [pid for _, pid in await system.rows("ticks")]


async def more(system: System, count: int = 5) -> None:
    """Wait for more ticks."""
    before = await system.count("ticks")
    await system.has("ticks", before + count)


async def leader(system: System, workers: list[Worker]) -> Worker:
    await more(system)
    pid = (await told(system))[-1]
    return next(worker for worker in workers if worker.pid == pid)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_killed_leader_is_followed_by_one_other(system: System, guarantee: str) -> None:
    workers = await started(system, processing_guarantee=guarantee)
    first = await leader(system, workers)
    first.kill()
    workers.remove(first)
    for worker in workers:
        await worker.owns(system.topic("numbers"), 3)
    await more(system)
    sent = await told(system)
    assert sent[-1] in {worker.pid for worker in workers}
    check(system, sent)


async def test_a_leader_that_was_stopped_does_nothing_when_it_wakes_up(system: System) -> None:
    workers = await started(system)
    zombie = await leader(system, workers)
    others = [worker for worker in workers if worker is not zombie]
    zombie.signal(signal.SIGSTOP)
    try:
        for worker in others:
            await worker.owns(system.topic("numbers"), 3)
        await more(system)
        assert (await told(system))[-1] in {worker.pid for worker in others}
    finally:
        zombie.signal(signal.SIGCONT)
    await zombie.says("lost: ")
    await more(system)
    check(system, await told(system))  # it may lead again by now, when the other one has given that back


WITHOUT_AGENTS = APP.replace("@app.agent(numbers)\nasync def nothing(number: int) -> None: ...\n", "").replace(
    '"-numbers", 0) in partitions', '"-leader", 0) in partitions'
)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_workers_of_an_app_without_agents_have_one_leader_too(system: System, guarantee: str) -> None:
    assert "agent" not in WITHOUT_AGENTS
    system.write_app(WITHOUT_AGENTS, processing_guarantee=guarantee)
    workers = [await system.started() for _ in range(3)]
    for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, STOPPED)):
        first = await leader(system, workers)
        assert await first.owned(system.topic("leader")) == {0}
        first.signal(end)
        assert await first.ends() == code
        workers.remove(first)
    await more(system)
    sent = await told(system)
    check(system, sent)
    assert len(dict.fromkeys(sent)) == 3
