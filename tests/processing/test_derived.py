import msgspec
import pytest

from streamflow.errors import ConfigurationError, SchemaError, TopologyError
from streamflow.processing.declarations import Declarations
from streamflow.processing.topic import GroupBy, Through


class Order(msgspec.Struct):
    user: str
    amount: float
    number: int
    note: str | None = None


class Other(msgspec.Struct):
    user: str


def month_of(order: Order) -> int:
    return order.number


def untyped(order):
    return order.user


@pytest.fixture
def app():
    return Declarations("shop")


@pytest.fixture
def orders(app):
    return app.topic("orders", key_type=str, value_type=Order, value_serializer="msgpack", partitions=3)


@pytest.mark.parametrize(
    ("field", "options", "name", "key_type", "key"),
    [
        ("user", {}, "orders-by-user", str, "ann"),
        ("number", {}, "orders-by-number", int, 7),
        ("note", {}, "orders-by-note", str | None, None),
        ("note", {"key_type": str | None}, "orders-by-note", str | None, None),
        ("number", {"key_type": float}, "orders-by-number", float, 7),
        (Order.amount, {}, "orders-by-amount", float, 2.5),
        (month_of, {}, "orders-by-month_of", int, 7),
        (untyped, {"key_type": str}, "orders-by-untyped", str, "ann"),
        (lambda order: order.user.upper(), {"key_type": str, "name": "upper"}, "upper", str, "ANN"),
        ("user", {"name": "people"}, "people", str, "ann"),
    ],
)
def test_group_by_makes_a_step_over_an_internal_topic(app, orders, field, options, name, key_type, key):
    step = orders.group_by(field, **options)
    assert type(step) is GroupBy
    assert (step.name, step.source, step.source_topic, step.app) == (name, orders, orders, app)
    assert step.rekey is step.key_of
    assert step.rekey(Order("ann", 2.5, 7)) == key
    assert step.topic.name == f"shop-{name}-repartition"
    assert step.topic.internal
    assert (step.topic.key_type, step.topic.value_type, step.topic.partitions) == (key_type, Order, 3)
    assert step.topic.value_serializer == "msgpack"
    assert step.topic.topic_config() == {"cleanup.policy": "delete", "retention.ms": "-1"}
    assert step.topic.name not in app.topics
    assert app.derived == {name: step}


def test_a_field_of_untyped_json_is_read_by_item(app):
    events = app.topic("events", value_serializer="json")
    step = events.group_by("country", key_type=str)
    assert step.rekey({"country": "KR"}) == "KR"


def test_the_same_step_twice_is_one(app, orders):
    assert orders.group_by("user") is orders.group_by("user")
    assert orders.group_by(month_of) is orders.group_by(month_of)
    archive = app.topic("archive", key_type=str, value_type=Order)
    assert orders.through(archive) is orders.through(archive)
    assert len(app.derived) == 3


def test_another_step_of_the_name_is_refused_with_both_places(orders):
    orders.group_by("user", name="step")
    with pytest.raises(TopologyError, match=r"two steps are called 'step': one at .*test_derived.*, one at .*name="):
        orders.group_by("number", name="step")
    with pytest.raises(TopologyError, match="two steps"):
        orders.group_by("user", name="step", key_type=str | None)


def test_through_keeps_keys(app, orders):
    archive = app.topic("archive", key_type=str, value_type=Order)
    step = orders.through(archive)
    assert type(step) is Through
    assert (step.name, step.source, step.topic, step.rekey) == ("orders-through-archive", orders, archive, None)


def test_steps_follow_one_another(app, orders):
    archive = app.topic("archive", key_type=int, value_type=Order)
    first = orders.group_by("number")
    second = first.through(archive)
    third = second.group_by("user")
    assert (second.source, second.source_topic, second.name) == (first, first.topic, "orders-by-number-through-archive")
    assert (third.source, third.source_topic) == (second, archive)
    assert third.topic.name == "shop-orders-by-number-through-archive-by-user-repartition"


@pytest.mark.parametrize(
    ("field", "options", "error", "message"),
    [
        (lambda order: order.user, {"key_type": str}, ConfigurationError, "a lambda has no name to call the step by"),
        (
            lambda order: order.user,
            {"name": "x"},
            ConfigurationError,
            "nothing says the type of the new key; add key_type=",
        ),
        (untyped, {}, ConfigurationError, "add key_type="),
        ("usr", {}, SchemaError, "orders.group_by('usr'): Order has no field 'usr'; did you mean 'user'?"),
        (Other.user, {}, SchemaError, "Other.user is not a field of the topic's Order"),
        (3, {}, ConfigurationError, "not 3"),
        (str, {}, ConfigurationError, "not <class 'str'>"),
        ("user", {"name": "a b"}, ConfigurationError, "group_by 'a b'"),
        ("user", {"key_type": object}, SchemaError, "key_type"),
        (
            "user",
            {"key_type": int},
            SchemaError,
            "orders.group_by('user'): the new key is str, and key_type=int: leave",
        ),
        (Order.amount, {"key_type": int}, SchemaError, "makes int of it"),
        (month_of, {"key_type": str}, SchemaError, "the new key is int, and key_type=str"),
        ("note", {"key_type": int}, SchemaError, "the new key is str | None, and key_type=int"),
        (
            "note",
            {"key_type": str},
            SchemaError,
            "the new key may be None (str | None), and key_type=str: give a function",
        ),
    ],
)
def test_misuse_of_group_by(orders, field, options, error, message):
    with pytest.raises(error) as raised:
        orders.group_by(field, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize("field", ["user", Order.user])
def test_a_field_of_values_that_may_be_null_is_refused(app, field):
    orders = app.topic("orders", key_type=str, value_type=Order | None)
    with pytest.raises(
        SchemaError, match=r"values of 'orders' may be None \(Order \| None\), which has no field 'user'"
    ):
        orders.group_by(field)

    def user_of(order: Order | None) -> str:
        return order.user if order else ""

    assert orders.group_by(user_of).topic.key_type is str


def test_an_async_key_function_is_refused(orders):
    async def key(order: Order) -> str:
        return order.user

    with pytest.raises(ConfigurationError, match="cannot be async"):
        orders.group_by(key)


def test_misuse_of_through(app, orders):
    with pytest.raises(ConfigurationError, match="give a topic of the app, not 'archive'"):
        orders.through("archive")
    with pytest.raises(TopologyError, match="cannot go through itself"):
        orders.through(orders)
    with pytest.raises(TopologyError, match="belongs to app 'other', not to 'shop'"):
        orders.through(Declarations("other").topic("archive", key_type=str, value_type=Order))
    with pytest.raises(TopologyError, match="'orders' has value_type=Order and 'others' has value_type=Other"):
        orders.through(app.topic("others", key_type=str, value_type=Other))
    with pytest.raises(TopologyError, match="key_type=str and 'numbered' has key_type=int"):
        orders.through(app.topic("numbered", key_type=int, value_type=Order))
