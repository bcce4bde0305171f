"""Three worker processes under faults: whatever is killed or stopped, what comes out is the fold of what came in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kafka import jars
from tests.kafka.broker import Broker
from tests.oracle.chaos import Chaos
from tests.oracle.checks import Verdict
from tests.system.harness import System

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(240)]

SEED = int(os.environ.get("STREAMFLOW_ORACLE_SEED", "7"))
PER_S = 800


async def under_faults(chaos: Chaos, faults: list[str]) -> Verdict:
    await chaos.begin()
    chaos.dice.shuffle(faults)
    async with chaos.load(per_s=PER_S):
        for kind in faults:
            await chaos.pass_time()
            await chaos.happen(kind)
    return await chaos.finish()


async def test_exactly_once_on_sqlite(tmp_path: Path) -> None:
    async with System(tmp_path, f"sqlite:///{tmp_path / 'log.db'}") as system:
        await under_faults(Chaos(system, SEED, "exactly_once"), ["kill"] * 4 + ["pause"])


@pytest.mark.kafka
async def test_exactly_once_on_kafka(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    broker = make_broker()
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        chaos = Chaos(system, SEED, "exactly_once", broker=broker)
        await under_faults(chaos, ["kill"] * 4 + ["pause", "broker"])


@pytest.mark.kafka
async def test_exactly_once_on_an_old_kafka(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    """Transactions of version 1: partitions are added to them by requests of their own."""
    broker = make_broker(pom=jars.OLD_POM)
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        chaos = Chaos(system, SEED, "exactly_once", broker=broker)
        await under_faults(chaos, ["kill"] * 2 + ["pause", "broker"])


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)], ids=["sqlite", "kafka"])
async def test_with_standbys(kind: str, guarantee: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Who takes over goes on with the store of a standby; those of standbys are what their changelogs say, too."""
    broker = request.getfixturevalue("make_broker")() if kind == "kafka" else None
    address = f"sqlite:///{tmp_path / 'log.db'}" if broker is None else f"kafka://{broker.bootstrap}"
    async with System(tmp_path, address) as system:
        chaos = Chaos(system, SEED, guarantee, broker=broker, standby_replicas=1)
        await under_faults(chaos, ["kill"] * 4 + ["pause"])


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)], ids=["sqlite", "kafka"])
async def test_at_least_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Nothing is missing, tables are exact, and each fault repeats what one commit interval held (`repeats.py`)."""
    broker = request.getfixturevalue("make_broker")() if kind == "kafka" else None
    address = f"sqlite:///{tmp_path / 'log.db'}" if broker is None else f"kafka://{broker.bootstrap}"
    async with System(tmp_path, address) as system:
        chaos = Chaos(system, SEED, "at_least_once", broker=broker)
        verdict = await under_faults(chaos, ["kill"] * 3 + ["pause"] + (["broker"] if broker else []))
        assert chaos.tails
        assert verdict.rewinds  # or the test has seen nothing
