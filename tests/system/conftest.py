from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.system.harness import System


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path, f"sqlite:///{tmp_path / 'log.db'}") as system:
        yield system


@pytest.fixture
async def kafka(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[System]:
    broker = request.getfixturevalue("kafka_broker")
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        yield system


@pytest.fixture
async def old_kafka(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[System]:
    """On a broker whose transactions are of version 1."""
    broker = request.getfixturevalue("old_kafka_broker")
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        yield system


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def system(request: pytest.FixtureRequest) -> System:
    """An app on each log; a test that needs the old broker, too, parametrizes this with its fixture's name."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, System)
    return found
