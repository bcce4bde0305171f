"""Reads a Dockerfile, and does what a build stage does without Docker: in a folder, with the RUN lines as they are."""

from __future__ import annotations

import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """What stands between one FROM and the next.

    Attributes:
        base: Its image.
        name: Behind AS; empty without.
        steps: Its instructions in their order, with their arguments as they are written, on one line.
    """

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def only(self, instruction: str) -> str:
        """The arguments of the one instruction of that kind."""
        (arguments,) = [text for kind, text in self.steps if kind == instruction]
        return arguments


def read_dockerfile(path: Path) -> list[Stage]:
    """Its stages."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        kind, _, arguments = line.strip().partition(" ")
        if kind == "FROM":
            base, *alias = arguments.split()
            stages.append(Stage(base, alias[1] if alias else ""))
        else:
            stages[-1].steps.append((kind, arguments.strip()))
    return stages


def context(root: Path) -> set[str]:
    """The files that `.dockerignore` lets into a build: the last pattern that matches one decides."""
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    found = set()
    for top in root.iterdir():
        if top.is_file():
            names = [top.name]
        else:
            # Docker does not look into a folder either that nothing lets in.
            names = (
                [str(path.relative_to(root)) for path in top.rglob("*") if path.is_file()]
                if _in(top.name, rules)
                else []
            )
        found |= {name for name in names if _in(name, rules)}
    return found


def _in(name: str, rules: list[str]) -> bool:
    kept = True
    for rule in rules:
        if _matches(name, rule.removeprefix("!")):
            kept = rule.startswith("!")
    return kept


def _matches(name: str, pattern: str) -> bool:
    parents = ["/".join(name.split("/")[: number + 1]) for number in range(name.count("/") + 1)]
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern.removeprefix("**/")) for part in name.split("/"))
    return any(fnmatch.fnmatchcase(each, pattern) and each.count("/") == pattern.count("/") for each in parents)


class Build:
    """Does the steps of a stage in a folder that stands for the image's `/`.

    Args:
        root: The repository.
        image: The folder.
    """

    def __init__(self, root: Path, image: Path) -> None:
        self.root, self.image = root, image
        self.files = context(root)
        self.directory = image
        python = image / "usr" / "local"
        subprocess.run([sys.executable, "-m", "venv", python], check=True, timeout=120)
        kept = {
            name: text for name, text in os.environ.items() if not name.startswith(("STREAMFLOW_", "PYTHON", "UV_"))
        }
        self.environment = kept | {"PATH": f"{python / 'bin'}:{os.environ['PATH']}", "HOME": str(image)}
        self.environment.pop("VIRTUAL_ENV", None)
        # Whom this machine trusts, pip trusts already; uv, which brings a list of its own, is told to.
        self.environment |= {"UV_NATIVE_TLS": "true", "UV_SYSTEM_CERTS": "true"}

    def here(self, text: str) -> str:
        """An absolute path of the image, or a text with such, in the folder."""
        return text.replace("/opt/streamflow", f"{self.image}/opt/streamflow")

    def do(self, stage: Stage) -> None:
        for kind, arguments in stage.steps:
            getattr(self, f"_{kind.lower()}")(arguments)

    def reaches_the_index(self) -> bool:
        """Whether packages can be fetched; what stands between them and the image is then a fault of the Dockerfile."""
        command = ["pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", self.image / "tried", "h11"]
        return (
            subprocess.run(command, env=self.environment, capture_output=True, timeout=120, check=False).returncode == 0
        )

    def _workdir(self, path: str) -> None:
        self.directory = self.image / path.lstrip("/")
        self.directory.mkdir(parents=True, exist_ok=True)

    def _copy(self, arguments: str) -> None:
        *sources, target = shlex.split(arguments)
        for source in sources:
            chosen = [name for name in self.files if name == source or name.startswith(f"{source}/")]
            assert chosen, f"COPY {source}: .dockerignore leaves nothing of it in the context"
            for name in chosen:
                # A folder's content goes into the target, a file goes by its own name where the target is a folder.
                inner = Path(name).relative_to(source) if name != source else Path(Path(name).name)
                place = self.directory / target / inner
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / name, place)

    def _run(self, command: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-ec", self.here(command)],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout}"
