"""Four workers that come and go, are killed, stopped and cut off, while brokers die: still the fold of what came in."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.faults import ANYWHERE, BROKERS, CUT
from tests.chaos.scenarios import LogName, Variant, run, surroundings
from tests.kafka.fixtures import unavailable
from tests.kafka.jars import JarsMissingError
from tests.oracle.test_processes import SEED

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(300)]

PER_S = 600


async def under_faults(folder: Path, log: LogName) -> None:
    dice = random.Random(SEED)
    kinds = list(ANYWHERE)
    if log == "kafka":
        kinds += [dice.choice([*CUT]), dice.choice(BROKERS)]  # all of them: `make soak CHAOS=all`
    dice.shuffle(kinds)
    variant = Variant("mixed", log)
    async with surroundings(folder, on_kafka=log == "kafka") as where:
        ran = await run(where, variant, SEED, per_s=PER_S, plan=["grow", *kinds, "shrink"])
    assert set(kinds) <= set(ran.did)


async def test_on_sqlite(tmp_path: Path) -> None:
    await under_faults(tmp_path, "sqlite")


@pytest.mark.kafka
async def test_on_three_brokers(tmp_path: Path) -> None:
    try:
        await under_faults(tmp_path, "kafka")
    except JarsMissingError as error:
        unavailable(str(error))
