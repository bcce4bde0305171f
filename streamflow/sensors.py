"""Hooks the runtime calls as it works; every one is a no-op here and is called per batch, never per record.

`metrics.py` implements them for Prometheus. An implementation must not block, raise or await.
"""

from __future__ import annotations

from streamflow.model.record import TopicPartition


class Sensors:
    """No-op hooks; subclass and override what is of interest."""

    def batches_in(self, tp: TopicPartition, batches: int, size_bytes: int) -> None:
        """Whole batches arrived from the log."""

    def records_in(self, topic: str, records: int) -> None:
        """A task took a run of records from its input; each counts once, however many agents read it."""

    def records_processed(self, agent: str, topic: str, records: int, seconds: float) -> None:
        """An agent finished a run of records.

        Args:
            agent: Its name.
            topic: Source topic.
            records: How many, >= 1.
            seconds: Wall-clock time from taking the first to finishing the last.
        """

    def batch_out(self, topic: str, records: int, size_bytes: int) -> None:
        """A batch of outputs was handed to the log."""

    def committed(self, seconds: float, offsets: int) -> None:
        """A commit succeeded after `seconds`, moving that many partitions."""

    def commit_failed(self, reason: str) -> None:
        """A commit failed (`reason` is the error's class name)."""

    def record_error(self, agent: str, policy: str) -> None:
        """A record failed; `policy` is what was done: stop, skip, retry or dead_letter."""

    def restored(self, table: str, records: int) -> None:
        """A fetch of a table's changelog was restored."""

    def standby_applied(self, table: str, records: int) -> None:
        """A standby took records of a table's changelog into its store."""

    def foreign_key(self, table: str) -> None:
        """A sampled key of a table was written in a partition that is not its own."""

    def table_read(self, table: str, outcome: str) -> None:
        """A table was read over HTTP or by `get_remote`.

        Args:
            table: Its name.
            outcome: found, absent, unavailable, refused or failed.
        """

    def rebalanced(self, assigned: int, revoked: int, lost: int) -> None:
        """An assignment changed by that many partitions."""

    def loop_stalled(self, seconds: float) -> None:
        """The event loop was blocked for that long (measured every 100 ms; only stalls over 10 ms are told)."""
