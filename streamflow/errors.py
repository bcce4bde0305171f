"""Every error StreamFlow raises, named by what it means for the run.

The family an error belongs to says what is done about it, and only the runtime does it. Errors of third-party libraries
are translated once, at the edge (`log/kafka/codes.py`, `log/sqlite/faults.py`), always with `raise ... from exc`.
"""

from __future__ import annotations


class StreamFlowError(Exception):
    """The family: catch this to catch everything StreamFlow raises on purpose."""


# --- refuse: before the start, exit code 2 -----------------------------------------------------------------------


class RefusedError(StreamFlowError):
    """The worker will not start like this; the message says what to change."""


class ConfigurationError(RefusedError):
    """A setting is unknown, malformed or contradicts another."""


class TopologyError(RefusedError):
    """Agents, topics and tables do not fit together."""


class SchemaError(RefusedError):
    """A type cannot be serialized as declared."""


class GroupInUseError(RefusedError):
    """A consumer group has live members, so that nobody else may touch its offsets; the message names them."""


# --- record policy: the agent's `on_error` decides ---------------------------------------------------------------


class RecordError(StreamFlowError):
    """One record could not be processed.

    Args:
        message: What went wrong, and what to do.
        topic: Topic of the source record, or None while it is not known.
        partition: Its partition.
        offset: Its offset.
    """

    def __init__(
        self, message: str, *, topic: str | None = None, partition: int | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.topic = topic
        self.partition = partition
        self.offset = offset

    @property
    def position(self) -> str:
        """The record's place, `topic-partition-offset`; empty while it is not known."""
        return "" if self.topic is None else f"{self.topic}-{self.partition}-{self.offset}"

    def at(self, topic: str, partition: int, offset: int) -> RecordError:
        """Set the place and return self."""
        self.topic, self.partition, self.offset = topic, partition, offset
        return self

    def __str__(self) -> str:
        return f"{self.message} (at {self.position})" if self.topic is not None else self.message


class DeserializationError(RecordError):
    """Bytes do not decode as the topic's type; `message` names the part, the field path and what was expected."""


class ProcessingError(RecordError):
    """User code raised; the original exception is `__cause__`."""


class ProductionError(RecordError):
    """An output cannot be written as it is (too large, no key where one is needed, wrong type)."""


# --- retry: the log answers later --------------------------------------------------------------------------------


class RetriableError(StreamFlowError):
    """The same call may succeed later; nothing was lost."""


class LogUnavailableError(RetriableError):
    """The log does not answer (broker away, database locked)."""


class LogFullError(RetriableError):
    """The log has no room (disk full); what was acknowledged is safe, nothing new is accepted until there is room."""


class IndeterminateCommitError(StreamFlowError):
    """An atomic commit may have been stored: the log did not say. A new producer with the same id settles it."""


# --- state: a task's local store, of which the log keeps the truth -----------------------------------------------


class StateError(StreamFlowError):
    """A task's local state cannot be used as it is."""


class StateCorruptedError(StateError):
    """The local state is not what the log bears out: set the store aside and restore the task from its changelogs.

    Args:
        message: What is wrong.
        reason: One word, part of the name of what is set aside: `damaged`, or `ahead` of, `behind`, `stale` against
            the log.
    """

    def __init__(self, message: str, *, reason: str = "damaged") -> None:
        super().__init__(message)
        self.reason = reason


class StateFullError(StateError, RetriableError):
    """No room for state (disk full); the store is as it was before the write, which may be repeated."""


class StateRefusedError(StateError, RefusedError):
    """The directory of the state cannot be used; the message says why and what to do."""


class StateLockedError(StateRefusedError):
    """A live process has the store open."""


# --- migrate: another worker has the partitions ------------------------------------------------------------------


class TaskMigratedError(StreamFlowError):
    """This member no longer owns what it tried to commit: drop the uncommitted work and rejoin."""


# --- fatal: stop the worker, exit code 1 -------------------------------------------------------------------------


class FatalError(StreamFlowError):
    """The worker cannot go on; the message says why."""


class ProducerFencedError(FatalError):
    """A later producer has this one's transactional id; it commits nothing any more."""


class InstanceTakenError(FatalError, RefusedError):
    """Another worker was started with this one's `instance_id`, and has its place in the group."""


class AuthorizationError(FatalError):
    """The log refuses this user; the message names the operation and the resource."""


class UnknownTopicError(FatalError):
    """A topic that is read or written does not exist (any more)."""


class LogCorruptedError(FatalError):
    """Stored bytes fail their checksum or do not have the expected form."""


class InternalError(FatalError):
    """A bug in StreamFlow: please report it."""


# --- to the caller -----------------------------------------------------------------------------------------------


class ClosedError(StreamFlowError):
    """The object was closed by its owner, or a record's turn is over."""


class NotHeld(StreamFlowError):
    """A table's partition is not held by this process; the message says which one it is and what is held."""


class ReadFailed(StreamFlowError):
    """A table is not read, as `@app.authorize_reads` raised what is no refusal: it does so again, so mend the function.

    The message says the type; the log of the worker that called it has the traceback.
    """


class OffsetOutOfRangeError(StreamFlowError):
    """A position lies outside what the log holds.

    Args:
        topic: Topic.
        partition: Partition.
        offset: The position asked for.
        log_start: First offset the log still has.
        end_offset: End offset.
        made_anew: Whether it is the position in a topic that was deleted since, whatever the one of today holds.
    """

    def __init__(
        self, topic: str, partition: int, offset: int, log_start: int, end_offset: int, *, made_anew: bool = False
    ) -> None:
        where = "of the topic that was here before, which was made anew: it" if made_anew else "outside the log, which"
        super().__init__(f"{topic}-{partition}: offset {offset} is {where} holds {log_start}..{end_offset}")
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.log_start = log_start
        self.end_offset = end_offset
        self.made_anew = made_anew


class AskError(StreamFlowError):
    """The agent that was asked failed on the record, or finished it without an answer."""
