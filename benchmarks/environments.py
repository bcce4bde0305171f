"""What the peers need, prepared once under BENCH_HOME: virtual environments, and jars and classes for Kafka Streams.

`python -m benchmarks.environments [tools] [PEER...]`; all of them by default. Needs the network, and for Kafka Streams
a JDK and Maven.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.peers import PEERS, kstreams_directory
from benchmarks.settings import APPS, bench_home

TOOLS = ("confluent-kafka==2.16.1",)


def prepare(name: str) -> None:
    """Make sure that a peer (or `tools`, what drives the measurement) can run."""
    if name == "kstreams":
        _kstreams()
    elif requirements := TOOLS if name == "tools" else PEERS[name].requirements:
        _venv(bench_home() / name, requirements)


def _venv(directory: Path, requirements: tuple[str, ...]) -> None:
    ready, wanted = directory / ".ready", "\n".join(requirements)
    if ready.exists() and ready.read_text() == wanted:
        return
    print(f"Preparing {directory} ...", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *requirements], check=True)
    ready.write_text(wanted)


def _kstreams() -> None:
    directory, source = kstreams_directory(), APPS / "KStreamsBench.java"
    ready, wanted = directory / ".ready", source.read_text()
    if ready.exists() and ready.read_text() == wanted:
        return
    print(f"Preparing {directory} ...", file=sys.stderr, flush=True)
    libs, classes = directory / "libs", directory / "classes"
    classes.mkdir(parents=True, exist_ok=True)
    maven = ["mvn", "-q", "-B", "-f", str(APPS / "pom.xml"), "dependency:copy-dependencies"]
    subprocess.run([*maven, f"-DoutputDirectory={libs}", "-DincludeScope=runtime"], check=True)
    subprocess.run(["javac", "-cp", f"{libs}/*", "-d", str(classes), str(source)], check=True)
    ready.write_text(wanted)


if __name__ == "__main__":
    for named in sys.argv[1:] or ["tools", *PEERS]:
        prepare(named)
