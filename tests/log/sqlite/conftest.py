"""A log in a file of the test's own, and one in memory whose time the test moves."""

import uuid

import pytest

from streamflow.clock import SystemClock, VirtualClock
from streamflow.log.sqlite.log import SqliteLog


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "log.db")


@pytest.fixture
async def log(path):
    async with SqliteLog.at_path(path, clock=SystemClock()) as log:
        yield log


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def memory(clock):
    async with SqliteLog.in_memory(uuid.uuid4().hex, clock=clock) as log:
        yield log
