"""What a member of the group has open of the log."""

from __future__ import annotations

from dataclasses import dataclass

from streamflow.log.api import Admin, Group, Reader
from streamflow.runtime.at_least_once import AtLeastOnce
from streamflow.runtime.exactly_once import ExactlyOnce


@dataclass(frozen=True, slots=True)
class OpenLog:
    """The parts of the log that a worker works with while it is a member.

    Attributes:
        group: The membership.
        reader: The source lane.
        admin: Offsets, topics, deletions.
        delivery: Writes outputs and commits.
    """

    group: Group
    reader: Reader
    admin: Admin
    delivery: AtLeastOnce | ExactlyOnce
