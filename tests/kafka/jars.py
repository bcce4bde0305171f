"""The broker's jars, resolved by Maven from pom.xml into a cache directory once."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

POM = Path(__file__).parent / "pom.xml"
RESOLVE_TIMEOUT_S = 600


class JarsMissingError(RuntimeError):
    """Java or Maven is not here, or Maven cannot reach its repository."""


def kafka_version() -> str:
    found = re.search(r"<kafka.version>(.+?)</kafka.version>", POM.read_text())
    if found is None:
        raise JarsMissingError(f"{POM} names no kafka.version")
    return found[1]


def directory() -> Path:
    named = os.environ.get("STREAMFLOW_KAFKA_JARS")
    return Path(named) if named else Path.home() / ".cache" / "streamflow" / f"kafka-{kafka_version()}"


def resolve() -> Path:
    """The directory of jars, filled on first use; several processes may ask at once."""
    for command in ("java", "mvn"):
        if shutil.which(command) is None and not (command == "mvn" and filled(directory())):
            raise JarsMissingError(f"`{command}` is not on PATH")
    jars = directory()
    if filled(jars):
        return jars
    jars.parent.mkdir(parents=True, exist_ok=True)
    with (jars.parent / f".{jars.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not filled(jars):
            print(f"Resolving Kafka {kafka_version()} by Maven into {jars} ...", file=sys.stderr)
            copy_into(jars)
    return jars


def filled(jars: Path) -> bool:
    return (jars / f"kafka_2.13-{kafka_version()}.jar").exists()


def copy_into(jars: Path) -> None:
    with tempfile.TemporaryDirectory(dir=jars.parent) as scratch:
        command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={scratch}"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE_TIMEOUT_S, check=False)
        if told.returncode:
            raise JarsMissingError(f"Maven could not resolve {POM}:\n{(told.stdout + told.stderr)[-2000:]}")
        jars.mkdir(exist_ok=True)
        # The broker's own jar comes last: its presence says that the directory is complete.
        for jar in sorted(Path(scratch).glob("*.jar"), key=lambda path: path.name.startswith("kafka_2.13")):
            shutil.move(jar, jars / jar.name)
