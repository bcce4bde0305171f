"""Where partitions without a committed offset begin."""

from typing import Any, cast

import pytest

import streamflow as sf
from streamflow.log.api import Admin
from streamflow.model.record import TopicPartition
from streamflow.runtime.beginnings import beginnings

APP = sf.App("begins")
NUMBERS = APP.topic("numbers", key_type=str, value_type=int)


@APP.agent(NUMBERS.group_by(lambda number: str(number), name="by-number", key_type=str))
async def look(_: int) -> None: ...


OLD, NEW = TopicPartition("numbers", 0), TopicPartition("numbers", 4)
INTERNAL = TopicPartition("begins-by-number-repartition", 0)


class FakeAdmin:
    """Every partition begins at 3 and ends at 9."""

    async def start_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        assert partitions, "a question about nothing"
        return dict.fromkeys(partitions, 3)

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        assert partitions, "a question about nothing"
        return dict.fromkeys(partitions, 9)


@pytest.mark.parametrize(
    ("reset", "asked", "found"),
    [
        ("earliest", [OLD, NEW, INTERNAL], {OLD: 3, NEW: 3, INTERNAL: 3}),
        ("latest", [OLD, NEW, INTERNAL], {OLD: 9, NEW: 3, INTERNAL: 3}),
        ("latest", [NEW], {NEW: 3}),
        ("latest", [OLD], {OLD: 9}),
        ("latest", [], {}),
    ],
)
async def test_what_others_wrote_before_the_app_came_is_passed_over_where_that_is_wanted(
    reset: str, asked: list[TopicPartition], found: dict[TopicPartition, int]
) -> None:
    admin, settings = cast(Admin, FakeAdmin()), APP.settings(cast(Any, {"auto_offset_reset": reset}))
    assert await beginnings(admin, APP, settings, asked, lambda tp: tp == NEW) == found
