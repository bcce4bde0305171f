"""Each alert of docker/prometheus fires for what it is meant for, and not for what resembles it: by promtool."""

import re
from dataclasses import dataclass

import pytest
import yaml

from tests.docker.reading import DOCKER, ROOT, names_in, names_told, needs_prometheus, prometheus_tool, read_yaml, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), *needs_prometheus]

PROMETHEUS = DOCKER / "prometheus"
RULES = [rule for group in read_yaml(PROMETHEUS / "alerts.yml")["groups"] for rule in group["rules"]]
W = 'job="streamflow", instance="worker-1:6066"'
UP = {f"up{{{W}}}": "1x60"}


@dataclass(frozen=True)
class Case:
    """Series, one value each 30 s, over half an hour.

    Attributes:
        fires: Those for which the alert fires at the end.
        silent: Those for which it must not.
    """

    fires: dict[str, str]
    silent: dict[str, str]


CASES = {
    "StreamFlowWorkerDown": Case(
        {f"up{{{W}}}": "1x50 0x10"},
        {
            f"up{{{W}}}": "1x40 0x0 1x20",
            f'streamflow_process_up{{{W}, process="0"}}': "1x60",
            'up{job="kafka"}': "0x60",
        },
    ),
    "StreamFlowNoWorker": Case({f"up{{{W}}}": "1x50 0x10"}, {f"up{{{W}}}": "0x60", 'up{job="streamflow"}': "1x60"}),
    "StreamFlowNotLive": Case({f"streamflow_live{{{W}}}": "1x50 0x10"}, {f"streamflow_live{{{W}}}": "1x59 0"}),
    "StreamFlowNotReady": Case({f"streamflow_ready{{{W}}}": "0x60"}, {f"streamflow_ready{{{W}}}": "1x40 0x20"}),
    "StreamFlowHeartbeatLate": Case(
        {
            f"streamflow_heartbeat_age_seconds{{{W}}}": "0.2x58 6 7",
            f"streamflow_session_timeout_seconds{{{W}}}": "10x60",
        },
        {f"streamflow_heartbeat_age_seconds{{{W}}}": "6x60", f"streamflow_session_timeout_seconds{{{W}}}": "45x60"},
    ),
    "StreamFlowRebalancesTooOften": Case(
        {f"streamflow_rebalances_total{{{W}}}": "0+1x60"}, {f"streamflow_rebalances_total{{{W}}}": "0x10 0+1x20 20x30"}
    ),
    "StreamFlowPartitionsLost": Case(
        {f'streamflow_partitions_moved_total{{{W}, change="lost"}}': "0x50 4x10"},
        {
            f'streamflow_partitions_moved_total{{{W}, change="lost"}}': "4x60",
            f'streamflow_partitions_moved_total{{{W}, change="revoked"}}': "0+1x60",
        },
    ),
    "StreamFlowEventLoopBlocked": Case(
        {f"streamflow_event_loop_stall_seconds_total{{{W}}}": "0+24x60"},
        {f"streamflow_event_loop_stall_seconds_total{{{W}}}": "0+3x60"},
    ),
    "StreamFlowMemoryHigh": Case(
        {f"process_resident_memory_bytes{{{W}}}": "800e6x60", f"streamflow_memory_budget_bytes{{{W}}}": "268435456x60"},
        {f"process_resident_memory_bytes{{{W}}}": "400e6x60", f"streamflow_memory_budget_bytes{{{W}}}": "268435456x60"},
    ),
    "StreamFlowNoCommit": Case(
        {
            f"streamflow_last_commit_age_seconds{{{W}}}": "0x50 30+30x10",
            f'streamflow_lag_records{{{W}, topic="orders", partition="0"}}': "5x60",
        },
        {
            f"streamflow_last_commit_age_seconds{{{W}}}": "0+30x60",
            f'streamflow_lag_records{{{W}, topic="orders", partition="0"}}': "0x60",
            f"streamflow_uncommitted_seconds{{{W}}}": "0x50 20x10",
        },
    ),
    "StreamFlowCommitsFail": Case(
        {f'streamflow_commit_failures_total{{{W}, reason="LogUnavailableError"}}': "0+1x60"},
        {f'streamflow_commit_failures_total{{{W}, reason="LogUnavailableError"}}': "0x40 1x20"},
    ),
    "StreamFlowRecordStuck": Case(
        {f"streamflow_oldest_in_flight_seconds{{{W}}}": "0x50 30+30x10"},
        {f"streamflow_oldest_in_flight_seconds{{{W}}}": "40x60"},
    ),
    "StreamFlowLagGrows": Case(
        {f'streamflow_lag_records{{{W}, topic="orders", partition="{p}"}}': "6000+60x60" for p in (0, 1)},
        {f'streamflow_lag_records{{{W}, topic="orders", partition="{p}"}}': "90000-60x60" for p in (0, 1)},
    ),
    "StreamFlowDeadLetters": Case(
        {f'streamflow_errors_total{{{W}, agent="total", policy="dead_letter"}}': "_x55 1x4"},
        {
            f'streamflow_errors_total{{{W}, agent="total", policy="dead_letter"}}': "7x60",
            f'streamflow_errors_total{{{W}, agent="total", policy="retry"}}': "0+1x60",
        },
    ),
    "StreamFlowRecordsSkipped": Case(
        {f'streamflow_errors_total{{{W}, agent="total", policy="skip"}}': "3x55 5x5"},
        {f'streamflow_errors_total{{{W}, agent="total", policy="skip"}}': "3x60"},
    ),
    "StreamFlowRestoreStuck": Case(
        {f'streamflow_restore_remaining_records{{{W}, task="orders-0"}}': "9000-100x40 5000x20"},
        {f'streamflow_restore_remaining_records{{{W}, task="orders-0"}}': "9000-100x60"},
    ),
    "StreamFlowStandbyBehind": Case(
        {f'streamflow_standby_lag_records{{{W}, task="orders-0"}}': "200000x60"},
        {f'streamflow_standby_lag_records{{{W}, task="orders-0"}}': "200000x30 50x30"},
    ),
    "StreamFlowGlobalTableBehind": Case(
        {f'streamflow_global_table_lag_records{{{W}, table="rates"}}': "20000x60"},
        {f'streamflow_global_table_lag_records{{{W}, table="rates"}}': "0x30 20000x10 0x20"},
    ),
    "StreamFlowGlobalTablePassedOver": Case(
        {f'streamflow_global_table_passed_over_records_total{{{W}, table="rates"}}': "0x55 1x5"},
        {f'streamflow_global_table_passed_over_records_total{{{W}, table="rates"}}': "1x60"},
    ),
    "StreamFlowForeignKeys": Case(
        {f'streamflow_foreign_keys_total{{{W}, table="totals"}}': "_x55 1x4"},
        {f'streamflow_foreign_keys_total{{{W}, table="totals"}}': "2x60"},
    ),
}
ALSO_FIRE = [
    ("StreamFlowWorkerDown", {f'streamflow_process_up{{{W}, process="1"}}': "1x50 0x10", **UP}),
    ("StreamFlowNoWorker", {'up{job="kafka"}': "1x60"}),
    ("StreamFlowNoCommit", {f"streamflow_uncommitted_seconds{{{W}}}": "0x50 30+30x10"}),
    (
        "StreamFlowNoCommit",
        {
            f'streamflow_last_commit_age_seconds{{{W}, process="1"}}': "0x50 30+30x10",
            f'streamflow_lag_records{{{W}, process="1", topic="orders", partition="0"}}': "5x60",
        },
    ),
    ("StreamFlowDeadLetters", {f'streamflow_errors_total{{{W}, agent="total", policy="dead_letter"}}': "3x55 5x5"}),
    ("StreamFlowRecordsSkipped", {f'streamflow_errors_total{{{W}, agent="total", policy="skip"}}': "_x55 1x4"}),
    ("StreamFlowForeignKeys", {f'streamflow_foreign_keys_total{{{W}, table="totals"}}': "2x55 3x5"}),
]


def test_every_alert_has_a_case_and_every_case_an_alert():
    assert {rule["alert"] for rule in RULES} == set(CASES)


@pytest.fixture(scope="module")
def promtool():
    return prometheus_tool("promtool")


def test_configuration_and_rules_are_valid(promtool):
    run(promtool, "check", "config", "--lint=all", "--lint-fatal", PROMETHEUS / "prometheus.yml")
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", PROMETHEUS / "alerts.yml")


def test_configurations_in_the_documentation_are_valid(promtool, tmp_path):
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    found = [text for page in pages for text in re.findall(r"```yaml\n(scrape_configs:.*?)```", page, flags=re.DOTALL)]
    assert found
    for text in found:
        # Debian's Prometheus is built without what finds the pods of a cluster; the rest it reads.
        assert "kubernetes_sd_configs:\n      - role: pod\n" in text
        known = text.replace(
            "kubernetes_sd_configs:\n      - role: pod\n", "static_configs:\n      - targets: [pod:6066]\n"
        )
        (tmp_path / "prometheus.yml").write_text(known)
        run(promtool, "check", "config", tmp_path / "prometheus.yml")


def unit(alert: str, series: dict[str, str], firing: bool) -> dict[str, object]:
    expected = [{"labels": "{}", "value": 1}] if firing else []
    return {
        "name": f"{alert} {'fires' if firing else 'does not fire'}",
        "interval": "30s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) >= bool 1',
                "eval_time": "30m",
                "exp_samples": expected,
            }
        ],
    }


def check(promtool, tmp_path, units: list[dict[str, object]]) -> None:
    test = {"rule_files": [str(PROMETHEUS / "alerts.yml")], "evaluation_interval": "30s", "tests": units}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    run(promtool, "test", "rules", tmp_path / "test.yml")


def test_every_alert_fires_when_it_should(promtool, tmp_path):
    cases = [(alert, case.fires) for alert, case in CASES.items()] + ALSO_FIRE
    check(promtool, tmp_path, [unit(alert, series, True) for alert, series in cases])


def test_no_alert_fires_when_it_should_not(promtool, tmp_path):
    check(promtool, tmp_path, [unit(alert, case.silent, False) for alert, case in CASES.items()])


def test_a_wrong_expectation_is_noticed(promtool, tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)StreamFlowNotLive.*got: \{\} 1E"):
        check(promtool, tmp_path, [unit("StreamFlowNotLive", CASES["StreamFlowNotLive"].fires, False)])


def test_alerts_name_metrics_that_exist_and_say_what_matters():
    for rule in RULES:
        assert names_in(rule["expr"]), rule["alert"]
        assert names_in(rule["expr"]) <= names_told(), rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}


def test_every_alert_is_explained():
    page = (ROOT / "docs" / "observability.md").read_text()
    assert {rule["alert"] for rule in RULES} == {
        line.split("`")[1] for line in page.splitlines() if line.startswith("| `StreamFlow")
    }
