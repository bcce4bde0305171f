"""What a store belongs to: written when it is made, compared when it is opened.

A store of another task, another app, another incarnation of a topic or another format holds values that mean something
else here. It is set aside, never read and never deleted: the changelogs hold the truth, and a person may want the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

FORMAT = 1
"""Number of the layout of a store's directory: column families, reserved keys, value format."""


class TableIdentity(msgspec.Struct, frozen=True):
    """What the stored bytes of one table mean.

    Args:
        changelog: Topic that the table is restored from; empty when it has none.
        topic_id: That topic's id, which changes when it is deleted and made again.
        key_order: `KeyOrder.name`: how keys are encoded in the store.
        key_serializer: Name of the serializer of its keys in the changelog.
        value_serializer: Name of the serializer of its values.
        format: Number of the value format (`state/format.py`).
        expiry: What its values expire by; empty where they live for ever.
    """

    changelog: str
    topic_id: str
    key_order: str
    key_serializer: str
    value_serializer: str
    format: int = 1
    expiry: str = ""


class Identity(msgspec.Struct, frozen=True):
    """What a store belongs to.

    Args:
        app: The app's id.
        task: Name of the task's sub-topology.
        partition: The task's partition.
        tables: Its tables, by name.
        format: Number of the store's layout.
    """

    app: str
    task: str
    partition: int
    tables: Mapping[str, TableIdentity]
    format: int = FORMAT


class Difference(msgspec.Struct, frozen=True):
    """Why a store does not fit.

    Args:
        reason: One word for directory names: `app`, `task`, `partition`, `format`, `newer`, `table`.
        text: What differs, for people.
    """

    reason: str
    text: str


def difference(stored: Identity, wanted: Identity) -> Difference | None:
    """Compare what is stored with what is wanted.

    Tables that only one of them has are no difference: a new table starts empty, one that is declared no more is
    dropped.

    Args:
        stored: What the store was made for.
        wanted: What it is opened for.

    Returns:
        The first thing that differs, None when the store fits.
    """
    if stored.format > wanted.format:
        return Difference("newer", f"a newer StreamFlow wrote it (format {stored.format}, known: {wanted.format})")
    if stored.format < wanted.format:
        return Difference("format", f"an older StreamFlow wrote it (format {stored.format}, now {wanted.format})")
    for field in ("app", "task", "partition"):
        before, now = getattr(stored, field), getattr(wanted, field)
        if before != now:
            return Difference(field, f"it belongs to {field} {before!r}, not to {now!r}")
    for name in sorted(stored.tables.keys() & wanted.tables.keys()):
        for field in TableIdentity.__struct_fields__:
            before, now = getattr(stored.tables[name], field), getattr(wanted.tables[name], field)
            if before != now:
                what = field.replace("_", " ")
                return Difference("table", f"the {what} of its table {name!r} was {before!r} and is now {now!r}")
    return None
