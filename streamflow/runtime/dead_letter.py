"""A dead letter: the raw record as it was read, and in its headers why it could not be processed.

It is an output of its record's turn, so it is committed together with the offset that passes the record.
"""

from __future__ import annotations

import traceback

from streamflow.errors import RecordError
from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition

_TRACEBACK_BYTES = 8_000

HEADER_AGENT = "streamflow-dead-letter-agent"
HEADER_ATTEMPTS = "streamflow-dead-letter-attempts"
HEADER_CAUSE = "streamflow-dead-letter-cause"
HEADER_ERROR = "streamflow-dead-letter-error"
HEADER_OFFSET = "streamflow-dead-letter-offset"
HEADER_PARTITION = "streamflow-dead-letter-partition"
HEADER_TIMESTAMP = "streamflow-dead-letter-timestamp-ms"
HEADER_TOPIC = "streamflow-dead-letter-topic"
HEADER_TRACEBACK = "streamflow-dead-letter-traceback"


def headers_of(
    record: LogRecord, tp: TopicPartition, error: RecordError, *, agent: str, attempts: int
) -> list[tuple[str, bytes | None]]:
    """The record's own headers, then the cause.

    Args:
        record: The raw record.
        tp: Where it was read.
        error: What happened.
        agent: Name of the agent.
        attempts: How often it was tried, >= 1.

    Returns:
        Headers for the dead letter; the traceback is cut to its last 8,000 bytes.
    """
    cause = error.__cause__ if error.__cause__ is not None else error
    trace = "".join(traceback.format_exception(cause)).encode(errors="backslashreplace")[-_TRACEBACK_BYTES:]
    told = {
        HEADER_ERROR: type(cause).__name__,
        HEADER_CAUSE: error.message,
        HEADER_TOPIC: tp.topic,
        HEADER_PARTITION: str(tp.partition),
        HEADER_OFFSET: str(record.offset),
        HEADER_TIMESTAMP: str(record.timestamp),
        HEADER_AGENT: agent,
        HEADER_ATTEMPTS: str(attempts),
    }
    kept = [(name, value) for name, value in record.headers if not name.startswith("streamflow-dead-letter-")]
    return [
        *kept,
        *((name, value.encode(errors="backslashreplace")) for name, value in told.items()),
        (HEADER_TRACEBACK, trace),
    ]
