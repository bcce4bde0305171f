"""What every test shares: the tools a machine may lack, said loudly, and hypothesis's settings."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Generator
from functools import cache
from importlib.util import find_spec

import hypothesis
import pytest

CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
KAFKA_NEEDS = ("java", "mvn")
LACKING = "lacking"  # the property of a test that was left out, which travels in its report from where it ran
OLDEST_JAVA = 17
HOW_TO_INSTALL = {
    "java": f"Java {OLDEST_JAVA} or newer (Debian: apt-get install default-jdk-headless)",
    "mvn": "Maven (Debian: apt-get install maven)",
}

pytest_plugins = ["tests.kafka.fixtures"] if find_spec("tests.kafka") and find_spec("tests.kafka.fixtures") else []

hypothesis.settings.register_profile("streamflow", deadline=None, print_blob=True)
hypothesis.settings.load_profile("streamflow")


def pytest_configure() -> None:
    """Let children be interrupted: a shell starts background jobs with SIGINT ignored, and that is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@cache
def missing(command: str) -> str | None:
    """Why this command cannot be used on this machine, or None."""
    path = shutil.which(command)
    if path is None:
        return f"`{command}` is not on PATH"
    if command == "java":
        told = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
        version = re.search(r'version "(\d+)', told)
        if version is None or int(version[1]) < OLDEST_JAVA:
            return f"`java` is older than {OLDEST_JAVA}: {told.strip().splitlines()[:1]}"
    return None


def needs(item: pytest.Item) -> list[str]:
    """The commands a test says it needs, by its markers."""
    commands = [command for marker in item.iter_markers("needs") for command in marker.args]
    return [*commands, *(KAFKA_NEEDS if item.get_closest_marker("kafka") else ())]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for command in needs(item):
        if reason := missing(command):
            item.user_properties.append((LACKING, command))
            if CI:
                pytest.fail(f"{reason}, and CI={os.environ['CI']} leaves nothing out", pytrace=False)
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test has printed travels as UTF-8 to where it is shown; some print texts that are none."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left out for want of a tool, where nobody can overlook it."""
    lacking: dict[str, list[str]] = {}
    for kind in ("skipped", "failed", "error"):
        for report in terminalreporter.getreports(kind):
            for name, command in getattr(report, "user_properties", ()):  # a file that cannot be read has none
                if name == LACKING:
                    lacking.setdefault(command, []).append(report.nodeid)
    for command, tests in lacking.items():
        verb = "FAILED" if CI else "SKIPPED"
        terminalreporter.section(f"{len(tests)} tests {verb}: {missing(command)}", sep="!", red=True, bold=True)
        terminalreporter.line(f"To run them, install {HOW_TO_INSTALL.get(command, command)}.")
        terminalreporter.line("What they prove is not proved on this machine: " + ", ".join(files(tests)))


def files(nodeids: list[str]) -> list[str]:
    return sorted({nodeid.split("::")[0] for nodeid in nodeids})
