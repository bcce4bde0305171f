"""The documentation runs: every snippet of every page, in the order of the page, in a folder of its own.

The convention (CONTRIBUTING.md tells it to writers):

- ```python title="orders.py"   is written under that name and imported, as `streamflow worker orders.py` would.
- ```python                     is run as a script.
- ```console                    `$ command` lines run in bash with .venv/bin on PATH and must succeed; the lines below a
                                command must appear in its output in that order, `...` standing for anything and a time
                                as `tail` prints it (2026-11-23T14:32:16.298Z) for any time.
- ```console title="... stays open ..."   the same, but its last command stays in the background until the page ends:
                                what is written below it is waited for, then SIGINT must end it with exit code 0.
- json and toml blocks must parse; sh, text, mermaid and the like are shown, not run. A fence without a language fails.
"""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import streamflow
from streamflow import config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = {"sh", "text", "mermaid", "yaml", "ini", "sql", "dockerfile"}
COMMAND_S = 60
STARTED_S = 30
STOPPED_S = 15


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def fail(self, why: str) -> None:
        pytest.fail(f"{self.page}:{self.line}: {why}", pytrace=False)


def blocks(page: Path) -> Iterator[Block]:
    lines = iter(enumerate(page.read_text().splitlines(), start=1))
    for number, line in lines:
        if fence := re.match(r"( *)(`{3,})(\w*)\s*(.*)$", line):
            indent, ticks, language, rest = fence.groups()
            title = re.search(r'title="([^"]*)"', rest)
            inner = []
            for _, text in lines:
                if text.strip() == ticks:
                    break
                inner.append(text.removeprefix(indent))
            yield Block(page, number, language, title[1] if title else "", "\n".join(inner) + "\n")


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Each command with the output that the page shows for it."""
    found: list[tuple[str, list[str]]] = []
    text = re.sub(r"\\\n\s*", "", block.text)
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif not found:
            block.fail("a console block starts with a line `$ command`")
        elif line.strip():
            found[-1][1].append(line.strip())
    if not found:
        block.fail("this console block has no line `$ command`")
    return found


TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def _as_pattern(line: str) -> str:
    pieces = [re.split(TIME, piece.strip()) for piece in line.split("...")]
    return ".*?".join(TIME.join(map(re.escape, texts)) for texts in pieces)


def first_absent(shown: list[str], output: str) -> str | None:
    """The first line of the page that the output does not have, after those before it."""
    position = 0
    for line in shown:
        match = re.compile(_as_pattern(line)).search(output, position)
        if match is None:
            return line
        position = match.end()
    return None


class Shell:
    """Runs one page's blocks in one folder; what it leaves running is ended by `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMFLOW_", "PYTHON"))}
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "NO_COLOR": "1",
            "COLUMNS": "120",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.open: list[tuple[Block, str, subprocess.Popen[bytes], Path]] = []

    def run(self, block: Block) -> None:
        if block.language == "python":
            self._python(block)
        elif block.language == "console":
            self._console(block)
        elif block.language in {"json", "toml"}:
            (json if block.language == "json" else tomllib).loads(block.text)
        elif block.language not in SHOWN:
            block.fail(
                f"what is a `{block.language}` block? name one of: python, console, json, toml, {', '.join(SHOWN)}"
            )

    def _python(self, block: Block) -> None:
        path = self.folder / (block.title or f"snippet_line_{block.line}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        if block.title.endswith(".py"):
            self._finish(block, f"python -c 'import {path.stem}'", [])
        elif not block.title:
            self._finish(block, f"python {path.name}", [])

    def _console(self, block: Block) -> None:
        *before, (last, shown) = commands(block)
        for command, output in before:
            self._finish(block, command, output)
        if "stays open" in block.title:
            self._start(block, last, shown)
        else:
            self._finish(block, last, shown)

    def _popen(self, command: str, output: Path) -> subprocess.Popen[bytes]:
        with output.open("wb") as sink:
            return subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _finish(self, block: Block, command: str, shown: list[str]) -> None:
        path = self.folder.parent / "output"
        process = self._popen(command, path)
        try:
            code = process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process, signal.SIGKILL)
        output = path.read_text(errors="replace")
        if code is None:
            block.fail(f"`{command}` did not end within {COMMAND_S} s; it said:\n{output}")
        if code:
            block.fail(f"`{command}` ended with {code}:\n{output}")
        if absent := first_absent(shown, output):
            block.fail(f"`{command}` did not print `{absent}`; it said:\n{output}")

    def _start(self, block: Block, command: str, shown: list[str]) -> None:
        path = self.folder.parent / f"background-{len(self.open)}"
        # exec: the signal that ends it goes to the command and not to a shell in front of it.
        process = self._popen(f"exec env {command}", path)
        self.open.append((block, command, process, path))
        deadline = time.monotonic() + STARTED_S
        while absent := first_absent(shown, path.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                block.fail(f"`{command}` did not print `{absent}`; it said:\n{path.read_text(errors='replace')}")
            time.sleep(0.02)

    def close(self) -> None:
        for block, command, process, path in reversed(self.open):
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(STOPPED_S)
            except subprocess.TimeoutExpired:
                block.fail(
                    f"`{command}` did not end within {STOPPED_S} s of a SIGINT:\n{path.read_text(errors='replace')}"
                )
            if code:
                block.fail(f"`{command}` ended with {code}:\n{path.read_text(errors='replace')}")

    def kill(self) -> None:
        for _, _, process, _ in self.open:
            end_group(process, signal.SIGKILL)


def end_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Ends a command with all that it started; its process group is its own."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
    process.wait()


def run_page(page: Path, folder: Path) -> None:
    work = folder / "work"
    work.mkdir()
    shell = Shell(work)
    try:
        for block in blocks(page):
            shell.run(block)
        shell.close()
    finally:
        shell.kill()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet_runs(page, tmp_path):
    run_page(page, tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```\nx\n```", "page.md:1: what is a `` block?"),
        ("\n```python\n1 / 0\n```", "page.md:2: .*ZeroDivisionError"),
        (
            '```python title="a.py"\nx = 1\n```\n```python\nimport a\nassert a.x == 2\n```',
            "page.md:4: .*AssertionError",
        ),
        ("```console\n$ echo one two\none ... three\n```", r"did not print `one \.\.\. three`"),
        ("```console\n$ echo 2026-11-23 2-0\n2026-11-23T14:32:16.298Z 2-0\n```", "did not print `2026-11-23T14"),
        ("```console\n$ false\n```", "`false` ended with 1"),
        ("```console\nfalse\n```", "starts with a line"),
        ('```console title="stays open"\n$ python -c "print(1)"\n2\n```', "did not print `2`"),
        ('```console title="stays open"\n$ sleep 60\n```', "`sleep 60` ended with -2"),
    ],
)
def test_a_wrong_page_is_caught_with_its_line(text, complaint, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(pytest.fail.Exception, match=f"(?s){complaint}"):
        run_page(page, tmp_path)


def test_a_right_page_passes(tmp_path):
    stoppable = "import signal, sys, time; signal.signal(2, lambda *_: sys.exit(0)); print('up'); time.sleep(60)"
    (tmp_path / "page.md").write_text(
        '```python title="a.py"\nx = 1\n```\n'
        "- in a list:\n\n  ```python\n  import a\n  assert a.x == 1\n  ```\n\n"
        f'```console title="A terminal that stays open"\n$ echo "{stoppable}" > b.py\n$ python b.py\nup\n```\n'
        "```console\n$ echo one; \\\n    echo two three\none\n\ntwo ... ree\n$ echo four\n```\n"
        "```console\n$ echo at 2031-01-31T23:59:59.999Z 2-0 ann\nat 2026-11-23T14:32:16.298Z 2-0 ann\n```\n"
        "```toml\na = 1\n```\n"
    )
    run_page(tmp_path / "page.md", tmp_path)


def public(module: ModuleType) -> list[tuple[str, object]]:
    return [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]


def members(name: str, value: object) -> Iterator[tuple[str, object]]:
    """A public name and, if it is one of our classes, its public methods and properties."""
    yield name, value
    if inspect.isclass(value) and value.__module__.split(".")[0] == "streamflow":
        for inner, member in vars(value).items():
            if not inner.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                yield f"{name}.{inner}", getattr(value, inner)


def test_every_public_name_has_a_docstring():
    from streamflow import testing

    bare = [
        full
        for module in (streamflow, testing)
        for name, value in public(module)
        for full, member in members(name, value)
        if callable(member) or isinstance(member, property)
        if not (inspect.getdoc(member) or "").strip()
    ]
    assert not bare, "these have no docstring: " + ", ".join(bare)


def test_the_settings_page_has_the_table_of_the_code():
    table = config.markdown_table()
    assert table in (ROOT / "docs" / "settings.md").read_text(), f"docs/settings.md must contain:\n{table}"
    assert (ROOT / "docs" / "settings.md").read_text().count(table.splitlines()[0]) == 1


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}


@pytest.mark.parametrize("page", ["tests/README.md", "docs/what-happens-when.md"])
def test_every_test_that_a_list_of_failures_names_is_there(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        path = ROOT / "tests" / file
        assert path.exists(), file
        assert f"def {name}(" in path.read_text(), f"{file} has no {name}"
