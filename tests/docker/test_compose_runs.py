"""What docker/compose.yaml describes, without containers: its broker, and both workers with their settings."""

import re
import shutil
import time

import pytest

from tests.cli.commands import get, shell_in
from tests.docker.dockerfile import read_dockerfile
from tests.docker.reading import DOCKER, read_yaml
from tests.kafka.broker import HOST, Broker
from tests.kafka.fixtures import unavailable
from tests.kafka.jars import JarsMissingError
from tests.ports import free_port

pytestmark = [pytest.mark.kafka, pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(240)]

SERVICES = read_yaml(DOCKER / "compose.yaml")["services"]
WAIT_S = 60


class ComposeBroker(Broker):
    """The broker of the compose file: its variables as the image turns them into properties, but for places."""

    def __init__(self, directory) -> None:
        self._variables = dict(SERVICES["kafka"]["environment"])
        super().__init__(directory, cluster_id=self._variables.pop("CLUSTER_ID"))
        self.places = {"19092": free_port(), "9092": self._ports["PLAINTEXT"], "9093": free_port()}

    def _properties(self) -> dict[str, str]:
        found = {}
        for variable, text in self._variables.items():
            name = variable.removeprefix("KAFKA_").lower().replace("_", ".")
            found[name] = re.sub(
                r"(//|@)[\w.]*:(\d+)", lambda place: f"{place[1]}{HOST}:{self.places[place[2]]}", str(text)
            )
        return found | {"log.dirs": str(self.directory / "data")}


@pytest.fixture
def broker(tmp_path):
    try:
        broker = ComposeBroker(tmp_path / "kafka")
    except JarsMissingError as error:
        unavailable(str(error))
        raise
    with broker:
        yield broker


def environment_of(name: str, broker: ComposeBroker, folder, port: int) -> dict[str, str]:
    """What the container of a worker would have, with the places of this machine in it."""
    (image,) = [text for kind, text in read_dockerfile(DOCKER / "Dockerfile")[-1].steps if kind == "ENV"]
    given = dict(pair.split("=", 1) for pair in image.split() if pair.startswith("STREAMFLOW_"))
    given |= {key: str(text) for key, text in SERVICES[name]["environment"].items() if key != "ORDERS_PER_S"}
    assert given["STREAMFLOW_BROKER"] == "kafka://kafka:19092"
    changed = {
        "STREAMFLOW_BROKER": f"kafka://{HOST}:{broker.places['19092']}",
        "STREAMFLOW_DATA_DIR": str(folder / name),
        "STREAMFLOW_WEB_HOST": HOST,
        "STREAMFLOW_WEB_PORT": str(port),
        "STREAMFLOW_ADVERTISED_URL": given["STREAMFLOW_ADVERTISED_URL"].replace(f"{name}:6066", f"{HOST}:{port}"),
    }
    assert set(changed) <= set(given)
    # Time enough for a start on a machine that is busy with other tests.
    changed["STREAMFLOW_SESSION_TIMEOUT_MS"] = "20000"
    return given | changed


def told(url: str, pattern: str) -> None:
    """Wait until the answer has that in it."""
    deadline = time.monotonic() + WAIT_S
    while not re.search(pattern, text := get(url)[1]):
        assert time.monotonic() < deadline, f"{url} never answered {pattern!r} but:\n{text}"
        time.sleep(0.1)


def moved(url: str) -> list[str]:
    """What a worker says of partitions that came and went."""
    return re.findall(r"^streamflow_partitions_moved_total.*$", get(f"{url}/metrics")[1], flags=re.MULTILINE)


def test_both_workers_process_and_one_goes_on_alone(broker, tmp_path):
    with shell_in(tmp_path) as shell:
        shutil.copy(DOCKER / "app" / "orders.py", shell.folder / "orders.py")
        environments = {name: environment_of(name, broker, tmp_path, free_port()) for name in ("worker-1", "worker-2")}
        assert all(SERVICES[name]["command"] == ["worker", "${APP:-orders.py}"] for name in environments)
        workers = {name: shell.start("worker", "orders.py", **given) for name, given in environments.items()}
        for running in workers.values():
            told(f"{running.url}/metrics", r"\nstreamflow_assigned_partitions 4\.0")
            told(f"{running.url}/metrics", r'\nstreamflow_records_out_total\{topic="totals-by-user"\} [1-9]')
            assert "sets nothing" not in running.err

        # Either answers for both, and keeps a standby of what the other one has.
        for running in workers.values():
            told(f"{running.url}/tables/totals/user-1", r'"orders":[1-9]')
            told(f"{running.url}/metrics", r'\nstreamflow_standbys\{kind="standby"\} 4\.0')

        # The container is started anew: its name is its instance_id, so the other one notices nothing.
        stays = workers["worker-2"].url
        before = moved(stays)
        assert workers["worker-1"].stop() == 0
        again = shell.start("worker", "orders.py", **environments["worker-1"])
        told(f"{again.url}/metrics", r"\nstreamflow_assigned_partitions 4\.0")
        told(f"{again.url}/metrics", r'\nstreamflow_records_out_total\{topic="totals-by-user"\} [1-9]')
        assert moved(stays) == before

        again.process.kill()
        told(f"{stays}/metrics", r"\nstreamflow_assigned_partitions 8\.0")
        told(f"{stays}/ready", '"ready":true')
        told(f"{stays}/tables/totals/user-1", r'"orders":[1-9]')
        assert workers["worker-2"].stop() == 0
