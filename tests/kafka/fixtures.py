"""The pytest fixtures of the real broker; without Java or Maven they skip loudly, and fail under CI=true."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kafka import jars
from tests.kafka.broker import Broker, Cluster
from tests.kafka.jars import JarsMissingError

CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def unavailable(reason: str) -> None:
    """Skip, except where nothing may be left out."""
    message = f"the real Kafka broker cannot run here: {reason}"
    if CI:
        pytest.fail(f"{message} (CI leaves nothing out)", pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker shared by the whole run: `.bootstrap`. Use topic and group names of your own; never stop it."""
    try:
        broker = Broker(tmp_path_factory.mktemp("kafka"))
    except JarsMissingError as error:
        unavailable(str(error))
        raise
    with broker:
        yield broker


@pytest.fixture(scope="session")
def old_kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """As `kafka_broker`, of the version in pom-old.xml: its transactions are of version 1."""
    try:
        broker = Broker(tmp_path_factory.mktemp("old-kafka"), pom=jars.OLD_POM)
    except JarsMissingError as error:
        unavailable(str(error))
        raise
    with broker:
        yield broker


@pytest.fixture
def make_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Broker]]:
    """Start a broker of the test's own, to be killed or paused: `make_broker(**arguments of Broker)`."""
    made: list[Broker] = []

    def make(**arguments: object) -> Broker:
        directory: Path = tmp_path_factory.mktemp("kafka-own")
        try:
            broker = Broker(directory, **arguments)  # type: ignore[arg-type]
        except JarsMissingError as error:
            unavailable(str(error))
            raise
        made.append(broker)
        broker.start()
        return broker

    yield make
    for broker in made:
        broker.kill()


@pytest.fixture(scope="module")
def kafka_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three brokers that are one cluster; a test that kills one starts it again."""
    try:
        cluster = Cluster(tmp_path_factory.mktemp("kafka-cluster"))
    except JarsMissingError as error:
        unavailable(str(error))
        raise
    with cluster:
        yield cluster
