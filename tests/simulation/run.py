"""From a seed to a verdict."""

import asyncio
import contextlib
import gc
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from streamflow.log.api import Log
from tests.simulation.apps import APP_ID
from tests.simulation.checks import Judge, read_all
from tests.simulation.faults import Rates
from tests.simulation.plan import Plan
from tests.simulation.population import Broken
from tests.simulation.processes import ProcessLoop
from tests.simulation.world import TracedLogging, World, only_chance

SETTLE_S = 90.0
STOP_S = 40.0
_CLEAN_UP_ROUNDS = 20_000


@dataclass(frozen=True)
class Verdict:
    """How a run went.

    Attributes:
        plan: What was run.
        digest: Of everything that happened: equal for equal runs.
        broken: What was not as it must be.
        kills: How many processes were killed.
        starts: How many were started.
        seconds: Virtual seconds.
        settled_s: How many of them the group took to come to rest after the last fault.
        opened_anew: How many times tasks that stayed were opened anew, by why.
    """

    plan: Plan
    digest: str
    broken: BaseException | None
    kills: int
    starts: int
    seconds: float
    settled_s: float
    opened_anew: Counter[str]


def simulate(plan: Plan, out: Callable[[str], object] | None = None) -> Verdict:
    """Run a plan to its end."""
    loop = ProcessLoop(plan.seed)
    world = World(plan, loop, out)
    logger, handler = logging.getLogger("streamflow"), TracedLogging(world)
    before = logger.level, logger.propagate
    logger.propagate = False
    logger.setLevel(logging.INFO if out is not None else logging.CRITICAL + 1)
    logger.addHandler(handler)
    gc.disable()  # when rubbish is collected, no seed says
    broken: BaseException | None = None
    try:
        with only_chance(world):
            try:
                loop.run_until_complete(_run(world))
            except Exception as error:
                broken = error
            digest, seconds = world.digest(), loop.time()
            logger.setLevel(logging.CRITICAL + 1)
            _clean_up(loop, world)
    finally:
        gc.enable()
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        loop.close()
        asyncio.set_event_loop(None)
    return Verdict(
        plan,
        digest,
        broken,
        plan.kills - world.population.kills_left,
        len(world.population.all),
        seconds,
        world.owners.settled_s,
        world.owners.opened_anew,
    )


async def _run(world: World) -> None:
    plan = world.plan
    async with world.log() as log:
        population = world.population
        await world.sources.make(log)
        for _ in range(plan.workers):
            population.start(population.new_seat())
        world.faulty = True
        works = (
            world.sources.feed(log),
            world.sources.grow(log),
            population.tend(),
            population.upset(log),
            population.send_away(),
        )
        nobodies = [world.loop.run_as_nobody(work) for work in works]
        await asyncio.sleep(plan.horizon_s)
        world.trace("no more faults")
        world.faulty = False
        await asyncio.wait(nobodies[:2])
        await _settle(world, log)
        await world.owners.come_to_rest(log.admin)
        population.is_over = True
        await _stop_all(world)
        for each in nobodies:
            each.cancel()
        world.trace("judged")
        described = await log.admin.topics()
        marks = await log.admin.group_offsets(APP_ID)
        Judge(world, await read_all(log, list(described)), marks).judge()


async def _settle(world: World, log: Log) -> None:
    """Until everything is committed up to its end, and what is in the air has arrived."""
    until_s = world.loop.time() + SETTLE_S
    settled_looks = 0
    while True:
        await asyncio.sleep(0.2)
        if world.breaks is not None:
            raise world.breaks
        behind = await _behind(world, log)
        is_settled = not behind and not world.under_way and bool(world.population.running)
        if world.plan.guarantee == "at_least_once":  # who is stopped sends what it had to when it goes on
            is_settled = is_settled and all(each.process.state == "running" for each in world.population.running)
            settled_looks = settled_looks + 1 if is_settled else 0
            is_settled = settled_looks == 2
        if is_settled:
            return
        if world.loop.time() > until_s:
            status = [(each.process.name, each.process.state) for each in world.population.running]
            raise Broken(f"nothing moves any more: {behind or world.under_way}; workers: {status}")


async def _behind(world: World, log: Log) -> dict[str, str]:
    committed = {tp: mark.offset for tp, mark in (await log.admin.group_offsets(APP_ID)).items()}
    partitions = world.sources.partitions()
    topics = list(dict.fromkeys(tp.topic for tp in partitions))
    if len(await log.admin.describe(topics)) < len(topics):
        return {"topics": "not yet made"}
    ends = await log.admin.end_offsets(partitions)
    return {str(tp): f"{committed.get(tp)} of {end}" for tp, end in ends.items() if end > committed.get(tp, 0)}


async def _stop_all(world: World) -> None:
    for running in world.population.running:
        if running.worker is not None:
            running.worker.request_stop()
    tasks = [running.task for running in world.population.running]
    if not tasks:
        return
    _, left = await asyncio.wait(tasks, timeout=STOP_S)
    if left:
        raise Broken(f"{[each.process.name for each in world.population.running if not each.task.done()]} do not stop")
    for running in world.population.running:
        if running.error is not None and running.process.name not in world.population.fenced:
            raise Broken(f"{running.process.name} ended with {running.error!r}") from running.error
    if world.breaks is not None:
        raise world.breaks


def _clean_up(loop: ProcessLoop, world: World) -> None:
    """Let everything end that the run has left, so that nothing of it is found by the next one."""
    world.rates, world.faulty, world.population.is_over = Rates(), False, True
    for running in world.population.all:
        if running.process.state != "running":
            loop.let_run(running.process)

    async def end() -> None:
        for _ in range(50):
            tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=10)

    loop.set_exception_handler(lambda *_: None)
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.run_until_complete(end())
        gc.collect(1)
