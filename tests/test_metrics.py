from prometheus_client.parser import text_string_to_metric_families

from streamflow.metrics import Exposition, Histogram, PrometheusSensors, fleet_metrics, merge
from streamflow.model.record import TopicPartition
from streamflow.runtime.status import GlobalTableStatus, RestoreStatus, StandbyStatus, TaskStatus
from tests.web.status import status


def samples(text: bytes) -> dict[str, float]:
    return {
        sample.name + "".join(f"|{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def used() -> PrometheusSensors:
    sensors = PrometheusSensors()
    sensors.batches_in(TopicPartition("orders", 0), 2, 500)
    sensors.batches_in(TopicPartition("orders", 1), 1, 100)
    sensors.records_in("orders", 1001)
    sensors.records_processed("total", "orders", 1000, 0.02)
    sensors.records_processed("total", "orders", 1, 0.2)
    sensors.batch_out("totals", 900, 4000)
    sensors.committed(0.003, 2)
    sensors.commit_failed("LogUnavailableError")
    sensors.record_error("total", "skip")
    sensors.rebalanced(4, 1, 0)
    sensors.restored("totals", 1000)
    sensors.restored("totals", 24)
    sensors.standby_applied("totals", 7)
    sensors.foreign_key("totals")
    sensors.loop_stalled(0.02)
    sensors.loop_stalled(0.5)
    return sensors


def test_everything_is_told():
    told = status(
        global_tables=(GlobalTableStatus("rates", "rates", True, 4, 1),),
        heartbeat_age_s=0.2,
        session_timeout_s=10.0,
        uncommitted_s=1.5,
        memory_budget_bytes=1 << 28,
    )
    found = samples(Exposition(used(), lambda: told).text())
    expected = {
        "streamflow_records_in_total|orders": 1001,
        "streamflow_records_processed_total|total|orders": 1001,
        "streamflow_batches_in_total|orders": 3,
        "streamflow_bytes_in_total|orders": 600,
        "streamflow_records_out_total|totals": 900,
        "streamflow_batches_out_total|totals": 1,
        "streamflow_bytes_out_total|totals": 4000,
        "streamflow_processing_seconds_count|total": 1001,
        "streamflow_processing_seconds_bucket|total|1e-05": 0,
        "streamflow_processing_seconds_bucket|total|2.5e-05": 1000,
        "streamflow_processing_seconds_bucket|total|0.25": 1001,
        "streamflow_processing_seconds_bucket|total|+Inf": 1001,
        "streamflow_commits_total": 1,
        "streamflow_commit_seconds_count": 1,
        "streamflow_commit_seconds_sum": 0.003,
        "streamflow_commit_failures_total|LogUnavailableError": 1,
        "streamflow_errors_total|total|skip": 1,
        "streamflow_event_loop_stalls_total": 2,
        "streamflow_event_loop_stall_seconds_total": 0.52,
        "streamflow_event_loop_stall_max_seconds": 0.5,
        "streamflow_partitions_moved_total|assigned": 4,
        "streamflow_partitions_moved_total|lost": 0,
        "streamflow_restored_records_total|totals": 1024,
        "streamflow_standby_records_total|totals": 7,
        "streamflow_foreign_keys_total|totals": 1,
        "streamflow_lag_records|0|orders": 3,
        "streamflow_assigned_partitions": 2,
        "streamflow_oldest_in_flight_seconds": 0.25,
        "streamflow_rebalances_total": 2,
        "streamflow_rebalance_seconds_total": 0.5,
        "streamflow_last_commit_age_seconds": 0.1,
        "streamflow_uncommitted_seconds": 1.5,
        "streamflow_heartbeat_age_seconds": 0.2,
        "streamflow_session_timeout_seconds": 10,
        "streamflow_memory_budget_bytes": 1 << 28,
        "streamflow_global_table_lag_records|rates": 4,
        "streamflow_global_table_passed_over_records_total|rates": 1,
        "streamflow_ready": 1,
        "streamflow_live": 1,
        "streamflow_app_info|shop|exactly_once": 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "streamflow_lag_records|1|orders" not in found
    assert found["process_resident_memory_bytes"] > 0
    assert any(name.startswith("streamflow_build_info|") for name in found)


def test_standbys_are_counted_by_kind_and_a_lag_that_is_not_known_is_not_told():
    kept = (
        StandbyStatus("orders-0", warm_up=False, lag=3, records=10),
        StandbyStatus("orders-1", warm_up=True, lag=None, records=0),
        StandbyStatus("orders-2", warm_up=False, lag=None, records=4, given_up="damaged"),
    )
    found = samples(Exposition(PrometheusSensors(), lambda: status(standbys=kept)).text())
    assert found["streamflow_standbys|standby"] == 2
    assert found["streamflow_standbys|warm_up"] == 1
    assert {name: lag for name, lag in found.items() if name.startswith("streamflow_standby_lag_records")} == {
        "streamflow_standby_lag_records|orders-0": 3
    }


def test_gauges_are_asked_for_at_each_scrape():
    states = iter([status(heartbeat_age_s=0.1), status(ready=False, last_commit_age_s=None)])
    exposition = Exposition(PrometheusSensors(), lambda: next(states))
    found = samples(exposition.text())
    assert (found["streamflow_ready"], found["streamflow_heartbeat_age_seconds"]) == (1, 0.1)
    later = samples(exposition.text())
    assert later["streamflow_ready"] == 0
    assert not {"streamflow_last_commit_age_seconds", "streamflow_heartbeat_age_seconds"} & set(later)


def test_restores_are_told_while_they_last():
    tasks = (TaskStatus("orders-0", "restoring", (), 0.0, RestoreStatus(500, 1500, 250.0)),)
    states = iter([status(tasks=tasks, ready=False), status()])
    exposition = Exposition(PrometheusSensors(), lambda: next(states))
    found = samples(exposition.text())
    assert found["streamflow_restore_remaining_records|orders-0"] == 1500
    assert found["streamflow_restore_records_per_second|orders-0"] == 250
    assert not any(name.startswith("streamflow_restore_") for name in samples(exposition.text()))


def test_a_restore_of_unknown_size_is_not_said_to_be_done():
    tasks = (TaskStatus("orders-0", "restoring", (), 0.0, RestoreStatus(0, None, 0.0)),)
    found = samples(Exposition(PrometheusSensors(), lambda: status(tasks=tasks, ready=False)).text())
    assert "streamflow_restore_remaining_records|orders-0" not in found
    assert found["streamflow_restore_records_per_second|orders-0"] == 0


def test_a_histogram_counts_equal_observations_at_once():
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0, 3)
    histogram.observe(1.5)
    histogram.observe(9.0, 2)
    assert histogram.buckets() == [("1.0", 3), ("2.0", 4), ("+Inf", 6)]
    assert (histogram.count, histogram.total) == (6, 22.5)


def test_processes_are_told_apart_in_one_text():
    one, two = Exposition(used(), status).text(), Exposition(PrometheusSensors(), status).text()
    text = merge({"0": one.decode(), "1": two.decode()}) + fleet_metrics({"0": True, "1": False}, {"0": 0, "1": 3})
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert {family.name: family.type for family in families}["streamflow_processing_seconds"] == "histogram"
    found = samples(text)
    assert found["streamflow_bytes_in_total|0|orders"] == 600
    assert found["streamflow_commits_total|1"] == 0
    assert found["streamflow_process_up|1"] == 0
    assert found["streamflow_process_restarts_total|1"] == 3
