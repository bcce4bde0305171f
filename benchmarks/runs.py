"""What every run of a peer has of its own: topics, application id, data directory, log."""

import shutil
import uuid
from types import TracebackType

from benchmarks import topics
from benchmarks.peers import Peer
from benchmarks.process import Program
from benchmarks.settings import bench_home


class Run:
    """Fresh names for one run; leaving the `with` block removes the topics and the data, and keeps the log.

    Args:
        peer: Who runs.
        bootstrap: The broker.
        mode: The work.
        source: The topic that is read; a fresh, empty one by default.
    """

    def __init__(self, peer: Peer, bootstrap: str, mode: str, *, source: str | None = None) -> None:
        identity = uuid.uuid4().hex[:8]
        self._peer = peer
        self._bootstrap = bootstrap
        self._data = bench_home() / "data" / identity
        self._log = bench_home() / "logs" / f"{identity}.log"
        self.out = f"out-{identity}"
        self.source = source or f"in-{identity}"
        self._own = [self.out] if source else [self.out, self.source]
        self._environment = {
            "BOOTSTRAP": bootstrap,
            "IN": self.source,
            "OUT": self.out,
            "MODE": mode,
            "APPID": f"bench-{identity}",
            "DATADIR": str(self._data),
        }

    def program(self) -> Program:
        return Program(self._peer.command(), self._environment, self._log)

    def __enter__(self) -> "Run":
        self._data.mkdir(parents=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        topics.create(self._bootstrap, *self._own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._data, ignore_errors=True)
        topics.delete(self._bootstrap, *self._own)
