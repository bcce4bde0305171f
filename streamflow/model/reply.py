"""Headers of `ask` and of its answers: which record asks, where the answer goes, and what became of it."""

from __future__ import annotations

from streamflow.model.record import Headers

HEADER_REPLY_TO = "streamflow-reply-to"
HEADER_ASK_ID = "streamflow-ask-id"
HEADER_ASK_AGENT = "streamflow-ask-agent"
HEADER_ERROR = "streamflow-reply-error"
TRACE_HEADERS = frozenset(("traceparent", "tracestate", "baggage"))


def reply_address(headers: Headers, agent: str) -> tuple[str, int, bytes] | None:
    """Where a record wants its answer.

    Args:
        headers: The record's headers.
        agent: Who looks: a question may name the one agent of several that is to answer it.

    Returns:
        Topic, partition and ask id; None for a record that does not ask this agent (or whose headers are not ours).
    """
    to: bytes | None = None
    ask_id: bytes | None = None
    asked: bytes | None = None
    for name, value in headers:
        if name == HEADER_REPLY_TO:
            to = value
        elif name == HEADER_ASK_ID:
            ask_id = value
        elif name == HEADER_ASK_AGENT:
            asked = value
    if to is None or ask_id is None or (asked is not None and asked != agent.encode()):
        return None
    topic, _, partition = to.decode("utf-8", "replace").rpartition("/")
    return (topic, int(partition), ask_id) if topic and partition.isdecimal() else None


def ask_headers(topic: str, partition: int, ask_id: bytes, agent: str) -> list[tuple[str, bytes | None]]:
    """Headers of a record that asks an agent."""
    return [
        (HEADER_REPLY_TO, f"{topic}/{partition}".encode()),
        (HEADER_ASK_ID, ask_id),
        (HEADER_ASK_AGENT, agent.encode()),
    ]


def trace_headers(headers: Headers) -> list[tuple[str, bytes | None]]:
    """The headers that propagate from a record to its outputs (W3C trace context and baggage)."""
    return [header for header in headers if header[0] in TRACE_HEADERS]
