"""Where the keys of tables belong, and what is said of those that are written elsewhere."""

import logging
import operator
import struct

import msgspec
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
    return Homes({"source": source}, {"source": 4}, sensors, is_strict=is_strict), sub, table, sensors


async def _ignore(stream: sf.Stream[int]) -> None:
    async for _ in stream:
        pass


def test_where_it_is_strict_each_foreign_key_is_refused_and_its_home_named():
    one, sub, table, _ = homes(is_strict=True)
    home = partition_for(b"a", 4)
    one.check(sub, home, table, "a", b"a")
    with pytest.raises(sf.ProductionError, match=rf"'a' belongs to partition {home}.*group_by") as raised:
        one.check(sub, (home + 1) % 4, table, "a", b"a")
    assert "partition_by" not in str(raised.value)


def test_elsewhere_the_first_keys_and_a_sample_of_the_rest_are_counted_and_told_once(caplog):
    one, sub, table, sensors = homes(is_strict=False)
    foreign = (partition_for(b"a", 4) + 1) % 4
    with caplog.at_level(logging.WARNING, "streamflow.tables"):
        for _ in range(640):
            one.check(sub, foreign, table, "a", b"a")
    assert sensors.foreign == ["counts"] * (64 + 9)
    (told,) = caplog.records
    assert "group_by" in told.getMessage()


def test_the_sources_own_partitioner_decides():
    one, sub, table, _ = homes(is_strict=True, partitioner=lambda key, count: 2)
    assert one.of(sub, table, "whatever") == 2
    one.check(sub, 2, table, "whatever", b"whatever")


# --- partition_by ---------------------------------------------------------------------------------------------------


class Visit(msgspec.Struct, frozen=True):
    """A key of several parts."""

    user: str
    day: int


def tuple_homes(*, is_strict: bool = True, source_type=str, kind="table", **options):
    app = sf.App("t")
    source = app.topic("source", key_type=source_type, value_type=int)
    if kind == "table":
        made = table = app.table("visits", **{"key_type": tuple[str, int], "value_type": int, **options})
    else:
        made = app.set_table("visits", **{"key_type": tuple[str, int], "member_type": str, **options})
        table = made.pairs
    app.agent(source, tables=[made])(_ignore)
    (sub,) = app.topology().sub_topologies
    return Homes({"source": source}, {"source": 4}, Counting(), is_strict=is_strict), sub, table


def check(one, sub, partition, table, key):
    one.check(sub, partition, table, key, table.key_codec.encode(key))


def test_partition_by_gives_the_record_key_that_decides():
    one, sub, table = tuple_homes(partition_by=lambda key: key[0])
    home = partition_for(b"ann", 4)
    for day in range(20):
        assert one.of(sub, table, ("ann", day)) == home
        check(one, sub, home, table, ("ann", day))
    with pytest.raises(sf.ProductionError, match=rf"\('ann', 1\) belongs to partition {home}.*the key 'ann'"):
        check(one, sub, (home + 1) % 4, table, ("ann", 1))


def test_it_is_written_as_the_source_writes_its_keys():
    one, sub, table = tuple_homes(source_type=int, key_type=tuple[str, int], partition_by=lambda key: key[1])
    assert one.of(sub, table, ("ann", 7)) == partition_for(struct.pack(">q", 7), 4)


def test_a_set_tables_partition_by_takes_the_key_and_not_the_pair():
    one, sub, table = tuple_homes(kind="set", partition_by=lambda key: key[0])
    assert one.of(sub, table, (("ann", 7), "member")) == partition_for(b"ann", 4)
    check(one, sub, partition_for(b"ann", 4), table, (("ann", 7), "member"))


@pytest.mark.parametrize(
    ("key_type", "key", "advice"),
    [
        (tuple[str, int], ("ann", 1), "`partition_by=lambda key: key[0]`"),
        (Visit, Visit("ann", 1), "`partition_by=lambda key: key.user`"),
    ],
)
def test_where_a_key_has_several_parts_the_error_names_partition_by_as_well(key_type, key, advice):
    one, sub, table = tuple_homes(key_type=key_type)
    foreign = (one.of(sub, table, key) + 1) % 4
    with pytest.raises(sf.ProductionError, match="group_by") as raised:
        check(one, sub, foreign, table, key)
    assert advice in str(raised.value)


def test_so_it_does_for_a_set_table():
    one, sub, table = tuple_homes(kind="set")
    pair = (("ann", 1), "member")
    with pytest.raises(sf.ProductionError, match=r"partition_by=lambda key: key\[0\]"):
        check(one, sub, (one.of(sub, table, pair) + 1) % 4, table, pair)


def raising(key):
    raise LookupError("nobody")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda key: key[1], r"gives int 1 for the key \('ann', 1\), and the keys of topic 'source'.*are str"),
        (lambda key: None, r"gives None None for the key \('ann', 1\).*null keys"),
        (raising, r"partition_by= raised LookupError for the key \('ann', 1\): nobody"),
        (lambda key: key[7], r"partition_by= raised IndexError for the key \('ann', 1\)"),
    ],
)
@pytest.mark.parametrize("is_strict", [True, False])
def test_what_partition_by_must_not_do_names_table_and_key(function, says, is_strict):
    one, sub, table = tuple_homes(is_strict=is_strict, partition_by=function)
    for ask in (lambda: one.of(sub, table, ("ann", 1)), lambda: check(one, sub, 0, table, ("ann", 1))):
        with pytest.raises(sf.ProductionError, match=says) as raised:
            ask()
        assert "table 'visits'" in str(raised.value)


def test_what_stands_inside_of_the_sources_keys_is_looked_at_too():
    one, sub, table = tuple_homes(source_type=tuple[str, str], partition_by=lambda key: key)
    with pytest.raises(sf.ProductionError, match=r"gives tuple \('ann', 1\).*are tuple\[str, str\]"):
        one.of(sub, table, ("ann", 1))


def test_a_key_of_another_type_is_refused_before_partition_by_sees_it():
    one, sub, table = tuple_homes(partition_by=lambda key: key[0])
    with pytest.raises(sf.ProductionError, match=r"takes tuple\[str, int\], not str 'ann'"):
        one.of(sub, table, "ann")


async def _async(key):
    return key


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("user", "is no function"),
        (str, "is no function"),
        (_async, "cannot be async"),
        (lambda: "a", "does not take one argument"),
        (lambda one, two: one, "does not take one argument"),
    ],
)
def test_what_is_no_function_of_a_key_is_refused_at_once(given, says):
    app = sf.App("t")
    with pytest.raises(sf.ConfigurationError, match=says) as raised:
        app.table("visits", key_type=tuple[str, int], value_type=int, partition_by=given)
    assert "test_homes.py" in str(raised.value)
    with pytest.raises(sf.ConfigurationError, match=says):
        app.set_table("seen", key_type=tuple[str, int], member_type=int, partition_by=given)


def test_functions_that_say_nothing_of_their_arguments_will_do():
    one, sub, table = tuple_homes(partition_by=operator.itemgetter(0))
    assert one.of(sub, table, ("ann", 1)) == partition_for(b"ann", 4)


def test_another_partition_by_is_another_declaration():
    app, first = sf.App("t"), operator.itemgetter(0)
    types = {"key_type": tuple[str, int], "value_type": int}
    table = app.table("visits", **types, partition_by=first)
    assert app.table("visits", **types, partition_by=first) is table
    with pytest.raises(sf.TopologyError, match="declared twice, with another partition_by="):
        app.table("visits", **types)
    tags = app.set_table("tags", key_type=tuple[str, int], member_type=str, partition_by=first)
    assert app.set_table("tags", key_type=tuple[str, int], member_type=str, partition_by=first) is tags
    with pytest.raises(sf.TopologyError, match="another partition_by="):
        app.set_table("tags", key_type=tuple[str, int], member_type=str)


def test_a_table_that_a_topic_fills_lies_where_the_topic_does():
    app = sf.App("t")
    source = app.topic("source", key_type=tuple[str, int], value_type=int, compacting=True)
    with pytest.raises(sf.ConfigurationError, match=r"partition_by= is for tables that agents write.*'source'"):
        app.table("visits", source=source, partition_by=lambda key: key[0])
