"""Every query of the dashboard, and every alert rule, in a real Prometheus that scrapes real workers."""

import json
import re
import shutil
import time
import urllib.parse

import pytest
import yaml

from tests.cli.commands import TIMEOUT_S, get, shell_in
from tests.docker.reading import DOCKER, names_in, names_told, needs_prometheus, prometheus_tool, read_yaml
from tests.ports import free_port

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(240), *needs_prometheus]

DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "streamflow.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
VALUES = {"$job": "streamflow", "$instance": ".*", "$__rate_interval": "5s"}
WITHOUT_DATA = {
    "Restores under way": "a restore that takes longer than a scrape",
    "Failed commits": "a commit that fails",
    "Keys outside of their partition": "a group_by that is missing",
    "Lag of global tables": "an app with global tables",
}
"""What a panel needs that this test does not have; its queries must be understood all the same."""


def filled(query: str) -> str:
    for name, text in VALUES.items():
        query = query.replace(name, text)
    assert "$" not in query, query
    return query


def queries(panel: dict) -> list[str]:
    return [filled(target["expr"]) for target in panel["targets"]]


class Prometheus:
    """Prometheus with the configuration of docker/prometheus, but for the targets and a faster pace."""

    def __init__(self, shell, workers: str) -> None:
        self.workers = workers
        configuration = read_yaml(DOCKER / "prometheus" / "prometheus.yml")
        configuration["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
        configuration["rule_files"] = [str(DOCKER / "prometheus" / name) for name in configuration["rule_files"]]
        (job,) = configuration["scrape_configs"]
        job["static_configs"] = [{"targets": [workers.removeprefix("http://")]}]
        shell.write("prometheus.yml", yaml.safe_dump(configuration))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.running = shell.start(
            "--config.file=prometheus.yml",
            f"--storage.tsdb.path={shell.folder}/tsdb",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            program=prometheus_tool("prometheus"),
        )
        self.running.wait_for("Server is ready to receive web requests")

    def api(self, path: str, **query: str):
        status, text = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}")
        answer = json.loads(text)
        assert (status, answer["status"]) == (200, "success"), text
        return answer["data"]

    def has_data(self, query: str) -> bool:
        found = self.api("query", query=query)["result"]
        return any(series["value"][1] != "NaN" for series in found)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """Beside two processes with standbys, after a start that had to restore."""
    with shell_in(tmp_path_factory.mktemp("cluster")) as shell:
        shutil.copy(DOCKER / "app" / "orders.py", shell.folder / "orders.py")
        variables = {
            "STREAMFLOW_BROKER": f"sqlite:///{shell.folder}/log.db",
            "STREAMFLOW_DATA_DIR": str(shell.folder / "data"),
            "STREAMFLOW_STANDBY_REPLICAS": "1",
            "ORDERS_PER_S": "1000",
        }
        first = shell.worker(**variables)
        totals = 'streamflow_records_out_total{topic="totals-by-user"}'
        deadline = time.monotonic() + TIMEOUT_S
        while not re.search(rf"^{re.escape(totals)} [1-9]", get(f"{first.url}/metrics")[1], flags=re.MULTILINE):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert first.stop() == 0
        shutil.rmtree(shell.folder / "data")
        workers = shell.worker("--processes", "2", **variables)
        yield Prometheus(shell, workers.url)
        assert workers.stop() == 0


def test_every_panel_shows_something(prometheus):
    asked = {(title, query) for title, panel in PANELS.items() for query in queries(panel)}
    for _, query in asked:
        prometheus.api("query", query=query)
    wanted = {(title, query) for title, query in asked if title not in WITHOUT_DATA}
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while wanted := {(title, query) for title, query in wanted if not prometheus.has_data(query)}:
        get(f"{prometheus.workers}/tables/totals/user-1")
        assert time.monotonic() < deadline, "no data: " + "\n".join(f"{title}: {query}" for title, query in wanted)
        time.sleep(0.2)


def test_the_choices_of_the_dashboard_are_there(prometheus):
    found = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            found[variable["name"]] = {each[label] for each in prometheus.api("series", **{"match[]": filled(series)})}
    assert found["job"] == {"streamflow"}
    assert len(found["instance"]) == 1
    for annotation in DASHBOARD["annotations"]["list"]:
        prometheus.api("query", query=filled(annotation["expr"]))


def test_every_alert_is_evaluated_without_an_error(prometheus):
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
        if all(rule["health"] != "unknown" for rule in rules) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
    assert len(rules) > 15


def test_queries_name_metrics_that_exist():
    for title, panel in PANELS.items():
        named = {name for query in queries(panel) for name in names_in(query)}
        assert named or "ALERTS" in str(panel["targets"]), title
        assert named <= names_told(), title


def test_panels_are_complete():
    assert set(WITHOUT_DATA) <= set(PANELS)
    assert len(PANELS) == len([panel for panel in DASHBOARD["panels"] if panel["type"] != "row"])
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for title, panel in PANELS.items():
        assert panel["datasource"]["uid"] == "${datasource}", title
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"]), title
