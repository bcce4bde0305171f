"""docker/compose.yaml by its published schema, and against the files and settings that it names."""

import re

import pytest

from streamflow import config
from tests.docker.dockerfile import read_dockerfile
from tests.docker.reading import DOCKER, installed, read_yaml, run

PATH = DOCKER / "compose.yaml"
COMPOSE = read_yaml(PATH)
SERVICES = COMPOSE["services"]
WORKERS = {name: service for name, service in SERVICES.items() if name.startswith("worker-")}


def validate(path) -> str:
    return run(installed("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path)


def test_it_is_a_compose_file():
    assert "ok" in validate(PATH)


def test_a_wrong_compose_file_is_refused(tmp_path):
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(PATH.read_text().replace("stop_grace_period: 30s", "stop_grace: 30s"))
    with pytest.raises(AssertionError, match="stop_grace"):
        validate(wrong)


def test_images_have_versions():
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), name


def test_every_file_that_is_mounted_or_built_from_is_there():
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        if build := service.get("build"):
            assert (DOCKER / build["context"] / build["dockerfile"]).exists()
    assert (DOCKER / "app" / "orders.py").exists()


def test_every_service_is_healthy_by_a_check_and_reached_from_this_machine_only():
    in_image = any(kind == "HEALTHCHECK" for kind, _ in read_dockerfile(DOCKER / "Dockerfile")[-1].steps)
    for name, service in SERVICES.items():
        assert "healthcheck" in service or (name in WORKERS and in_image), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_workers_are_two_with_names_stores_and_addresses_of_their_own():
    assert len(WORKERS) == 2
    stores = set()
    for name, service in WORKERS.items():
        environment = service["environment"]
        assert environment["STREAMFLOW_INSTANCE_ID"] == name
        assert environment["STREAMFLOW_ADVERTISED_URL"] == f"http://{name}:6066"
        stores |= {volume.split(":")[0] for volume in service["volumes"] if volume.endswith(":/var/lib/streamflow")}
        assert service["depends_on"]["kafka"]["condition"] == "service_healthy"
        assert service["stop_grace_period"] == "20s"
    assert len(stores) == 2
    assert config.TABLE["shutdown_timeout_s"].default < 20


def test_the_settings_exist(tmp_path):
    for service in WORKERS.values():
        environ = {name: str(text) for name, text in service["environment"].items()}
        warnings: list[str] = []
        settings = config.resolve({}, environ=environ, pyproject_path=None, root=tmp_path, warn=warnings.append)
        assert not warnings
        assert (settings.broker, settings.standby_replicas) == ("kafka://kafka:19092", 1)


def test_prometheus_scrapes_the_workers_and_grafana_asks_prometheus():
    (job,) = read_yaml(DOCKER / "prometheus" / "prometheus.yml")["scrape_configs"]
    assert job["job_name"] == "streamflow"
    assert job["static_configs"] == [{"targets": [f"{name}:6066" for name in sorted(WORKERS)]}]
    (source,) = read_yaml(DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = read_yaml(DOCKER / "grafana" / "provisioning" / "dashboards" / "streamflow.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
