"""Whether what a task's last commit stands for is what its tables are declared to be today.

It is looked at before the local store is opened: a start that is refused leaves the store as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamflow.errors import TopologyError
from streamflow.runtime.commit_mark import CommitMark, letters_of, refuse_other_serializers
from streamflow.state.identity import TableIdentity

_SHOWN_ID = 8


def incarnation_of(identity: TableIdentity) -> str:
    """The changelog's, as `CommitMark.incarnations` has it."""
    return identity.topic_id[:_SHOWN_ID]


def serializer_of(identity: TableIdentity) -> str:
    """The table's, as `CommitMark.serializers` has it."""
    return letters_of(identity.value_serializer, identity.key_serializer)


def check_mark_of(task: str, mark: CommitMark, tables: Mapping[str, TableIdentity]) -> None:
    """Refuse what the committed offsets do not go with.

    Args:
        task: The task's name.
        mark: What its last commit says.
        tables: Its tables that have changelogs, as they are today.

    Raises:
        TopologyError: A changelog was made anew, or is written by another serializer.
    """
    for name, identity in tables.items():
        _refuse_other_changelog(task, mark, name, identity)
    serializers = {name: serializer_of(identity) for name, identity in tables.items()}
    refuse_other_serializers(f"task {task}", serializers, mark)


def _refuse_other_changelog(task: str, mark: CommitMark, name: str, identity: TableIdentity) -> None:
    """The committed offset stands for values that are gone: to go on would count from nothing in the middle."""
    topic_id = incarnation_of(identity)
    before = mark.incarnations.get(name, topic_id)
    if before != topic_id:
        raise TopologyError(
            f"task {task}: the changelog {identity.changelog!r} of table {name!r} was deleted and made anew since the "
            f"last commit (topic id {before}..., now {topic_id}...), so the values that the committed offsets stand "
            "for are gone. Start over with `streamflow reset APP`, or restore the topic's records from a backup and "
            "import them: `streamflow reset APP`, then `streamflow table import`"
        )
