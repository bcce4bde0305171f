"""From an address to a log: `memory://`, `sqlite:///PATH`, `kafka://HOST:PORT`, and entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from streamflow.clock import Clock
from streamflow.errors import ConfigurationError
from streamflow.log.api import Log
from streamflow.log.kafka.options import Kafka


def connect(broker: str | Kafka, *, clock: Clock, client_id: str) -> Log:
    """Make the log behind an address, not yet opened.

    Args:
        broker: An address, or `Kafka(...)` with security options.
        clock: Time for the embedded logs.
        client_id: How this process names itself to the log.

    Returns:
        A log to enter with `async with`.

    Raises:
        ConfigurationError: Nothing answers for that scheme; the message lists those that are known.
    """
    if isinstance(broker, Kafka) or broker.startswith("kafka://"):
        from streamflow.log.kafka.log import KafkaLog

        return KafkaLog(broker if isinstance(broker, Kafka) else Kafka.parse(broker), client_id=client_id)
    scheme, separator, rest = broker.partition("://")
    if scheme == "memory" and separator:
        from streamflow.log.sqlite.log import SqliteLog

        return SqliteLog.in_memory(rest, clock=clock)
    if scheme == "sqlite" and separator:
        from streamflow.log.sqlite.log import SqliteLog

        return SqliteLog.at_path(rest.removeprefix("/"), clock=clock)
    for entry_point in entry_points(group="streamflow.logs", name=scheme):
        log: Log = entry_point.load()(broker, clock=clock, client_id=client_id)
        return log
    raise ConfigurationError(
        f"broker {broker!r}: use memory://, sqlite:///PATH or kafka://HOST:PORT[,HOST:PORT] "
        "(other schemes come from packages with an entry point in 'streamflow.logs')"
    )
