"""A real Prometheus scrapes a real worker; what it understood is asked by its own HTTP API."""

import json
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import TIMEOUT_S, Running, get, order, shell_in
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
FETCHED = ROOT / ".cache" / "prometheus" / "root" / "usr" / "bin" / "prometheus"
CONFIGURATION = """
global:
  scrape_interval: 1s
  scrape_timeout: 1s
scrape_configs:
  - job_name: streamflow
    static_configs:
      - targets: ["{target}"]
"""

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    # Fetching it takes apt-get; a machine that has it needs nothing.
    *([] if shutil.which("prometheus") or FETCHED.exists() else [pytest.mark.needs("apt-get", "dpkg")]),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def prometheus() -> str:
    done = subprocess.run([ROOT / "tools" / "prometheus.sh"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def shell(tmp_path):
    with shell_in(tmp_path) as shell:
        yield shell


class Scraper:
    """Prometheus on a port of its own, scraping one worker."""

    def __init__(self, shell, program: str, target: str) -> None:
        shell.write("prometheus.yml", CONFIGURATION.format(target=target))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.running: Running = shell.start(
            "--config.file=prometheus.yml",
            f"--storage.tsdb.path={shell.folder}/tsdb",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            program=program,
        )
        self.running.wait_for("Server is ready to receive web requests")

    def api(self, path: str, **query: str):
        status, text = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}")
        answer = json.loads(text)
        assert (status, answer["status"]) == (200, "success"), text
        return answer["data"]

    def value(self, query: str) -> float | None:
        found = self.api("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else None

    def wait_for(self, query: str, is_right: Callable[[float], bool]) -> None:
        """Wait for a value: after a scrape that came to nothing there is none until the next one."""
        deadline = time.monotonic() + TIMEOUT_S
        while (value := self.value(query)) is None or not is_right(value):
            assert time.monotonic() < deadline, f"{query} is {value}"
            time.sleep(0.05)


@pytest.mark.parametrize("arguments", [(), ("--processes", "2")], ids=["one process", "two processes"])
def test_prometheus_understands_the_metrics(arguments, shell, prometheus):
    worker = shell.worker(*arguments)
    stdin = "".join(order(number, f"user{number % 20}") + "\n" for number in range(100))
    assert shell("send", "orders.py", "orders", "-", "--key-field", "user", stdin=stdin).code == 0
    scraper = Scraper(shell, prometheus, worker.url.removeprefix("http://"))

    scraper.wait_for('sum(streamflow_records_in_total{topic="orders"})', lambda value: value == 100)
    scraper.wait_for(
        'sum(streamflow_records_processed_total{agent="invoice",topic="orders"})', lambda value: value == 100
    )
    scraper.wait_for('sum(streamflow_records_out_total{topic="invoices"})', lambda value: value == 100)
    scraper.wait_for("sum(streamflow_assigned_partitions)", lambda value: value == 4)
    scraper.wait_for('sum(streamflow_lag_records{topic="orders"})', lambda value: value == 0)
    scraper.wait_for('sum(streamflow_processing_seconds_count{agent="invoice"})', lambda value: value == 100)
    scraper.wait_for("min(streamflow_ready)", lambda value: value == 1)
    scraper.wait_for("sum(streamflow_commits_total)", lambda value: value > 0)
    quantile = "histogram_quantile(0.5, sum by (le) (streamflow_commit_seconds_bucket))"
    scraper.wait_for(quantile, lambda value: 0 < value < 10)

    deadline = time.monotonic() + TIMEOUT_S
    while [(each["health"], each["lastError"]) for each in scraper.api("targets")["activeTargets"]] != [("up", "")]:
        assert time.monotonic() < deadline, scraper.api("targets")
        time.sleep(0.05)
    kinds = {name: facts[0]["type"] for name, facts in scraper.api("metadata").items()}
    assert kinds["streamflow_processing_seconds"] == "histogram"
    assert kinds["streamflow_lag_records"] == "gauge"
    assert kinds["streamflow_commits_total"] == "counter"
    processes = {series.get("process") for series in scraper.api("series", **{"match[]": "streamflow_commits_total"})}
    assert processes == ({"0", "1"} if arguments else {None})
    assert worker.stop() == 0
