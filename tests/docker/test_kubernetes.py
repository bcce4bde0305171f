"""docker/kubernetes by the published schemas of Kubernetes, and what the manifests must have in common."""

import pytest
import yaml

from streamflow import config
from tests.docker.dockerfile import read_dockerfile
from tests.docker.reading import DOCKER, installed, run

FOLDER = DOCKER / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
DOCUMENTS = [document for path in FILES for document in yaml.safe_load_all(path.read_text())]
# The oldest that has all that is used, one in the middle, the newest that this version of the package knows.
VERSIONS = ("1.31", "1.34", "1.37")


def of_kind(kind: str) -> list[dict]:
    return [document for document in DOCUMENTS if document["kind"] == kind]


(SET,) = of_kind("StatefulSet")
(SETTINGS,) = of_kind("ConfigMap")
POD = SET["spec"]["template"]["spec"]
(WORKER,) = POD["containers"]
FIXED = {entry["name"]: entry for entry in WORKER["env"]}


def validate(*paths, version: str = VERSIONS[-1]) -> str:
    return run(installed("kubernetes-validate"), "--strict", "--no-warn", "-k", version, *paths)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_valid(version):
    said = validate(*FILES, version=version)
    assert said.count("passed") == len(DOCUMENTS) >= 5


def test_a_wrong_manifest_is_refused(tmp_path):
    wrong = tmp_path / "statefulset.yaml"
    wrong.write_text((FOLDER / "statefulset.yaml").read_text().replace("minReadySeconds", "minReadySecond"))
    with pytest.raises(AssertionError, match="minReadySecond"):
        validate(wrong)


def test_they_are_about_one_application():
    labels = {"app.kubernetes.io/name": "orders"}
    assert all(document["metadata"]["labels"] == labels for document in DOCUMENTS)
    assert SET["spec"]["selector"]["matchLabels"] == SET["spec"]["template"]["metadata"]["labels"] == labels
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind("Service")}
    assert all(spec["selector"] == labels for spec in services.values())
    headless = services[SET["spec"]["serviceName"]]
    assert (headless["clusterIP"], headless["publishNotReadyAddresses"]) == ("None", True)
    (budget,) = of_kind("PodDisruptionBudget")
    assert (budget["spec"]["maxUnavailable"], budget["spec"]["selector"]["matchLabels"]) == (1, labels)
    assert WORKER["envFrom"][0]["configMapRef"]["name"] == SETTINGS["metadata"]["name"]


def test_every_setting_exists_and_is_taken(tmp_path):
    name, namespace = "orders-0", "shop"
    environ = dict(SETTINGS["data"])
    for entry in WORKER["env"]:
        if entry["name"].startswith("STREAMFLOW_"):
            value = entry.get("value", "zone-a")
            environ[entry["name"]] = value.replace("$(POD_NAME)", name).replace("$(POD_NAMESPACE)", namespace)
    warnings: list[str] = []
    settings = config.resolve({}, environ=environ, pyproject_path=None, root=tmp_path, warn=warnings.append)
    assert not warnings
    assert (settings.instance_id, settings.rack, settings.standby_replicas) == ("orders-0", "zone-a", 1)
    assert settings.advertised_url == "http://orders-0.orders-workers.shop.svc:6066"
    assert FIXED["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert FIXED["STREAMFLOW_RACK"]["valueFrom"]["fieldRef"]["fieldPath"].startswith("metadata.labels[")


def test_a_cluster_that_does_not_say_its_zones_gives_no_rack(tmp_path):
    settings = config.resolve({}, environ={"STREAMFLOW_RACK": ""}, pyproject_path=None, root=tmp_path)
    assert settings.rack == ""


def test_a_pod_has_time_to_stop_and_room_to_work():
    shutdown_s = float(SETTINGS["data"]["STREAMFLOW_SHUTDOWN_TIMEOUT_S"])
    assert POD["terminationGracePeriodSeconds"] >= shutdown_s + 10
    budget_mib = int(SETTINGS["data"]["STREAMFLOW_MEMORY_BUDGET_BYTES"]) / 2**20
    limit = WORKER["resources"]["limits"]["memory"]
    assert limit.endswith("Mi")
    # What docker/prometheus/alerts.yml warns of, StreamFlowMemoryHigh, comes before the limit.
    assert int(limit.removesuffix("Mi")) > 1.5 * budget_mib + 256


def test_probes_ask_what_the_worker_answers():
    stage = read_dockerfile(DOCKER / "Dockerfile")[-1]
    (port,) = WORKER["ports"]
    assert str(port["containerPort"]) == stage.only("EXPOSE")
    paths = {name: WORKER[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness", "startup")}
    assert {name: get["path"] for name, get in paths.items()} == {
        "liveness": "/live",
        "readiness": "/ready",
        "startup": "/live",
    }
    assert all(get["port"] == port["name"] for get in paths.values())
    assert all(service["spec"]["ports"][0]["targetPort"] == port["name"] for service in of_kind("Service"))


def test_the_pod_runs_as_the_image_s_user_on_a_file_system_it_cannot_write():
    stage = read_dockerfile(DOCKER / "Dockerfile")[-1]
    context = POD["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == stage.only("USER")
    assert context["runAsNonRoot"]
    assert context["fsGroup"] == context["runAsGroup"]
    assert WORKER["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["name"]: mount["mountPath"] for mount in WORKER["volumeMounts"]}
    assert mounts["data"] == stage.only("VOLUME")
    assert [claim["metadata"]["name"] for claim in SET["spec"]["volumeClaimTemplates"]] == ["data"]
