"""200 simulated runs, that each of them can be repeated, and that what is wrong shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.plan import Plan
from tests.simulation.planted import BUGS
from tests.simulation.run import simulate

ROOT = Path(__file__).parent.parent.parent
SEEDS = 200
CHUNK = 50
# A hundred seeds take fifteen seconds of a core; this is for a machine on which ten others want it, too.
TIMEOUT_S = 600
pytestmark = pytest.mark.timeout(TIMEOUT_S + 30)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Simulations run in a process of their own, where the order of sets is the same every time."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_everything_is_as_it_must_be(first: int) -> None:
    done = run("--first", str(first), "--count", str(CHUNK), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_seed_repeats_exactly() -> None:
    one, again, part = (run("--first", str(at), "--count", str(n), "--digests") for at, n in ((0, 8), (0, 8), (4, 4)))
    digests = one.stdout.splitlines()[:8]
    assert [line.split()[0] for line in digests] == [str(seed) for seed in range(8)]
    assert len({line.split()[1] for line in digests}) == 8
    assert again.stdout.splitlines()[:8] == digests
    assert part.stdout.splitlines()[:4] == digests[4:]


def test_showing_a_run_does_not_change_it() -> None:
    plan, lines = Plan.of(3), list[str]()
    assert simulate(plan, lines.append).digest == simulate(plan).digest
    assert any("has committed" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_found(name: str) -> None:
    done = run("--count", "500", "--planted", name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "again: make simulate SEED=" in done.stdout
