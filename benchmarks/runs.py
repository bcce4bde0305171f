"""What every run of a peer has of its own: topics, application id, data directory, log."""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from benchmarks import topics
from benchmarks.peers import Peer
from benchmarks.process import Program
from benchmarks.settings import PARTITIONS, bench_home


class Run:
    """Fresh names for one run; leaving the `with` block removes the topics and the data, and keeps the log.

    Args:
        peer: Who runs.
        bootstrap: The broker.
        mode: The work.
        source: The topic that is read; a fresh, empty one by default.
        partitions: Of the topics that are made for it.
        settings: More for the program's environment.
    """

    def __init__(
        self,
        peer: Peer,
        bootstrap: str,
        mode: str,
        *,
        source: str | None = None,
        partitions: int = PARTITIONS,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        identity = uuid.uuid4().hex[:8]
        self._peer = peer
        self._bootstrap = bootstrap
        self._data = bench_home() / "data" / identity
        self._logs = bench_home() / "logs"
        self._identity = identity
        self._partitions = partitions
        self.app_id = f"bench-{identity}"
        self.out = f"out-{identity}"
        self.source = source or f"in-{identity}"
        self._own = [self.out] if source else [self.out, self.source]
        self._environment = {
            "BOOTSTRAP": bootstrap,
            "IN": self.source,
            "OUT": self.out,
            "MODE": mode,
            "APPID": self.app_id,
            "PARTITIONS": str(partitions),
            **(settings or {}),
        }

    def program(self, worker: int = 0) -> Program:
        """One of its workers; each has data and a log of its own, which it finds again when it is started anew."""
        data = self._data / str(worker)
        data.mkdir(exist_ok=True)
        return Program(self._peer.command(), {**self._environment, "DATADIR": str(data)}, self.log(worker))

    def log(self, worker: int = 0) -> Path:
        """What a worker prints."""
        return self._logs / f"{self._identity}-{worker}.log"

    def __enter__(self) -> "Run":
        self._data.mkdir(parents=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        topics.create(self._bootstrap, *self._own, partitions=self._partitions)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._data, ignore_errors=True)
        topics.delete(self._bootstrap, *self._own)
