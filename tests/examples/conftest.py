"""Runs the examples as their readers do: as programs, with the commands of their docstrings, on a log of their own."""

import ast
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COMMAND_S = 50

Run = Callable[[str], str]


def commands(example: str, *first_words: str) -> list[str]:
    """The command lines in an example's docstring that begin with one of these words."""
    text = ast.get_docstring(ast.parse((EXAMPLES / example).read_text())) or ""
    lines = (line.strip().partition("      ")[0] for line in text.splitlines() if line.startswith("    "))
    return [line for line in lines if line.split()[0] in first_words]


def imported(name: str) -> ModuleType:
    """An example as a module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of an example: a folder of its own for the log, our commands on PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMFLOW_", "PYTHON"))}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "STREAMFLOW_DATA_DIR": str(tmp_path / "data"),
        "STREAMFLOW_WEB": "false",
        "NO_COLOR": "1",
    }


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Run a command line at the top of the repository; gives what it printed, and fails if it failed."""

    def run_one(command: str) -> str:
        told = subprocess.run(
            shlex.split(command),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert told.returncode == 0, f"`{command}` ended with {told.returncode}:\n{told.stdout}{told.stderr}"
        return told.stdout

    return run_one
