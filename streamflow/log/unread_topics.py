"""Topics that nobody processes, as whoever has assigned last runs another version of the app: told once."""

from __future__ import annotations

import logging


class UnreadTopics:
    """What a member says of its own topics that nobody was given a partition of.

    Args:
        group_id: The group.
        logger: Where it is said.
    """

    def __init__(self, group_id: str, logger: logging.Logger) -> None:
        self._group_id = group_id
        self._logger = logger
        self._known: frozenset[str] = frozenset()

    def tell(self, topics: frozenset[str]) -> None:
        """Say what is new.

        Args:
            topics: Those that this member reads and nobody has now.
        """
        if topics - self._known:
            self._logger.warning(
                "group %s: nobody processes %s: the worker that leads the group runs another version of the app, which "
                "does not read %s as this one does. Their records wait until the workers of that version are gone",
                self._group_id,
                ", ".join(sorted(topics)),
                "it" if len(topics) == 1 else "them",
            )
        elif self._known and not topics:
            self._logger.info("group %s: %s is processed now", self._group_id, ", ".join(sorted(self._known)))
        self._known = topics
