"""Child processes that hold slots and write stores until a test kills them."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from streamflow.state import slots
from streamflow.state.identity import Identity, TableIdentity
from streamflow.state.memory import MemoryStores
from streamflow.state.rocksdb import RocksStores
from streamflow.state.store import Checkpoint, StoreBatch

ROOT = Path(__file__).parents[2]
BUDGET = 32 * 1024 * 1024
BATCH = 400
KEYS = 1000


def table(**changed) -> TableIdentity:
    fields = {
        "changelog": "app-x-changelog",
        "topic_id": "id-1",
        "key_order": "str",
        "key_serializer": "str",
        "value_serializer": "json",
    }
    return TableIdentity(**fields | changed)


def identity(*tables: str, **changed) -> Identity:
    fields = {"app": "app", "task": "total", "partition": 0, "tables": {name: table() for name in tables or ("x", "y")}}
    return Identity(**fields | changed)


class Child:
    """A process running a function of this module; it is killed at the end of the block, if not before."""

    def __init__(self, what: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.state.processes", what, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> list[str]:
        """Kill it, and give what it had said that was not read."""
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        return [line.strip() for line in self._process.stdout if line.endswith("\n")]

    def wait(self) -> None:
        """Wait for it to end by itself."""
        self._process.wait(20)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def line(self) -> str:
        said = self._process.stdout.readline().strip()
        assert said, f"the child ended with {self._process.wait()}"
        return said

    def tell(self, text: str) -> None:
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def hold(data_dir: str, *tasks: str) -> None:
    """Claims a slot when told to, says its number and id, adopts tasks and says which, and keeps all until killed."""
    say("ready")
    sys.stdin.readline()
    slot = slots.claim(data_dir, "app")
    say(f"{slot.number} {slot.id}")
    stores = RocksStores(BUDGET)
    say(" ".join(task for task in tasks if slot.adopt(task, stores)) or "nothing")
    sys.stdin.readline()


def fork(data_dir: str) -> None:
    """Claims a slot, forks, and ends; the forked child lives on."""
    slot = slots.claim(data_dir, "app")
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begins, b"!")
        sys.stdin.readline()
        os._exit(0)
    os.read(begun, 1)  # what runs in a child after a fork has run
    say(f"{slot.number} {child}")
    os.kill(os.getpid(), signal.SIGKILL)


def open_store(path: str) -> None:
    store = RocksStores(BUDGET).open(path, identity())
    say("open")
    sys.stdin.readline()
    store.close()


def write(path: str, seed: str) -> None:
    """Writes batch after batch; says each one's number when it is written, and flushes now and then.

    Batch n sets a random half of all keys of both tables to n, and deletes some of the others.
    """
    stores = RocksStores(BUDGET)
    store = stores.open(path, identity())
    chance = random.Random(seed)
    number = store.checkpoint.inputs.get("in", 0)
    while True:
        number += 1
        store.write(numbered_batch(number))
        say(number)
        if chance.random() < 0.05:
            store.flush()


def write_some(path: str, count: str) -> None:
    """Writes so many batches, flushes none, and stays until killed: all of it is in one write-ahead log."""
    store = RocksStores(BUDGET).open(path, identity())
    for number in range(1, int(count) + 1):
        store.write(numbered_batch(number))
    say("written")
    sys.stdin.readline()


LARGE = 6000


def write_large(path: str) -> None:
    """Writes batches that go in slices; batch n sets every key to n."""
    store = RocksStores(BUDGET).open(path, identity())
    number = store.checkpoint.inputs.get("in", 0)
    while True:
        number += 1
        batch = StoreBatch(Checkpoint({"x": number}, {"in": number}))
        batch.changes["x"] = {b"%05d" % key: b"%d" % number for key in range(LARGE)}
        say(f"from {number}")
        store.write(batch)
        say(number)


def numbered_batch(number: int) -> StoreBatch:
    batch = StoreBatch(Checkpoint({"x": number, "y": number}, {"in": number}, f"commit-{number}", number))
    chance = random.Random(number)
    for name in ("x", "y"):
        for key in chance.sample(range(KEYS), BATCH // 2):
            if chance.random() < 0.2:
                batch.delete(name, b"%05d" % key)
            else:
                batch.put(name, b"%05d" % key, b"%d" % number)
    return batch


def expected(number: int) -> dict[str, dict[bytes, bytes]]:
    """What a store holds after that many batches."""
    store = MemoryStores().open("expected", identity())
    for one in range(1, number + 1):
        store.write(numbered_batch(one))
    return {name: dict(store.scan(name)) for name in ("x", "y")}


if __name__ == "__main__":
    children = {
        "hold": hold,
        "fork": fork,
        "open": open_store,
        "write": write,
        "write_some": write_some,
        "write_large": write_large,
    }
    children[sys.argv[1]](*sys.argv[2:])
