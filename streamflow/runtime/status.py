"""What a worker tells about itself: frozen snapshots for the web pages, metrics and the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """One source partition.

    Attributes:
        topic: Topic.
        partition: Partition.
        position: Next offset to process.
        end_offset: End of the partition as last seen; None before the first fetch.
        lag: Records between the two; None while the end is unknown.
    """

    topic: str
    partition: int
    position: int
    end_offset: int | None
    lag: int | None


@dataclass(frozen=True, slots=True)
class RestoreStatus:
    """How far a task's restore is.

    Attributes:
        records: Changelog records read so far.
        remaining: Changelog offsets still to be read; None until the log has said where they end.
        per_s: Records per second so far.
    """

    records: int
    remaining: int | None
    per_s: float

    @property
    def text(self) -> str:
        """The same for people."""
        if self.remaining is None:
            return "it is not known yet how many records"
        return f"{self.records:,} records so far, {self.remaining:,} to go, {self.per_s:,.0f}/s"


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """One task.

    Attributes:
        task: Its name, `<sub-topology>-<partition>`.
        state: created, restoring, running, finishing, closing or closed.
        partitions: Its source partitions.
        oldest_in_flight_s: Seconds the record taken first has been in an agent's hands; 0 between records.
        restoring: How far its tables are; None unless they are being restored.
    """

    task: str
    state: str
    partitions: tuple[PartitionStatus, ...]
    oldest_in_flight_s: float
    restoring: RestoreStatus | None = None


@dataclass(frozen=True, slots=True)
class StandbyStatus:
    """One store that follows the changelogs of a task of another worker.

    Attributes:
        task: The task's name.
        warm_up: Whether the task is to move here as soon as the store is level.
        lag: Offsets between what is here and what the task has committed; None while that is not known.
        records: Records applied since the following began.
        given_up: Why it is not followed any more; empty while it is.
    """

    task: str
    warm_up: bool
    lag: int | None
    records: int
    given_up: str = ""


@dataclass(frozen=True, slots=True)
class GlobalTableStatus:
    """One global table.

    Attributes:
        table: Its name.
        source: The topic it is filled from.
        complete: Whether everything that was there at the start has arrived, so that it is read.
        lag: Records that are known to be in the source and have not arrived.
        passed_over: Records that could not be read since the start.
    """

    table: str
    source: str
    complete: bool
    lag: int
    passed_over: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker.

    Attributes:
        app: App id.
        state: starting, running, rebalancing, stopping or stopped.
        address: The log's address.
        guarantee: exactly_once or at_least_once.
        tasks: Its tasks, sorted by name.
        ready: Assigned, restored and processing (a worker without partitions is ready too).
        live: Getting on: no record is stuck, commits succeed, the group hears from it.
        live_reason: Why it is not live; "ok" otherwise.
        rebalances: Rebalances so far.
        rebalance_s: Seconds spent in them.
        last_commit_age_s: Seconds since the last commit; None before the first.
        global_tables: Its global tables, sorted by name.
        heartbeat_age_s: Seconds since the group answered a heartbeat; None before the first.
        session_timeout_s: Seconds of silence after which the others take its partitions over.
        uncommitted_s: Seconds that the commit under way has been trying; 0 while none is.
        memory_budget_bytes: What its tables and outputs may take.
        standbys: Its standbys and warm-ups, sorted by task.
    """

    app: str
    state: str
    address: str
    guarantee: str
    tasks: tuple[TaskStatus, ...]
    ready: bool
    live: bool
    live_reason: str
    rebalances: int
    rebalance_s: float
    last_commit_age_s: float | None
    global_tables: tuple[GlobalTableStatus, ...] = ()
    heartbeat_age_s: float | None = None
    session_timeout_s: float = 0.0
    uncommitted_s: float = 0.0
    memory_budget_bytes: int = 0
    standbys: tuple[StandbyStatus, ...] = ()

    @property
    def busy(self) -> str:
        """What it is doing instead of processing, or its state."""
        restores = [f"restoring task {each.task}: {each.restoring.text}" for each in self.tasks if each.restoring]
        return "; ".join(restores) or self.state


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a bounded run is.

    Attributes:
        done: Records of the external topics that are committed.
        total: Records they had at the start.
    """

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TopicOutcome:
    """What a bounded run did with one topic that the app reads; counted by offsets, all workers together.

    Attributes:
        topic: Topic.
        processed: Records that were processed and committed since the worker started.
        left: Records below its end that were not.
    """

    topic: str
    processed: int
    left: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a bounded run ended.

    Attributes:
        finished: Whether everything was processed; else it was stopped before.
        topics: The topics that the app reads, those it writes itself included.
    """

    finished: bool
    topics: tuple[TopicOutcome, ...]
