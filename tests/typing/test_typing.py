"""Type checkers say what the API promises: accepted programs pass, and each rejected line is refused by both.

The programs are data: they are checked, never run. A line that both checkers must refuse ends in `# error: why`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDERS = [str((HERE / name).relative_to(ROOT)) for name in ("accepted", "rejected")]

Lines = dict[tuple[str, int], list[str]]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def mypy() -> Lines:
    found: Lines = {}
    for line in run("mypy", "--strict", "--no-pretty", "--explicit-package-bases", *FOLDERS).splitlines():
        if error := re.match(r"(.+?):(\d+): error: (.*)", line):
            found.setdefault((str(Path(error[1])), int(error[2])), []).append(error[3])
    return found


@pytest.fixture(scope="module")
def pyright() -> Lines:
    found: Lines = {}
    for each in json.loads(run("pyright", "--outputjson", *FOLDERS))["generalDiagnostics"]:
        if each["severity"] == "error":
            place = (str(Path(each["file"]).relative_to(ROOT)), each["range"]["start"]["line"] + 1)
            found.setdefault(place, []).append(each["message"])
    return found


def expected() -> set[tuple[str, int]]:
    return {
        (str(path.relative_to(ROOT)), number)
        for path in sorted((HERE / "rejected").glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "  # error: " in line
    }


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_checkers_refuse_exactly_the_marked_lines(checker, request):
    found = request.getfixturevalue(checker)
    wrongly = {f"{path}:{line}": errors for (path, line), errors in found.items() if (path, line) not in expected()}
    assert not wrongly, f"{checker} refuses what should pass: {wrongly}"
    missed = [f"{path}:{line}" for path, line in sorted(expected() - set(found))]
    assert not missed, f"{checker} accepts what should be refused: {missed}"
