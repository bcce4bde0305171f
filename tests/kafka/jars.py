"""A broker's jars, resolved by Maven from pom.xml (or pom-old.xml) into a cache directory once."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

POM = Path(__file__).parent / "pom.xml"
OLD_POM = Path(__file__).parent / "pom-old.xml"
RESOLVE_TIMEOUT_S = 600


class JarsMissingError(RuntimeError):
    """Java or Maven is not here, or Maven cannot reach its repository."""


def kafka_version(pom: Path = POM) -> str:
    found = re.search(r"<kafka.version>(.+?)</kafka.version>", pom.read_text())
    if found is None:
        raise JarsMissingError(f"{pom} names no kafka.version")
    return found[1]


def directory(pom: Path = POM) -> Path:
    named = os.environ.get("STREAMFLOW_KAFKA_JARS" if pom == POM else "STREAMFLOW_OLD_KAFKA_JARS")
    return Path(named) if named else Path.home() / ".cache" / "streamflow" / f"kafka-{kafka_version(pom)}"


def resolve(pom: Path = POM) -> Path:
    """The directory of jars, filled on first use; several processes may ask at once."""
    jars = directory(pom)
    for command in ("java", "mvn"):
        if shutil.which(command) is None and not (command == "mvn" and filled(jars, pom)):
            raise JarsMissingError(f"`{command}` is not on PATH")
    if filled(jars, pom):
        return jars
    jars.parent.mkdir(parents=True, exist_ok=True)
    with (jars.parent / f".{jars.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not filled(jars, pom):
            print(f"Resolving Kafka {kafka_version(pom)} by Maven into {jars} ...", file=sys.stderr)
            copy_into(jars, pom)
    return jars


def filled(jars: Path, pom: Path) -> bool:
    return (jars / f"kafka_2.13-{kafka_version(pom)}.jar").exists()


def copy_into(jars: Path, pom: Path) -> None:
    with tempfile.TemporaryDirectory(dir=jars.parent) as scratch:
        command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={scratch}"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE_TIMEOUT_S, check=False)
        if told.returncode:
            raise JarsMissingError(f"Maven could not resolve {pom}:\n{(told.stdout + told.stderr)[-2000:]}")
        jars.mkdir(exist_ok=True)
        # The broker's own jar comes last: its presence says that the directory is complete.
        for jar in sorted(Path(scratch).glob("*.jar"), key=lambda path: path.name.startswith("kafka_2.13")):
            shutil.move(jar, jars / jar.name)
