"""Topics that tables are filled from: they have to keep a value of every key for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamflow.errors import TopologyError
from streamflow.log.api import TopicDescription
from streamflow.processing.declarations import Declarations
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.table import Table
from streamflow.processing.topic import Topic


def check_table_sources(app: Declarations, existing: Mapping[str, TopicDescription]) -> None:
    """Check the sources of tables, as they are in the log, or as they are declared where they are to be created.

    Raises:
        TopologyError: One of them deletes values with time.
    """
    filled: list[tuple[Table[Any, Any] | GlobalTable[Any, Any], Topic[Any, Any] | None]] = [
        *((table, table.source) for table in app.tables.values()),
        *((table, table.source) for table in app.global_tables.values()),
    ]
    for table, source in filled:
        if source is not None:
            _check(table, source, existing.get(source.name))


def _check(
    table: Table[Any, Any] | GlobalTable[Any, Any],
    source: Topic[Any, Any],
    found: TopicDescription | None,
) -> None:
    if found is not None:
        if why := _deletes(found.config, unsaid="-1"):
            raise TopologyError(
                f"table {table.name!r} ({table.place}) is filled from topic {source.name!r}, which has {why}: values "
                "would be gone after a restore. Set its cleanup.policy to compact, or its retention.ms to -1"
            )
    elif why := _deletes(source.topic_config(), unsaid="604800000"):
        raise TopologyError(
            f"table {table.name!r} ({table.place}) is filled from topic {source.name!r} ({source.place}), which would "
            f"be created with {why}: values would be gone after a restore. Declare it with compacting=True"
        )


def _deletes(config: Mapping[str, str], *, unsaid: str) -> str:
    """How a topic deletes values, in words; empty where it does not.

    Args:
        config: Its configuration.
        unsaid: What `retention.ms` is where the configuration does not say.
    """
    policy = config.get("cleanup.policy", "delete")
    if "delete" not in policy:
        return ""
    for name, value in (
        ("retention.ms", config.get("retention.ms", unsaid)),
        ("retention.bytes", config.get("retention.bytes", "-1")),
    ):
        if int(value) >= 0:
            return f"cleanup.policy={policy} and {name}={value}"
    return ""
