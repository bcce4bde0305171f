"""StreamFlow: stream processing for async Python, on Kafka or on one SQLite file.

What stands here is the public face; everything else may change.
"""

from typing import Any

from streamflow.app import App
from streamflow.errors import (
    AskError,
    ClosedError,
    ConfigurationError,
    DeserializationError,
    FatalError,
    LogFullError,
    LogUnavailableError,
    ProcessingError,
    ProductionError,
    RefusedError,
    SchemaError,
    StreamFlowError,
    TopologyError,
)
from streamflow.log.kafka.options import Kafka
from streamflow.model.record import Headers, RecordMetadata, TopicPartition
from streamflow.model.serde import Codec, NeedSchema, Serializer
from streamflow.processing.agent import Agent
from streamflow.processing.out import Out
from streamflow.processing.policy import DeadLetter, Retry, Skip, Stop
from streamflow.processing.stream import Event, Stream
from streamflow.processing.topic import Topic
from streamflow.processing.topology import Topology

__all__ = [
    "Agent",
    "App",
    "AskError",
    "ClosedError",
    "Codec",
    "ConfigurationError",
    "DeadLetter",
    "DeserializationError",
    "Event",
    "FatalError",
    "Headers",
    "Kafka",
    "LogFullError",
    "LogUnavailableError",
    "NeedSchema",
    "Out",
    "ProcessingError",
    "ProductionError",
    "RecordMetadata",
    "RefusedError",
    "Retry",
    "SchemaError",
    "Serializer",
    "Skip",
    "Stop",
    "Stream",
    "StreamFlowError",
    "Topic",
    "TopicPartition",
    "Topology",
    "TopologyError",
]


def __getattr__(name: str) -> Any:
    """`sf.testing` is imported when it is first used: no app needs it."""
    if name == "testing":
        import streamflow.testing as testing

        return testing
    raise AttributeError(f"module 'streamflow' has no attribute {name!r}")
