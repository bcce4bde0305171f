"""Runs the installed `streamflow` command in real processes, bounded, waiting for what it says and never for time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).parent / "streamflow"
TIMEOUT_S = 20.0
APP = """
from collections.abc import AsyncIterator
import os
import time
import msgspec
import streamflow as sf

class Order(msgspec.Struct):
    order_id: int
    user: str
    amount: float

class Invoice(msgspec.Struct):
    order_id: int
    total: float

app = sf.App("orders")
orders = app.topic("orders", key_type=str, value_type=Order)
invoices = app.topic("invoices", key_type=str, value_type=Invoice)

@app.agent(orders, sink=invoices)
async def invoice(stream: sf.Stream[Order]) -> AsyncIterator[Invoice]:
    async for order in stream:
        if order.user == "bad":
            raise ValueError("a bad user")
        if order.user == "slow":
            print("blocking", flush=True)
            time.sleep(60)
        if order.user == "crash":
            os._exit(77)
        yield Invoice(order.order_id, order.amount * 2)

if __name__ == "__main__":
    app.main()
"""


def order(number: int, user: str = "ann") -> str:
    return json.dumps({"order_id": number, "user": user, "amount": 2.5})


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


class Running:
    """A command that runs; its two outputs go to files."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self._out, self._err = out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for(self, pattern: str, *, times: int = 1) -> re.Match[str]:
        """Wait until it has said that."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            said = self.err + self.out
            found = list(re.finditer(pattern, said))
            if len(found) >= times:
                return found[-1]
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"it never said {pattern!r} (exit code {self.process.poll()}):\n{said}")
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal, and wait until the process has taken it: of two that nobody has taken yet, one is lost."""
        self.process.send_signal(number)
        deadline = time.monotonic() + TIMEOUT_S
        while self._is_pending(number):
            assert time.monotonic() < deadline, f"it does not take signal {number}"
            time.sleep(0.002)

    def _is_pending(self, number: int) -> bool:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:  # it is gone
            return False
        pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", status, re.MULTILINE)
        return any(int(mask, 16) >> (number - 1) & 1 for mask in pending) and "State:\tZ" not in status

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    @property
    def url(self) -> str:
        return self.wait_for(r"web +(http://\S+)")[1]


class Shell:
    """A folder with an app, and commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("STREAMFLOW_", "PYTHON"))
        } | {"COLUMNS": "200", "NO_COLOR": "1"}
        self.running: list[Running] = []

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> Result:
        """Run a command to its end."""
        done = subprocess.run(
            [COMMAND, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str, program: str | Path = COMMAND, **environment: str) -> Running:
        """Start a command."""
        number = len(self.running)
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                [program, *arguments],
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
            )
        started = Running(process, out, err)
        self.running.append(started)
        return started

    def worker(self, *arguments: str, **environment: str) -> Running:
        """Start a worker and wait until it has its partitions."""
        running = self.start("worker", "orders.py", "--web-port", "0", *arguments, **environment)
        running.wait_for("assigned: ")
        return running

    def close(self) -> None:
        for started in self.running:
            if started.process.poll() is None:
                started.process.kill()
                started.process.wait()


@contextlib.contextmanager
def shell_in(folder: Path) -> Iterator[Shell]:
    shell = Shell(folder)
    shell.write("orders.py", APP)
    try:
        yield shell
    finally:
        shell.close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def get_until(url: str, pattern: str, *, status: int | None = None) -> str:
    """Ask until the answer has that in it, and that status where one is given."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        code, text = get(url)
        if re.search(pattern, text) and status in {None, code}:
            return text
        if time.monotonic() > deadline:
            raise AssertionError(f"{url} never answered {pattern!r} but:\n{text}")
        time.sleep(0.02)
