"""What a commit's membership means today: the groups that this process is in know more than the commit does.

A commit names a generation in which its partitions were owned; the broker takes the current one only. So a partition
that was kept since is committed under the current generation, and one that was not is refused here, as the broker does
not look at partitions.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamflow.errors import StreamFlowError
from streamflow.log.api import Membership, OffsetMark
from streamflow.log.kafka.group import KafkaGroup, check_membership
from streamflow.model.record import TopicPartition


class Memberships:
    """The groups that are open in this process."""

    def __init__(self) -> None:
        self._groups: list[KafkaGroup] = []

    def add(self, group: KafkaGroup) -> None:
        """It was entered."""
        self._groups.append(group)

    def remove(self, group: KafkaGroup) -> None:
        """It was left."""
        self._groups.remove(group)

    def current(self, offsets: Mapping[TopicPartition, OffsetMark], membership: Membership) -> Membership:
        """The membership to send for these offsets; that of another process is sent as it is.

        Raises:
            TaskMigratedError: It owns one of them no more, or not without a break.
        """
        check_membership(membership)
        group = self._find(membership)
        return membership if group is None else group.current(offsets, membership)

    async def why_refused(
        self, told: set[int], offsets: Mapping[TopicPartition, OffsetMark], membership: Membership, sent: Membership
    ) -> StreamFlowError | None:
        """As `KafkaGroup.why_refused`; None for a membership of another process."""
        group = self._find(membership)
        return None if group is None else await group.why_refused(told, offsets, membership, sent)

    def _find(self, membership: Membership) -> KafkaGroup | None:
        return next((group for group in self._groups if group.is_of(membership)), None)
