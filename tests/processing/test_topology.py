import dataclasses
import json
from collections.abc import AsyncIterator

import msgspec
import pytest

from streamflow.errors import TopologyError
from streamflow.processing.declarations import Declarations
from streamflow.processing.policy import DeadLetter, Retry
from streamflow.processing.stream import Stream
from streamflow.processing.topology import Edge, SubTopology


class Order(msgspec.Struct):
    user: str
    country: str


class Total(msgspec.Struct):
    user: str


def shop():
    app = Declarations("shop")
    orders = app.topic("orders", key_type=str, value_type=Order, partitions=3)
    totals = app.topic("totals", key_type=str, value_type=Total)
    audit = app.topic("audit")
    dead = app.topic("dead")
    app.topic("alone", value_type=dict[str, int])

    @app.agent(orders, sink=totals, on_error=Retry(2, then=DeadLetter(dead)), concurrency=2)
    async def total(stream: Stream[Order]) -> AsyncIterator[Total]:
        async for order in stream:
            await audit.send(value=b"")
            totals.send_nowait()
            yield Total(order.user)

    @app.agent(orders.group_by("country"))
    async def countries(order: Order) -> None:
        await total.cast(order)

    @app.agent(orders, thread=True)
    def log(order: Order) -> None: ...

    @app.timer(10)
    async def tick():
        await total.cast(Order("a", "b"))

    @app.crontab("0 20 * * *", timezone="Europe/Berlin", on_leader=True)
    async def evening():
        audit.send_nowait()

    @app.task
    async def once(): ...

    return app


def test_edges_say_where_records_go():
    edges = shop().topology().edges
    repartition = "topic:shop-orders-by-country-repartition"
    assert set(edges) == {
        Edge("topic:orders", "step:orders-by-country", "reads"),
        Edge("step:orders-by-country", repartition, "repartitions"),
        Edge("topic:orders", "agent:total", "reads"),
        Edge("agent:total", "topic:totals", "sinks"),
        Edge("agent:total", "topic:audit", "sends"),
        Edge("agent:total", "topic:dead", "dead_letters"),
        Edge(repartition, "agent:countries", "reads"),
        Edge("agent:countries", "topic:orders", "sends"),
        Edge("topic:orders", "agent:log", "reads"),
        Edge("timer:tick", "topic:orders", "sends"),
        Edge("crontab:evening", "topic:audit", "sends"),
    }
    assert len(edges) == len(set(edges))


def test_nodes_are_frozen_and_found_by_id():
    topology = shop().topology()
    assert [node.name for node in topology.agents] == ["countries", "log", "total"]
    assert [node.id for node in topology.jobs] == ["crontab:evening", "task:once", "timer:tick"]
    assert [(node.name, node.kind) for node in topology.steps] == [("orders-by-country", "group_by")]
    orders, total = topology.node("topic:orders"), topology.node("agent:total")
    assert (orders.key_type, orders.value_type, orders.value_serializer, orders.partitions) == (
        "str",
        "Order",
        "json",
        3,
    )
    assert (total.kind, total.concurrency, total.on_error) == ("generator", 2, "Retry(2, then=DeadLetter(dead))")
    assert total.place.startswith(__file__)
    with pytest.raises(dataclasses.FrozenInstanceError):
        orders.name = "x"
    with pytest.raises(KeyError):
        topology.node("agent:missing")


def test_what_shares_a_source_topic_is_one_sub_topology():
    repartition = "shop-orders-by-country-repartition"
    assert shop().topology().sub_topologies == (
        SubTopology("orders", ("orders",), ("log", "total"), ("orders-by-country",)),
        SubTopology(repartition, (repartition,), ("countries",), ()),
    )


def test_topics_are_joined_over_several_agents_whatever_their_order():
    names = {}
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        app = Declarations("shop")
        a, b, c, d, e = (app.topic(name) for name in "abcde")

        async def handle(value: bytes) -> None: ...

        joins = [[c, b], [b, a], [e, d]]
        for number in order:
            app.agent(joins[number], name=f"agent{number}")(handle)
        names[tuple(order)] = app.topology().sub_topologies
        first, second = names[tuple(order)]
        assert (first.name, first.topics, first.agents) == ("a", ("a", "b", "c"), ("agent0", "agent1"))
        assert (second.name, second.topics, second.agents) == ("d", ("d", "e"), ("agent2",))
        assert first.has_agent("agent1")
        assert not first.has_agent("agent2")
    assert len(set(names.values())) == 1


def test_as_text():
    assert (
        shop().topology().to_text()
        == """\
app shop

sub-topology orders
  reads   topic orders (str: Order, 3 partitions)
  step    orders-by-country (group_by)
    repartitions -> topic shop-orders-by-country-repartition (str: Order, 3 partitions, internal)
  agent   log (record, concurrency 1, on_error Stop(), thread)
  agent   total (generator, concurrency 2, on_error Retry(2, then=DeadLetter(dead)))
    sinks -> topic totals (str: Total)
    sends -> topic audit (bytes | None: bytes)
    dead letters -> topic dead (bytes | None: bytes)

sub-topology shop-orders-by-country-repartition
  reads   topic shop-orders-by-country-repartition (str: Order, 3 partitions, internal)
  agent   countries (record, concurrency 1, on_error Stop())
    sends -> topic orders (str: Order, 3 partitions)

crontab evening (0 20 * * * Europe/Berlin, on the leader)
    sends -> topic audit (bytes | None: bytes)

task once

timer tick (every 10 s)
    sends -> topic orders (str: Order, 3 partitions)

topics no agent names
  topic alone (bytes | None: dict[str, int])
"""
    )


def test_as_json():
    listed = json.loads(json.dumps(shop().topology().to_json()))
    assert listed["app"] == "shop"
    assert [topic["name"] for topic in listed["topics"]][:3] == ["alone", "audit", "dead"]
    assert listed["agents"][0]["id"] == "agent:countries"
    assert listed["steps"][0]["kind"] == "group_by"
    assert {"source": "topic:orders", "target": "agent:total", "kind": "reads"} in listed["edges"]
    assert listed["sub_topologies"][0] == {
        "name": "orders",
        "topics": ["orders"],
        "agents": ["log", "total"],
        "steps": ["orders-by-country"],
        "tables": [],
    }


def test_as_mermaid():
    lines = shop().topology().to_mermaid().splitlines()
    assert lines[0] == "flowchart LR"
    assert '    n0[("alone<br/>bytes | None: dict[str, int]")]' in lines
    assert any(line.endswith('("total")') for line in lines)
    assert sum("-.->|sends|" in line for line in lines) == 4
    assert sum("-->|repartitions|" in line for line in lines) == 1


def test_an_app_without_agents():
    topology = Declarations("empty").topology()
    assert (topology.nodes, topology.edges, topology.sub_topologies) == ((), (), ())
    assert topology.to_text() == "app empty\n"


def test_a_step_that_no_agent_reads_is_refused():
    app = Declarations("shop")
    app.topic("orders", value_type=Order).group_by("user")
    with pytest.raises(TopologyError, match=r"step 'orders-by-user' \(.*test_topology.py:\d+\) is read by no agent"):
        app.topology()


def test_a_chain_of_steps_is_read_through():
    app = Declarations("shop")
    orders = app.topic("orders", key_type=str, value_type=Order)
    copied = app.topic("copied", key_type=str, value_type=Order)

    @app.agent(orders.through(copied).group_by("country"))
    async def countries(order: Order) -> None: ...

    topology = app.topology()
    assert [(sub.name, sub.steps, sub.agents) for sub in topology.sub_topologies] == [
        ("copied", ("orders-through-copied-by-country",), ()),
        ("orders", ("orders-through-copied",), ()),
        ("shop-orders-through-copied-by-country-repartition", (), ("countries",)),
    ]
    assert Edge("step:orders-through-copied", "topic:copied", "copies") in topology.edges


def test_a_ring_of_steps_is_refused():
    app = Declarations("shop")
    a, b = app.topic("a"), app.topic("b")

    async def handle(value: bytes) -> None: ...

    app.agent(a.through(b), name="one")(handle)
    app.agent(b.through(a), name="two")(handle)
    with pytest.raises(TopologyError, match=r"step '.*' \(.*\) leads topic '.' back into itself"):
        app.topology()


def test_a_topic_with_the_name_of_an_internal_one_is_refused():
    app = Declarations("shop")

    @app.agent(app.topic("orders", value_type=Order).group_by("user"))
    async def handle(order: Order) -> None: ...

    app.topic("shop-orders-by-user-repartition")
    with pytest.raises(TopologyError, match="has the name of the internal topic of step 'orders-by-user'"):
        app.topology()


def test_a_table_of_another_app_is_refused():
    other, app = Declarations("other"), Declarations("shop")
    theirs = other.table("totals", key_type=str, value_type=int)
    orders = app.topic("orders", key_type=str, value_type=int)

    @app.agent(orders)
    async def total(amount: int) -> None:
        theirs["all"] += amount

    with pytest.raises(TopologyError, match="agent 'total' names table 'totals' of app 'other'"):
        app.topology()


def test_an_app_without_agents_is_led_by_way_of_a_topic():
    app = Declarations("clock")
    ticks = app.topic("ticks", key_type=str, value_type=int)

    @app.timer(5, on_leader=True)
    async def tick():
        ticks.send_nowait()

    topology = app.topology()
    assert topology.sub_topologies == (SubTopology("clock-leader", ("clock-leader",), (), ()),)
    assert topology.to_text() == (
        "app clock\n"
        "\n"
        "sub-topology clock-leader\n"
        "  reads   topic clock-leader (bytes | None: bytes, 1 partitions, internal)\n"
        "\n"
        "timer tick (every 5 s, on the leader)\n"
        "    sends -> topic ticks (str: int)\n"
    )
    assert 'n0[("clock-leader<br/>' in topology.to_mermaid()
    assert topology.to_json()["sub_topologies"][0]["topics"] == ["clock-leader"]
