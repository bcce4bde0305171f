"""Who is measured: one row per peer, with what it needs and how it is started.

A peer is a program that reads BOOTSTRAP, IN, OUT, MODE, APPID and DATADIR from its environment, reads IN from the
beginning and writes one record to OUT for each. All of them decode the same JSON orders and encode the same JSON
results.
"""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.settings import APPS, COMPARED, MODES, ROOT, bench_home

Command = Callable[[], list[str]]


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Args:
        title: Its name in the results.
        command: How it is started.
        requirements: What pip installs into its own virtual environment; empty for those that need none.
        modes: What it can do.
        most_records: Where a run stops for a peer that would need many minutes for all of them.
        most_rate: Records per second that it is given at most where it is loaded steadily.
        note: What a reader of the table must know.
    """

    title: str
    command: Command
    requirements: tuple[str, ...] = ()
    modes: tuple[str, ...] = COMPARED
    most_records: int = 10**9
    most_rate: int = 10**9
    note: str = ""


def venv_command(venv: str, program: str, *arguments: str) -> Command:
    return lambda: [str(bench_home() / venv / "bin" / program), *arguments]


def streamflow() -> list[str]:
    command = os.environ.get("STREAMFLOW") or str(ROOT / ".venv" / "bin" / "streamflow")
    return [*shlex.split(command), "worker", str(APPS / "streamflow_app.py")]


def kstreams_directory() -> Path:
    return bench_home() / "kstreams"


def kstreams() -> list[str]:
    directory = kstreams_directory()
    return ["java", "-Xmx2g", "-cp", f"{directory}/classes:{directory}/libs/*", "KStreamsBench"]


PEERS = {
    "streamflow": Peer(
        "StreamFlow",
        streamflow,
        modes=MODES,
        note="typed decode and encode; metrics and their web page on, as by default",
    ),
    "kstreams": Peer("Kafka Streams 4.1.1", kstreams, note="one stream thread, no record cache: every update leaves"),
    "raw": Peer(
        "loop by hand",
        venv_command("raw", "python", "raw_confluent_app.py"),
        ("confluent-kafka==2.16.1", "msgspec==0.22.0"),
        modes=("map",),
        note="confluent-kafka and msgspec; auto commit, no error handling, no state",
    ),
    "quix": Peer(
        "Quix Streams 3.28.1",
        venv_command("quix", "python", "quix_app.py"),
        ("quixstreams==3.28.1",),
        most_records=500_000,
        note="untyped dictionaries",
    ),
    "bytewax": Peer(
        "Bytewax 0.21.1",
        venv_command("bytewax", "python", "-m", "bytewax.run", "bytewax_app:flow"),
        ("bytewax==0.21.1", "confluent-kafka==2.16.1"),
        modes=("map", "table"),
        most_records=500_000,
        note="untyped dictionaries; no changelog",
    ),
    "faust": Peer(
        "Faust 0.15.3",
        venv_command("faust", "faust", "-A", "faust_app", "worker", "-l", "warn", "--without-web"),
        ("faust-streaming[rocksdb]==0.15.3", "aiokafka", "orjson", "uvloop", "setuptools"),
        most_records=100_000,
        most_rate=600,
    ),
    "pathway": Peer(
        "Pathway 0.33.0",
        venv_command("pathway", "python", "pathway_app.py"),
        ("pathway==0.33.0",),
        modes=("map",),  # its table does not emit every update, so that there is nothing to count
        most_records=1_000_000,
        note="engine in Rust",
    ),
}
REFERENCE = "streamflow"
