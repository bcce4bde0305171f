from collections.abc import Mapping

import streamflow as sf
from streamflow.log.api import TopicDescription
from streamflow.model.record import TopicPartition
from streamflow.runtime.layout import Layout


def described(counts: Mapping[str, int]) -> dict[str, TopicDescription]:
    return {name: TopicDescription(name, count, {}) for name, count in counts.items()}


def test_a_task_has_no_partition_of_a_topic_that_is_shorter() -> None:
    app = sf.App("shop")
    orders, returns = app.topic("orders", value_type=str), app.topic("returns", value_type=str)

    @app.agent([orders, returns])
    def read(value: str) -> None:
        pass

    layout = Layout.of(app.topology(), described({"orders": 3, "returns": 2, "unrelated": 9}))
    (sub,) = layout.sub_topologies
    assert layout.of_task(sub, 1) == [TopicPartition("orders", 1), TopicPartition("returns", 1)]
    assert layout.of_task(sub, 2) == [TopicPartition("orders", 2)]
    assert layout.partitions() == 5
    assert layout.leading == "orders"


def test_an_app_without_agents_has_no_leader() -> None:
    layout = Layout.of(sf.App("shop").topology(), {})
    assert (layout.leading, layout.partitions(), layout.sub_topologies) == ("", 0, ())
