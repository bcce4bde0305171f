"""Imports go down only: docs/architecture.md draws the layers, and this enforces them by reading the source.

What counts is what is written, wherever it stands: an import inside a function or under TYPE_CHECKING is one too.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "streamflow"
LAYERS = (
    ("errors", "error_groups", "clock", "virtual_loop", "config", "disk", "keywords", "lifecycle", "sensors", "model"),
    ("log",),
    ("state",),
    ("processing",),
    ("runtime",),
    ("app", "cli", "hosting", "log_output", "web", "metrics", "testing", "sql", "catalog", "connectors"),
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
TOP = {"streamflow", "streamflow.__main__"}
# Lower, and forbidden all the same: only `runtime` is where log, state and processing meet.
FORBIDDEN = {("processing", "log"), ("state", "log")} | {
    (surface, below) for surface in LAYERS[-1] for below in ("log", "state")
}
# For surfaces only: the contract, how to reach a log, and what a user says about a connection.
ALLOWED_ALL_THE_SAME = {"streamflow.log.api", "streamflow.log.connect", "streamflow.log.kafka.options"}
# A third-party (or I/O) module and the only places that may know it.
HOMES = {
    "aiokafka": ("log",),
    "sqlite3": ("log",),
    "rocksdict": ("state",),
    "typer": ("cli",),
    "starlette": ("web",),
    "uvicorn": ("web",),
    "h11": ("runtime",),
}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
FUNCTION_LINES = 80
FILE_LINES = 700
PUBLIC_NAMES = 40


class Source:
    """The modules of a package: dotted name to path, tree and the modules of the package that each one imports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = {self._name(path): path for path in sorted(root.rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text(), str(path)) for name, path in self.paths.items()}

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.root.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def place(self, module: str, line: int = 1) -> str:
        return f"{self.paths[module].relative_to(self.root.parent)}:{line}"

    def imports(self, module: str) -> Iterator[tuple[str, int]]:
        """Yields every imported module's full name, as far as it can be told, with its line."""
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    inner = f"{origin}.{alias.name}"
                    yield (inner if inner in self.paths else origin), node.lineno

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.paths[module].name == "__init__.py"
        parts = module.split(".")
        parent = parts[: len(parts) - node.level + is_package]
        return ".".join([*parent, *(node.module.split(".") if node.module else [])])

    def internal(self, module: str) -> Iterator[tuple[str, int]]:
        return ((name, line) for name, line in self.imports(module) if name.split(".")[0] == self.root.name)


def part(module: str) -> str:
    """The second word of a dotted name: what the layers are made of."""
    return module.split(".")[1] if "." in module else module


def unplaced(source: Source) -> list[str]:
    return [
        f"{source.place(module)}: `{part(module)}` belongs to no layer; put it into one, or name it in LAYERS"
        for module in source.paths
        if module not in TOP and part(module) not in LAYER
    ]


def upward_imports(source: Source) -> list[str]:
    found = []
    for module in source.paths:
        if module in TOP or part(module) not in LAYER:
            continue
        layer = LAYER[part(module)]
        for name, line in source.internal(module):
            target = LAYER.get(part(name), len(LAYERS)) if name not in TOP else len(LAYERS)
            what = f"{source.place(module, line)}: remove the import of `{name}`: "
            if target > layer:
                found.append(f"{what}layer {layer} (`{part(module)}`) may not know layer {target}, which is above it")
            elif (part(module), part(name)) in FORBIDDEN:
                if layer == len(LAYERS) - 1 and name in ALLOWED_ALL_THE_SAME:
                    continue
                found.append(f"{what}`{part(module)}` never touches `{part(name)}`; only `runtime` joins them")
    return found


def strangers(source: Source) -> list[str]:
    return [
        f"{source.place(module, line)}: remove the import of `{name}`: only {', '.join(homes)} may know it"
        for module in source.paths
        for name, line in source.imports(module)
        if (homes := HOMES.get(name.split(".")[0])) and part(module) not in homes
    ]


def undeclared(source: Source) -> list[str]:
    """Finds packages that are there only because another one needs them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", wanted)[0].replace("-", "_") for wanted in project["dependencies"]}
    known = declared | sys.stdlib_module_names | {source.root.name}
    return [
        f"{source.place(module, line)}: `{name.split('.')[0]}` is no dependency; remove the import, or declare it"
        for module in source.paths
        for name, line in source.imports(module)
        if name.split(".")[0] not in known
    ]


def cycles(source: Source) -> list[str]:
    """Finds import cycles depth first; each is reported once, by the import that closes it."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        if module in done:
            return
        for name, line in source.internal(module):
            if name in [*way, module]:
                ring = [*way, module][[*way, module].index(name) :]
                found.append(
                    f"{source.place(module, line)}: remove an import of this cycle: {' > '.join([*ring, name])}"
                )
            elif name in source.paths:
                visit(name, [*way, module])
        done.add(module)

    for module in source.paths:
        visit(module, [])
    return found


def oversized(source: Source) -> list[str]:
    found = []
    for module, tree in source.trees.items():
        lines = len(source.paths[module].read_text().splitlines())
        if lines > FILE_LINES:
            found.append(f"{source.place(module)}: {lines} lines, and a file stops at {FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(
                        f"{source.place(module, node.lineno)}: `{node.name}` has {lines} lines of {FUNCTION_LINES}"
                    )
    return found


def misnamed(source: Source) -> list[str]:
    return [
        f"{source.place(module)}: name it after what it holds, not `{name}`"
        for module in source.paths
        for name in module.split(".")[1:]
        if name in BANNED_NAMES
    ]


def filled_packages(source: Source) -> list[str]:
    return [
        f"{source.place(module)}: only {source.root.name}/__init__.py may hold code; leave this one empty"
        for module, path in source.paths.items()
        if path.name == "__init__.py" and module != source.root.name and path.read_text().strip()
    ]


def crowded_face(source: Source) -> list[str]:
    for node in source.trees[source.root.name].body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names = ast.literal_eval(node.value)
            return [f"`__all__` has {len(names)} names of {PUBLIC_NAMES}"] if len(names) > PUBLIC_NAMES else []
    return [f"{source.place(source.root.name)}: there is no `__all__`"]


RULES = [unplaced, upward_imports, strangers, undeclared, cycles, oversized, misnamed, filled_packages, crowded_face]


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(PACKAGE)


@pytest.mark.parametrize("rule", RULES)
def test_package_keeps(rule, source):
    assert not rule(source), "\n" + "\n".join(rule(source))


GOOD = {
    "__init__.py": "from streamflow.processing.app import App\n__all__ = ['App']\n",
    "errors.py": "",
    "log/__init__.py": "",
    "log/api.py": "import sqlite3\nfrom streamflow import errors\n",
    "processing/__init__.py": "",
    "processing/app.py": "from ..errors import X\n",
    "runtime/__init__.py": "",
    "runtime/worker.py": "from streamflow.log import api\nfrom streamflow.processing.app import App\n",
}


def tree(root: Path, changed: dict[str, str]) -> Source:
    for name, text in (GOOD | changed).items():
        path = root / "streamflow" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Source(root / "streamflow")


@pytest.mark.parametrize("rule", RULES)
def test_a_good_tree_passes(rule, tmp_path):
    assert rule(tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("rule", "name", "text", "message"),
    [
        (unplaced, "stuff.py", "", "streamflow/stuff.py:1: `stuff` belongs to no layer"),
        (
            upward_imports,
            "errors.py",
            "\nimport streamflow.log.api",
            "errors.py:2: remove the import of `streamflow.log.api`",
        ),
        (
            upward_imports,
            "errors.py",
            "def f():\n    from .log import api",
            "errors.py:2: remove the import of `streamflow.log.api`",
        ),
        (
            upward_imports,
            "errors.py",
            "if TYPE_CHECKING:\n    from .runtime.worker import Worker",
            "layer 0 (`errors`) may not",
        ),
        (upward_imports, "errors.py", "from streamflow import App", "remove the import of `streamflow`"),
        (upward_imports, "processing/app.py", "from streamflow.log.api import Log", "never touches `log`"),
        (upward_imports, "state/table.py", "from ..log.api import Log", "never touches `log`"),
        (upward_imports, "web/page.py", "from streamflow.log.sqlite import reader", "only `runtime` joins them"),
        (strangers, "runtime/worker.py", "import aiokafka.record", "only log may know it"),
        (strangers, "processing/app.py", "from sqlite3 import connect", "only log may know it"),
        (undeclared, "errors.py", "from pydantic.types import X", "`pydantic` is no dependency"),
        (cycles, "errors.py", "from streamflow import errors", "streamflow.errors > streamflow.errors"),
        (cycles, "errors.py", "import streamflow.runtime.worker", "> streamflow.errors"),
        (oversized, "errors.py", "def long():\n" + "    pass\n" * 80, "`long` has 81 lines of 80"),
        (oversized, "errors.py", "\n" * 701, "701 lines"),
        (misnamed, "log/utils.py", "", "not `utils`"),
        (filled_packages, "log/__init__.py", "x = 1", "leave this one empty"),
        (crowded_face, "__init__.py", f"__all__ = {[f'n{i}' for i in range(41)]}", "41 names of 40"),
        (crowded_face, "__init__.py", "", "no `__all__`"),
    ],
)
def test_a_breach_is_caught_and_named(rule, name, text, message, tmp_path):
    found = rule(tree(tmp_path, {name: text}))
    assert any(message in what for what in found), found


def test_a_surface_may_know_the_contract_of_the_log(tmp_path):
    assert upward_imports(tree(tmp_path, {"cli/tail.py": "from streamflow.log.api import Log"})) == []
