"""StreamFlow: stream processing for async Python, on Kafka or on one SQLite file.

What stands here is the public face; everything else may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from streamflow.app import App
from streamflow.errors import (
    AskError,
    ClosedError,
    ConfigurationError,
    DeserializationError,
    FatalError,
    LogFullError,
    LogUnavailableError,
    NotHeld,
    ProcessingError,
    ProductionError,
    ReadFailed,
    RefusedError,
    SchemaError,
    StateError,
    StreamFlowError,
    TopologyError,
)
from streamflow.log.kafka.options import Kafka
from streamflow.model.record import Headers, RecordMetadata, TopicPartition
from streamflow.model.serde import Codec, NeedSchema, Serializer
from streamflow.processing.agent import Agent
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.out import Out
from streamflow.processing.policy import DeadLetter, Retry, Skip, Stop
from streamflow.processing.remote import TableRead
from streamflow.processing.set_table import SetTable
from streamflow.processing.stream import Event, Stream
from streamflow.processing.table import Table
from streamflow.processing.topic import Topic
from streamflow.processing.topology import Topology

if TYPE_CHECKING:
    from streamflow import testing as testing
    from streamflow.runtime.client import Client
    from streamflow.runtime.worker import Worker

_LATER = {
    "Client": "streamflow.runtime.client",
    "Worker": "streamflow.runtime.worker",
    "testing": "streamflow.testing",
}

__all__ = [
    "Agent",
    "App",
    "AskError",
    "Client",
    "ClosedError",
    "Codec",
    "ConfigurationError",
    "DeadLetter",
    "DeserializationError",
    "Event",
    "FatalError",
    "GlobalTable",
    "Headers",
    "Kafka",
    "LogFullError",
    "LogUnavailableError",
    "NeedSchema",
    "NotHeld",
    "Out",
    "ProcessingError",
    "ProductionError",
    "ReadFailed",
    "RecordMetadata",
    "RefusedError",
    "Retry",
    "SchemaError",
    "Serializer",
    "SetTable",
    "Skip",
    "StateError",
    "Stop",
    "Stream",
    "StreamFlowError",
    "Table",
    "TableRead",
    "Topic",
    "TopicPartition",
    "Topology",
    "TopologyError",
    "Worker",
]


if not TYPE_CHECKING:

    def __getattr__(name):
        """Import what few programs need when it is first used."""
        if name not in _LATER:
            raise AttributeError(f"module 'streamflow' has no attribute {name!r}")
        module = import_module(_LATER[name])
        return module if name == "testing" else getattr(module, name)
