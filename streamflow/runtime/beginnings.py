"""Where partitions begin that have no committed offset: the one answer that workers, bounded runs and imports give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamflow.config import Settings
from streamflow.log.api import Admin
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations


async def beginnings(
    admin: Admin,
    app: Declarations,
    settings: Settings,
    partitions: Sequence[TopicPartition],
    is_new: Callable[[TopicPartition], bool] = lambda _: False,
) -> dict[TopicPartition, int]:
    """Where to begin, as `auto_offset_reset` says; internal topics are read as a whole, since the app writes them.

    Args:
        admin: For offsets.
        app: The app.
        settings: Its settings.
        partitions: Source partitions, all without a committed offset.
        is_new: Whether a partition was added while the app ran, so that all of it came since.

    Raises:
        RetriableError: The log does not answer.
    """
    topics = app.every_topic()
    from_start = [
        tp for tp in partitions if settings.auto_offset_reset == "earliest" or topics[tp.topic].internal or is_new(tp)
    ]
    from_end = list(set(partitions).difference(from_start))
    found = dict(await admin.start_offsets(from_start)) if from_start else {}
    if from_end:
        found.update(await admin.end_offsets(from_end))
    return found
