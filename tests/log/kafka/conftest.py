"""What the Kafka tests share: names of their own, logs on a broker."""

import uuid
from collections.abc import Callable

import pytest

from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka


@pytest.fixture
def name() -> Callable[[str], str]:
    """Makes names that no other test uses: a broker is shared by all."""
    suffix = uuid.uuid4().hex[:12]
    return lambda prefix: f"{prefix}-{suffix}"


@pytest.fixture
def open_log(kafka_broker) -> Callable[..., KafkaLog]:
    """Makes one more connection to the shared broker; keywords are options of `Kafka`."""
    return lambda **options: KafkaLog(Kafka(servers=kafka_broker.bootstrap, **options), client_id="kafka-tests")
