"""Changelogs at start: what is made, and what is refused before the group is joined."""

from typing import Any

import anyio
import pytest

import streamflow as sf
from streamflow.errors import TopologyError
from streamflow.log.api import NewTopic, TopicDescription
from streamflow.runtime.changelogs import new_changelogs, stale_after_ms
from tests.runtime.machine import Machine

DAY_MS = 86_400_000


def app_over(*topics: tuple[str, dict[str, Any]]) -> sf.App:
    """An app whose one table is filled from topics."""
    app = sf.App("shop")
    totals = app.table("totals", key_type=str, value_type=int)

    def add(_: int) -> None:
        """Nothing runs here."""

    for name, of in topics:
        app.agent(app.topic(name, key_type=str, value_type=int, **of), name=f"of-{name}", tables=[totals])(add)
    return app


def made(app: sf.App, counts: dict[str, int], **existing: TopicDescription) -> list[NewTopic]:
    found = {topic.name: topic for topic in existing.values()}
    return new_changelogs(app, app.topology(), counts, found, -1)


def test_a_changelog_is_made_with_its_sources_partition_count_and_keeps_what_a_restore_needs() -> None:
    counts = {"orders": 7}
    (new,) = made(app_over(("orders", {})), counts)
    assert (new.name, new.partitions) == ("shop-totals-changelog", 7)
    assert new.config == {
        "cleanup.policy": "compact",
        "delete.retention.ms": str(7 * DAY_MS),
        "min.compaction.lag.ms": str(DAY_MS),
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(2**63 - 1),
    }
    assert counts["shop-totals-changelog"] == 7


def described(partitions: int = 4, **config: str) -> TopicDescription:
    given = {name.replace("_", "."): value for name, value in config.items()}
    return TopicDescription("shop-totals-changelog", partitions, {"cleanup.policy": "compact", **given})


def test_one_that_fits_is_left_as_it_is() -> None:
    assert made(app_over(("orders", {})), {"orders": 4}, found=described()) == []


def test_another_partition_count_than_the_sources_is_refused_with_the_choices() -> None:
    with pytest.raises(TopologyError) as caught:
        made(app_over(("orders", {})), {"orders": 8}, found=described(4))
    text = str(caught.value)
    assert "'shop-totals-changelog' of table 'totals' has 4 partitions, and its source 'orders' has 8" in text
    assert "Give the source its old count back, or start the table over" in text


@pytest.mark.parametrize("policy", ["delete", "compact,delete"])
def test_one_that_forgets_values_with_time_is_refused(policy: str) -> None:
    with pytest.raises(TopologyError, match=f"cleanup.policy={policy}: old values would be deleted with time"):
        made(app_over(("orders", {})), {"orders": 4}, found=described(cleanup_policy=policy))


@pytest.mark.parametrize(
    ("others", "counts", "what"),
    [
        ({}, {"orders": 4, "refunds": 5}, r"partition counts differ \(4 and 5\)"),
        ({"key_serializer": "json"}, {"orders": 4, "refunds": 4}, "key serializers differ"),
        ({"partitioner": lambda key, count: 0}, {"orders": 4, "refunds": 4}, "partitioners differ"),
    ],
    ids=["counts", "keys", "partitioners"],
)
def test_sources_that_are_not_partitioned_alike_are_refused(
    others: dict[str, Any], counts: dict[str, int], what: str
) -> None:
    with pytest.raises(TopologyError, match=what):
        made(app_over(("orders", {}), ("refunds", others)), counts)


def test_a_store_is_stale_after_half_of_what_the_changelog_keeps_deletions_for() -> None:
    assert stale_after_ms(described(delete_retention_ms="1000")) == 500
    assert stale_after_ms(described()) == DAY_MS // 2  # Kafka's default is a day


async def test_what_is_made_is_what_was_asked_for() -> None:
    async with Machine(app_over(("orders", {"partitions": 3}))) as machine:
        await machine.start()
        found = (await machine.log.admin.describe(["shop-totals-changelog"]))["shop-totals-changelog"]
        assert found.partitions == 3
        assert found.config["cleanup.policy"] == "compact"
        assert found.config["min.compaction.lag.ms"] == str(DAY_MS)
        assert stale_after_ms(found) == 7 * DAY_MS // 2


async def test_a_changelog_that_does_not_fit_stops_the_start_before_the_group_is_joined() -> None:
    async with Machine(app_over(("orders", {"partitions": 3}))) as machine:
        await machine.log.admin.delete(["shop-totals-changelog"])
        await machine.log.admin.create([NewTopic("shop-totals-changelog", 2, config={"cleanup.policy": "compact"})])
        running = await machine.start()
        with anyio.fail_after(10):
            await running.ended.wait()
        machine.workers.clear()
        assert isinstance(running.error, TopologyError)
        assert running.worker.group is None
