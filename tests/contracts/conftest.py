"""The logs the one suite runs on: an address to connect to, as often as a test likes."""

import uuid
from collections.abc import Callable

import pytest

from streamflow.clock import SystemClock
from streamflow.log.api import Log
from streamflow.log.connect import connect
from streamflow.log.kafka import fetch

KAFKA = {"kafka": "kafka_broker", "old-kafka": "old_kafka_broker"}


@pytest.fixture(params=["memory", "sqlite", *(pytest.param(kafka, marks=pytest.mark.kafka) for kafka in KAFKA)])
def open_log(request: pytest.FixtureRequest, tmp_path) -> Callable[[], Log]:
    """Makes one more connection to the test's log, to be entered with `async with`."""
    if request.param in KAFKA:
        address = f"kafka://{request.getfixturevalue(KAFKA[request.param]).bootstrap}"
    elif request.param == "sqlite":
        address = f"sqlite:///{tmp_path}/log.db"
    else:
        address = f"memory://{uuid.uuid4().hex}"
    return lambda: connect(address, clock=SystemClock(), client_id="contract-suite")


@pytest.fixture
def name() -> Callable[[str], str]:
    """Makes names that no other test uses: a broker is shared by all."""
    suffix = uuid.uuid4().hex[:12]
    return lambda prefix: f"{prefix}-{suffix}"


@pytest.fixture
def missing_topics_are_soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka is asked for three seconds, not ten, whether a topic that it does not know is about to come."""
    monkeypatch.setattr(fetch, "_UNKNOWN_TOPIC_S", 3.0)


@pytest.fixture
def least_session_timeout_ms(request: pytest.FixtureRequest) -> int:
    """A session that a test may wait for. These brokers take short ones (`group.min.session.timeout.ms`)."""
    return 3000 if request.node.callspec.params["open_log"] in KAFKA else 1500
