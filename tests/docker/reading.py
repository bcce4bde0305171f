"""The files of `docker/` and the tools that check them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamflow.metrics import Exposition, PrometheusSensors, fleet_metrics
from streamflow.model.record import TopicPartition
from streamflow.runtime import status as told

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
FETCHED = ROOT / ".cache" / "prometheus" / "root" / "usr" / "bin"

# Prometheus is fetched with apt-get; a machine that has it needs nothing.
needs_prometheus = (
    []
    if (shutil.which("prometheus") and shutil.which("promtool")) or (FETCHED / "promtool").exists()
    else [pytest.mark.needs("apt-get", "dpkg")]
)


def prometheus_tool(name: str) -> Path:
    """`prometheus` or `promtool`, which lies beside it."""
    done = subprocess.run([ROOT / "tools" / "prometheus.sh"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()).with_name(name)


def installed(name: str) -> Path:
    """A command of the environment that runs the tests."""
    return Path(sys.executable).parent / name


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def run(*command: str | Path, **options: Any) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def names_in(query: str) -> set[str]:
    """The metrics that a query names."""
    return set(re.findall(r"\b(?:streamflow|process)_\w+|\bup\b", query))


def names_told() -> set[str]:
    """Every series that a worker, or the supervisor of several, can tell; `up` is Prometheus's own."""
    sensors = PrometheusSensors()
    sensors.batches_in(TopicPartition("orders", 0), 1, 1)
    sensors.records_in("orders", 1)
    sensors.records_processed("total", "orders", 1, 0.1)
    sensors.batch_out("totals", 1, 1)
    sensors.committed(0.1, 1)
    sensors.commit_failed("Error")
    sensors.record_error("total", "skip")
    sensors.restored("totals", 1)
    sensors.standby_applied("totals", 1)
    sensors.table_read("totals", "local")
    sensors.foreign_key("totals")
    task = told.TaskStatus(
        "orders-0", "restoring", (told.PartitionStatus("orders", 0, 0, 1, 1),), 0.0, told.RestoreStatus(1, 1, 1.0)
    )
    status = told.WorkerStatus(
        app="shop",
        state="running",
        address="memory://",
        guarantee="exactly_once",
        tasks=(task,),
        ready=True,
        live=True,
        live_reason="ok",
        rebalances=1,
        rebalance_s=0.1,
        last_commit_age_s=0.1,
        global_tables=(told.GlobalTableStatus("rates", "rates", True, 0, 0),),
        heartbeat_age_s=0.1,
        standbys=(told.StandbyStatus("orders-1", warm_up=False, lag=0, records=1),),
    )
    text = Exposition(sensors, lambda: status).text() + fleet_metrics({"0": True}, {"0": 0})
    return {re.split(r"[{ ]", line)[0] for line in text.decode().splitlines() if not line.startswith("#")} | {"up"}
