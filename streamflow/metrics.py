"""Prometheus metrics: plain integers while records flow, metric families only when somebody asks.

The sensors are called per batch and do no more than add. The exposition is made at scrape time by a collector of our
own on a registry of our own; what is a state and not a count comes from `worker.status()` then.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from streamflow.model.record import TopicPartition
from streamflow.runtime.status import WorkerStatus
from streamflow.sensors import Sensors

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DISTRIBUTION = "streamflow-engine"
PROCESSING_BUCKETS_S = (
    1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
COMMIT_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def package_version() -> str:
    """The version of StreamFlow that is installed; `unknown` when it runs from a bare source tree."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


class Histogram:
    """A histogram that takes many equal observations at the cost of one.

    Args:
        bounds: Upper bounds, ascending, without infinity.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add an observation.

        Args:
            value: What was observed, in seconds.
            times: How often.
        """
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        found: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            running += count
            found.append((bound, running))
        return found


class PrometheusSensors(Sensors):
    """Counts what the runtime does, for `exposition` and the status page."""

    def __init__(self) -> None:
        self.records_in_count: Counter[str] = Counter()
        self.processed: Counter[tuple[str, str]] = Counter()
        """By agent and source topic."""
        self.batches_in_count: Counter[str] = Counter()
        self.bytes_in: Counter[str] = Counter()
        self.records_out: Counter[str] = Counter()
        self.batches_out: Counter[str] = Counter()
        self.bytes_out: Counter[str] = Counter()
        self.processing: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(PROCESSING_BUCKETS_S))
        self.commits = Histogram(COMMIT_BUCKETS_S)
        self.commit_failures: Counter[str] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        """By agent and policy."""
        self.moved: Counter[str] = Counter({"assigned": 0, "revoked": 0, "lost": 0})
        self.restored_count: Counter[str] = Counter()
        self.standby_count: Counter[str] = Counter()
        self.foreign_keys: Counter[str] = Counter()
        self.table_reads: Counter[tuple[str, str]] = Counter()
        """By table and outcome."""
        self.stalls = 0
        self.stall_s = 0.0
        self.longest_stall_s = 0.0

    def batches_in(self, tp: TopicPartition, batches: int, size_bytes: int) -> None:
        self.batches_in_count[tp.topic] += batches
        self.bytes_in[tp.topic] += size_bytes

    def records_in(self, topic: str, records: int) -> None:
        self.records_in_count[topic] += records

    def records_processed(self, agent: str, topic: str, records: int, seconds: float) -> None:
        self.processed[agent, topic] += records
        # The time of one record is not measured: it would cost more than many records do. Each of a run counts as
        # their mean.
        self.processing[agent].observe(seconds / records, records)

    def batch_out(self, topic: str, records: int, size_bytes: int) -> None:
        self.records_out[topic] += records
        self.batches_out[topic] += 1
        self.bytes_out[topic] += size_bytes

    def committed(self, seconds: float, offsets: int) -> None:
        self.commits.observe(seconds)

    def commit_failed(self, reason: str) -> None:
        self.commit_failures[reason] += 1

    def record_error(self, agent: str, policy: str) -> None:
        self.errors[agent, policy] += 1

    def restored(self, table: str, records: int) -> None:
        self.restored_count[table] += records

    def standby_applied(self, table: str, records: int) -> None:
        self.standby_count[table] += records

    def foreign_key(self, table: str) -> None:
        self.foreign_keys[table] += 1

    def table_read(self, table: str, outcome: str) -> None:
        self.table_reads[table, outcome] += 1

    def rebalanced(self, assigned: int, revoked: int, lost: int) -> None:
        self.moved["assigned"] += assigned
        self.moved["revoked"] += revoked
        self.moved["lost"] += lost

    def loop_stalled(self, seconds: float) -> None:
        self.stalls += 1
        self.stall_s += seconds
        self.longest_stall_s = max(self.longest_stall_s, seconds)


# --- exposition ---------------------------------------------------------------------------------------------------


class WorkerCollector(Collector):
    """Everything about one worker as metric families.

    Args:
        sensors: Its counts.
        status: Its state now.
    """

    def __init__(self, sensors: PrometheusSensors, status: Callable[[], WorkerStatus]) -> None:
        self._sensors = sensors
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would otherwise ask for the status before the worker has one."""
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from self._traffic()
        yield from self._work()
        status = self._status()
        yield from self._state(status)
        yield from self._alarms(status)
        yield from self._restores(status)
        yield from self._standbys(status)

    def _traffic(self) -> Iterator[Metric]:
        sensors = self._sensors
        yield _counter("streamflow_records_in", "Records taken from the log.", ["topic"], sensors.records_in_count)
        yield _counter("streamflow_batches_in", "Batches fetched.", ["topic"], sensors.batches_in_count)
        yield _counter("streamflow_bytes_in", "Stored bytes fetched.", ["topic"], sensors.bytes_in)
        yield _counter("streamflow_records_out", "Records written.", ["topic"], sensors.records_out)
        yield _counter("streamflow_batches_out", "Batches written.", ["topic"], sensors.batches_out)
        yield _counter("streamflow_bytes_out", "Encoded bytes written.", ["topic"], sensors.bytes_out)

    def _work(self) -> Iterator[Metric]:
        sensors = self._sensors
        yield _counter(
            "streamflow_records_processed", "Records agents are done with.", ["agent", "topic"], sensors.processed
        )
        processing = HistogramMetricFamily(
            "streamflow_processing_seconds",
            "Time an agent takes for a record; each record of a run counts as the run's mean.",
            labels=["agent"],
        )
        for agent, histogram in sorted(sensors.processing.items()):
            processing.add_metric([agent], histogram.buckets(), histogram.total)
        yield processing
        commits = HistogramMetricFamily("streamflow_commit_seconds", "Time of a successful commit.")
        commits.add_metric([], sensors.commits.buckets(), sensors.commits.total)
        yield commits
        yield CounterMetricFamily("streamflow_commits", "Successful commits.", value=sensors.commits.count)
        yield _counter(
            "streamflow_commit_failures", "Failed commits by error class.", ["reason"], sensors.commit_failures
        )
        yield _counter(
            "streamflow_errors", "Records that failed, by what was done about it.", ["agent", "policy"], sensors.errors
        )
        yield CounterMetricFamily(
            "streamflow_event_loop_stalls", "Times the event loop was blocked for over 10 ms.", value=sensors.stalls
        )
        yield CounterMetricFamily(
            "streamflow_event_loop_stall_seconds", "Time the event loop was blocked.", value=sensors.stall_s
        )
        yield GaugeMetricFamily(
            "streamflow_event_loop_stall_max_seconds",
            "Longest time the event loop was blocked.",
            value=sensors.longest_stall_s,
        )
        yield _counter(
            "streamflow_restored_records",
            "Changelog records read to restore tables.",
            ["table"],
            sensors.restored_count,
        )
        yield _counter(
            "streamflow_standby_records",
            "Changelog records that standbys and warm-ups have applied.",
            ["table"],
            sensors.standby_count,
        )
        yield _counter(
            "streamflow_foreign_keys",
            "Sampled keys that were written in another partition than their own.",
            ["table"],
            sensors.foreign_keys,
        )
        yield _counter(
            "streamflow_table_reads",
            "Tables read over HTTP or by get_remote, by outcome.",
            ["table", "outcome"],
            sensors.table_reads,
        )
        yield _counter("streamflow_partitions_moved", "Changes of the assignment.", ["change"], sensors.moved)

    def _state(self, status: WorkerStatus) -> Iterator[Metric]:
        partitions = {(p.topic, p.partition): p for task in status.tasks for p in task.partitions}
        lag = GaugeMetricFamily(
            "streamflow_lag_records", "Records between the position and the end.", labels=["topic", "partition"]
        )
        for (topic, number), partition in sorted(partitions.items()):
            if partition.lag is not None:
                lag.add_metric([topic, str(number)], partition.lag)
        yield lag
        global_lag = GaugeMetricFamily(
            "streamflow_global_table_lag_records",
            "Records of its source that have not arrived in a global table.",
            labels=["table"],
        )
        unreadable = CounterMetricFamily(
            "streamflow_global_table_passed_over_records",
            "Records of its source that a global table could not read.",
            labels=["table"],
        )
        for table in status.global_tables:
            global_lag.add_metric([table.table], table.lag)
            unreadable.add_metric([table.table], table.passed_over)
        yield global_lag
        yield unreadable
        yield GaugeMetricFamily("streamflow_assigned_partitions", "Partitions assigned now.", value=len(partitions))
        yield GaugeMetricFamily(
            "streamflow_oldest_in_flight_seconds",
            "Age of the oldest record that an agent works on.",
            value=max((task.oldest_in_flight_s for task in status.tasks), default=0.0),
        )
        yield CounterMetricFamily("streamflow_rebalances", "Rebalances.", value=status.rebalances)
        yield CounterMetricFamily("streamflow_rebalance_seconds", "Time spent in rebalances.", value=status.rebalance_s)
        yield GaugeMetricFamily("streamflow_ready", "1 when assigned and caught up.", value=int(status.ready))
        yield GaugeMetricFamily("streamflow_live", "1 when progress is being made.", value=int(status.live))
        yield InfoMetricFamily(
            "streamflow_build",
            "What runs.",
            value={"version": package_version(), "python": platform.python_version()},
        )
        yield InfoMetricFamily(
            "streamflow_app", "Which app runs.", value={"app": status.app, "guarantee": status.guarantee}
        )

    def _alarms(self, status: WorkerStatus) -> Iterator[Metric]:
        """What the alert rules in `docker/prometheus` compare."""
        if status.last_commit_age_s is not None:
            yield GaugeMetricFamily(
                "streamflow_last_commit_age_seconds", "Age of the last commit.", value=status.last_commit_age_s
            )
        yield GaugeMetricFamily(
            "streamflow_uncommitted_seconds", "Time the commit under way has taken.", value=status.uncommitted_s
        )
        if status.heartbeat_age_s is not None:
            yield GaugeMetricFamily(
                "streamflow_heartbeat_age_seconds",
                "Time since the group answered a heartbeat.",
                value=status.heartbeat_age_s,
            )
        yield GaugeMetricFamily(
            "streamflow_session_timeout_seconds",
            "Silence after which the others take the partitions over.",
            value=status.session_timeout_s,
        )
        yield GaugeMetricFamily(
            "streamflow_memory_budget_bytes", "What tables and outputs may take.", value=status.memory_budget_bytes
        )

    def _restores(self, status: WorkerStatus) -> Iterator[Metric]:
        remaining = GaugeMetricFamily(
            "streamflow_restore_remaining_records",
            "Changelog offsets that tasks being restored still have to read.",
            labels=["task"],
        )
        rate = GaugeMetricFamily(
            "streamflow_restore_records_per_second", "Rate of the restores under way.", labels=["task"]
        )
        for task in status.tasks:
            if task.restoring is not None:
                if task.restoring.remaining is not None:
                    remaining.add_metric([task.task], task.restoring.remaining)
                rate.add_metric([task.task], task.restoring.per_s)
        yield remaining
        yield rate

    def _standbys(self, status: WorkerStatus) -> Iterator[Metric]:
        kept = GaugeMetricFamily("streamflow_standbys", "Standbys and warm-ups kept here.", labels=["kind"])
        for kind, is_warm_up in (("standby", False), ("warm_up", True)):
            kept.add_metric([kind], sum(each.warm_up is is_warm_up for each in status.standbys))
        yield kept
        lag = GaugeMetricFamily(
            "streamflow_standby_lag_records",
            "Changelog offsets between a standby and what its task has committed.",
            labels=["task"],
        )
        for each in status.standbys:
            if each.lag is not None:
                lag.add_metric([each.task], each.lag)
        yield lag


def _counter(
    name: str, text: str, labels: Sequence[str], counts: Mapping[str, int] | Mapping[tuple[str, str], int]
) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, count in sorted(counts.items()):
        family.add_metric([key] if isinstance(key, str) else key, count)
    return family


class Exposition:
    """What `/metrics` of one worker answers.

    Args:
        sensors: The worker's counts.
        status: Its state now.
    """

    def __init__(self, sensors: PrometheusSensors, status: Callable[[], WorkerStatus]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(WorkerCollector(sensors, status))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)


# --- several processes --------------------------------------------------------------------------------------------


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge(texts: Mapping[str, str]) -> bytes:
    """Join the metrics of several processes, each sample with a label `process`.

    Args:
        texts: Prometheus' text format by process.

    Returns:
        One text, each family in it once.
    """
    merged: dict[str, Metric] = {}
    for process, text in texts.items():
        for family in text_string_to_metric_families(text):
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.samples.append(sample._replace(labels={"process": process, **sample.labels}))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(merged.values()))
    return generate_latest(registry)


def fleet_metrics(up: Mapping[str, bool], restarts: Mapping[str, int]) -> bytes:
    """What the supervisor of several processes knows itself.

    Args:
        up: By process, whether it runs.
        restarts: By process, how often it crashed and was started again.
    """
    running = GaugeMetricFamily("streamflow_process_up", "1 while the worker process runs.", labels=["process"])
    again = CounterMetricFamily(
        "streamflow_process_restarts", "Times the worker process was started again.", labels=["process"]
    )
    for process, is_up in up.items():
        running.add_metric([process], int(is_up))
    for process, count in restarts.items():
        again.add_metric([process], count)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged([running, again]))
    return generate_latest(registry)
