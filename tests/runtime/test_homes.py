"""Where the keys of tables belong, and what is said of those that are written elsewhere."""

import logging

import pytest

import streamflow as sf
from streamflow.model.partitioner import partition_for
from streamflow.runtime.homes import Homes
from streamflow.sensors import Sensors


class Counting(Sensors):
    """Counts keys of other partitions."""

    def __init__(self) -> None:
        self.foreign: list[str] = []

    def foreign_key(self, table: str) -> None:
        self.foreign.append(table)


def homes(*, is_strict: bool, partitioner=None):
    app = sf.App("t")
    source = app.topic("source", key_type=str, value_type=int, partitioner=partitioner)
    table = app.table("counts", key_type=str, value_type=int)
    app.agent(source, tables=[table])(_ignore)
    sensors = Counting()
    (sub,) = app.topology().sub_topologies
    return Homes({"source": source}, {"source": 4}, sensors, is_strict=is_strict), sub, sensors


async def _ignore(stream: sf.Stream[int]) -> None:
    async for _ in stream:
        pass


def test_where_it_is_strict_each_foreign_key_is_refused_and_its_home_named():
    one, sub, _ = homes(is_strict=True)
    home = partition_for(b"a", 4)
    one.check(sub, home, "counts", b"a", "a")
    with pytest.raises(sf.ProductionError, match=rf"'a' belongs to partition {home}.*group_by"):
        one.check(sub, (home + 1) % 4, "counts", b"a", "a")


def test_elsewhere_a_sample_is_counted_and_told_once(caplog):
    one, sub, sensors = homes(is_strict=False)
    foreign = (partition_for(b"a", 4) + 1) % 4
    with caplog.at_level(logging.WARNING, "streamflow.tables"):
        for _ in range(640):
            one.check(sub, foreign, "counts", b"a", "a")
    assert sensors.foreign == ["counts"] * 10
    (told,) = caplog.records
    assert "group_by" in told.getMessage()


def test_the_sources_own_partitioner_decides():
    one, sub, _ = homes(is_strict=True, partitioner=lambda key, count: 2)
    assert one.of(sub, b"whatever") == 2
    one.check(sub, 2, "counts", b"whatever", "whatever")
