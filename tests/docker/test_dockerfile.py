"""The image: its Dockerfile by hadolint's rules, and its build stage done step by step in a folder."""

import json
import re
import subprocess
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.cli.commands import shell_in
from tests.docker.dockerfile import Build, context, read_dockerfile
from tests.docker.reading import DOCKER, ROOT, installed, run

BUILD, FINAL = read_dockerfile(DOCKER / "Dockerfile")
LOCKED = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_hadolint_has_no_objection():
    assert run(installed("hadolint"), DOCKER / "Dockerfile") == ""


def test_dockerfiles_of_the_documentation_pass_hadolint(tmp_path):
    found = [
        (page, text)
        for page in sorted((ROOT / "docs").rglob("*.md"))
        for text in re.findall(r"```dockerfile\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]
    assert found
    for page, text in found:
        path = tmp_path / f"{page.stem}.Dockerfile"
        path.write_text(text)
        assert run(installed("hadolint"), path) == ""


def test_the_context_has_what_is_needed_and_nothing_else():
    found = context(ROOT)
    assert {name.split("/")[0] for name in found} == {
        "streamflow",
        "pyproject.toml",
        "requirements.lock",
        "README.md",
        "LICENSE",
    }
    assert not any("__pycache__" in name for name in found)
    assert "streamflow/web/site.py" in found


def test_both_stages_stand_on_one_image_named_by_its_digest():
    assert BUILD.base == FINAL.base
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", BUILD.base)


def test_the_worker_is_not_root_and_its_data_is_its_own():
    assert FINAL.only("USER") == "10001:10001"
    kinds = [kind for kind, _ in FINAL.steps]
    assert kinds.index("RUN") < kinds.index("USER") < kinds.index("ENTRYPOINT")
    run_as_root = FINAL.only("RUN")
    assert "useradd --uid 10001 --gid 10001" in run_as_root
    assert "--owner=10001 --group=10001 --mode=0750 /var/lib/streamflow" in run_as_root
    assert "STREAMFLOW_DATA_DIR=/var/lib/streamflow" in FINAL.only("ENV")
    assert FINAL.only("VOLUME") == "/var/lib/streamflow"


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """The build stage, done."""
    build = Build(ROOT, tmp_path_factory.mktemp("image"))
    if not build.reaches_the_index():
        reason = "the package index cannot be reached, and an image is built from it"
        pytest.skip(reason)
    build.do(BUILD)
    return build.image


@pytest.mark.slow
@pytest.mark.timeout(400)
class TestBuilt:
    def test_it_has_what_the_lock_says_and_only_what_runs(self, image):
        (site,) = (image / "opt" / "streamflow" / "lib").glob("python3*/site-packages")
        found = {canonical(each.metadata["Name"]): each.version for each in distributions(path=[str(site)])}
        assert found.pop(PROJECT["name"]) == PROJECT["version"]
        locked = {canonical(name): number for name, number in LOCKED.items()}
        assert found == {name: locked[name] for name in found}
        assert set(found) >= {"aiokafka", "rocksdict", "uvloop"}
        assert not set(found) & {"uv", "pip", "pytest", "hatchling", "mypy", "mkdocs"}
        assert any((site / "streamflow").rglob("*.pyc"))

    def test_the_entry_point_is_there(self, image):
        assert json.loads(FINAL.only("ENTRYPOINT")) == ["streamflow"]
        said = run(image / "opt" / "streamflow" / "bin" / "streamflow", *json.loads(FINAL.only("CMD")), cwd=image)
        assert PROJECT["version"] in said

    def test_the_health_check_tells_a_worker_from_none(self, image, tmp_path):
        _, _, command = FINAL.only("HEALTHCHECK").partition("CMD ")
        program, *arguments = json.loads(command)
        assert program == "python"
        with shell_in(tmp_path) as shell:
            program = image / "opt" / "streamflow" / "bin" / "streamflow"
            worker = shell.start("worker", "orders.py", "--web-port", "0", program=program)
            worker.wait_for("assigned: ")
            environment = shell.environment | {"STREAMFLOW_WEB_PORT": worker.url.rpartition(":")[2]}
            python = [image / "opt" / "streamflow" / "bin" / "python", *arguments]
            assert subprocess.run(python, env=environment, timeout=30, check=False).returncode == 0
            assert worker.stop() == 0
            done = subprocess.run(python, env=environment, capture_output=True, timeout=30, check=False)
            assert done.returncode == 1
