"""`App`: declarations, their settings, and the three ways to put them to work (`main`, `running`, `client`).

An `App` is a description. It holds no loop, socket or thread, so that importing it is cheap and has no effect.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Never

from streamflow import config
from streamflow.config import Compression, Guarantee, LogFormat, LogLevel, OffsetReset, Settings
from streamflow.hosting import hosted, settings_of
from streamflow.processing.declarations import Declarations

if TYPE_CHECKING:
    from streamflow.log.kafka.options import Kafka
    from streamflow.runtime.client import Client
    from streamflow.runtime.worker import Worker


class App(Declarations):
    """A stream-processing application: its topics, agents, timers and settings.

    Every setting is also the variable `STREAMFLOW_<NAME>`, the flag `--<name>` of `streamflow worker` and a key of
    `[tool.streamflow]` in pyproject.toml; the flag is strongest, then the variable, then what stands here.
    docs/settings.md says what each one does, with its default and range. None means "not given".

    Args:
        id: Name of the app: its consumer group, and the prefix of its internal topics.
        broker: Where the log is: `sqlite:///PATH`, `memory://`, `kafka://HOST:PORT[,HOST:PORT]` or `sf.Kafka(...)`.
        data_dir: Folder of the embedded log and of local state.
        processing_guarantee: Unset for exactly_once, which every log offers.
        commit_interval_ms: Milliseconds between commits.
        auto_offset_reset: Where a partition starts that has no committed offset.
        partitions: Partitions of topics that StreamFlow creates.
        replication: Replicas of topics that StreamFlow creates; -1 leaves it to the broker.
        standby_replicas: Warm copies of each table partition in other workers.
        max_warmup_replicas: Copies at a time that are made only so that a task with tables can move.
        acceptable_lag_records: Records a copy may be behind and still take the task over at once.
        rack: Where the worker runs: warm copies lie in other racks where they can.
        capacity: The worker's share of the tasks beside the others'.
        instance_id: A name of the worker's own that outlives it.
        memory_budget_bytes: Memory for output that is not yet sent or committed.
        web: Whether the worker serves HTTP.
        web_host: Address the web server listens on.
        web_port: Port of the web server; one that is given and taken is refused.
        serve_tables: Whether the web server answers reads of tables.
        advertised_url: Where other workers reach this one's web server.
        log_level: Least severity that is logged.
        log_format: How log lines look.
        session_timeout_ms: Silence of a worker after which the others take its partitions over.
        heartbeat_interval_ms: Milliseconds between heartbeats.
        rebalance_timeout_ms: How long a rebalance waits for a worker to hand its partitions over.
        max_poll_interval_ms: How long one record may take before the worker gives its partitions up.
        shutdown_timeout_s: Seconds a stopping worker may take to finish its records and commit.
        start_timeout_s: Seconds a starting worker waits for a log that does not answer.
        linger_ms: How long an output may wait for others to share its batch.
        compression: Compression of the batches written.
        max_task_idle_ms: How long a task with several inputs waits for an empty one.

    Raises:
        ConfigurationError: A setting that does not exist; the message names the nearest one.
    """

    def __init__(
        self,
        id: str,
        *,
        broker: str | Kafka | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        processing_guarantee: Guarantee | None = None,
        commit_interval_ms: int | None = None,
        auto_offset_reset: OffsetReset | None = None,
        partitions: int | None = None,
        replication: int | None = None,
        standby_replicas: int | None = None,
        max_warmup_replicas: int | None = None,
        acceptable_lag_records: int | None = None,
        rack: str | None = None,
        capacity: int | None = None,
        instance_id: str | None = None,
        memory_budget_bytes: int | None = None,
        web: bool | None = None,
        web_host: str | None = None,
        web_port: int | None = None,
        serve_tables: bool | None = None,
        advertised_url: str | None = None,
        log_level: LogLevel | None = None,
        log_format: LogFormat | None = None,
        session_timeout_ms: int | None = None,
        heartbeat_interval_ms: int | None = None,
        rebalance_timeout_ms: int | None = None,
        max_poll_interval_ms: int | None = None,
        shutdown_timeout_s: float | None = None,
        start_timeout_s: float | None = None,
        linger_ms: int | None = None,
        compression: Compression | None = None,
        max_task_idle_ms: int | None = None,
        # Never: a type checker refuses an unknown keyword, and at run time the message can name the nearest one.
        **unknown: Never,
    ) -> None:
        given = locals()
        super().__init__(id)
        config.check_names(unknown, "App(...) has no setting {!r}")
        self.options: Mapping[str, object] = {name: given[name] for name in config.TABLE if given[name] is not None}
        self.origin = _defined_in(self, sys._getframe(1))

    def settings(
        self,
        overrides: Mapping[str, object] | None = None,
        *,
        warn: Callable[[str], None] = config.logger.warning,
    ) -> Settings:
        """Resolve the settings as a worker of this app would: environment, `App(...)`, pyproject.toml, defaults.

        Args:
            overrides: Stronger than all of them, by setting name.
            warn: Told of unknown `STREAMFLOW_*` variables.

        Raises:
            ConfigurationError: A value does not fit; the message says where it was given.
        """
        return settings_of(self.options, origin=self.origin, flags=overrides or {}, environ=os.environ, warn=warn)

    def main(self) -> None:
        """Make this script the command line: `python orders.py worker` is `streamflow worker orders.py`.

        It ends the process with the command's exit code, except while `streamflow COMMAND orders.py` imports the
        script: then it does nothing.
        """
        from streamflow.cli.load import loading

        if not loading:
            from streamflow.cli.main import main_of

            main_of(self, self.origin)

    @asynccontextmanager
    async def running(self, **overrides: Any) -> AsyncGenerator[Worker]:
        """Host a worker inside another program, for example in a FastAPI lifespan.

        Enters once the worker has its first assignment, its tables are restored and its agents run. Beside workers that
        hold all partitions it enters without any; after a crash it waits for partitions of a member that may be dead,
        until that is heard of or its session ends (`session_timeout_ms`), and logs that it does. Leaving stops it
        cleanly (records finished, committed, group left) within `shutdown_timeout_s`, also when the block raises or is
        cancelled. If the worker fails, the block is cancelled and the worker's error comes out of it. No signal handler
        is installed and logging is left alone; the web server runs only where `web=True` is given here.

        Args:
            **overrides: Settings, stronger than all other sources.

        Returns:
            The worker; `status()` says how it does.

        Raises:
            RefusedError: The worker will not start like this, or the app runs in this process already.
            StreamFlowError: It failed. Where the block fails, too, its own error comes out, and the worker's is a note
                of it (`__notes__`).
        """
        async with hosted(self, self.settings(overrides), web=overrides.get("web") is True) as worker:
            yield worker

    def client(self, **overrides: Any) -> Client:
        """A client that only produces and asks: `async with app.client() as c: await c.send("orders", value=...)`.

        Args:
            **overrides: Settings, stronger than all other sources.
        """
        from streamflow.runtime.client import Client

        return Client(self, self.settings(overrides))


def _defined_in(app: App, frame: FrameType | None) -> Path:
    """The file whose code made the app, or the current folder where there is none (an interactive session)."""
    while frame is not None and frame.f_locals.get("self") is app:  # a subclass's constructor
        frame = frame.f_back
    file = frame.f_globals.get("__file__") if frame is not None else None
    return Path(file).resolve() if file else Path.cwd()
