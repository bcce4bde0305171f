import functools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Protocol

import msgspec
import pytest

from streamflow.errors import ConfigurationError, RefusedError, TopologyError
from streamflow.model.record import RecordMetadata
from streamflow.processing.agent import Agent
from streamflow.processing.context import current_turn, registered_sender
from streamflow.processing.declarations import Declarations
from streamflow.processing.out import Out
from streamflow.processing.policy import DeadLetter, Retry, Skip, Stop
from streamflow.processing.stream import Event, Stream


class Order(msgspec.Struct):
    user: str
    amount: float


class Big(Order):
    pass


class Total(msgspec.Struct):
    user: str


class HasUser(Protocol):
    user: str


@pytest.fixture
def app():
    return Declarations("shop")


@pytest.fixture
def orders(app):
    return app.topic("orders", key_type=str, value_type=Order)


@pytest.fixture
def totals(app):
    return app.topic("totals", key_type=str, value_type=Total)


async def generator(stream: Stream[Order]) -> AsyncIterator[Total]:
    async for order in stream:
        yield Total(order.user)


async def over_stream(stream: Stream[Order]) -> None:
    async for _ in stream:
        pass


async def record(order: Order) -> Total:
    return Total(order.user)


def sync_record(order: Order) -> Total:
    return Total(order.user)


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "kind", "is_async", "is_generator"),
    [
        (generator, "generator", True, True),
        (over_stream, "stream", True, False),
        (record, "record", True, False),
        (sync_record, "record", False, False),
    ],
)
def test_what_a_function_is_follows_from_its_kind_and_its_parameter(app, orders, fn, kind, is_async, is_generator):
    agent = app.agent(orders)(fn)
    assert type(agent) is Agent
    assert (agent.kind, agent.is_async, agent.is_async_generator) == (kind, is_async, is_generator)
    assert (agent.name, agent.fn, agent.value_type) == (fn.__name__, fn, Order)
    assert (agent.sources, agent.input_topics, agent.sinks, agent.sink_topics) == ((orders,), (orders,), (), ())
    assert (agent.concurrency, agent.on_error, agent.thread) == (1, Stop(), False)
    assert app.agents == {agent.name: agent}
    assert repr(agent) == f"<agent {agent.name!r} over orders>"


def test_the_decorator_stands_with_and_without_parentheses(app):
    bare = app.agent(record)
    called = app.agent()(sync_record)
    assert [agent.input_topics[0].name for agent in (bare, called)] == ["shop-record", "shop-sync_record"]
    assert [agent.value_type for agent in (bare, called)] == [Order, Order]
    assert bare.input_topics[0].key_codec.decode(None) is None
    assert app.topics["shop-record"] is bare.input_topics[0]


def test_a_topic_of_its_own_takes_the_key_type_of_the_annotation(app):
    @app.agent
    async def keyed(stream: Stream[int, str]) -> AsyncIterator[int]:
        async for number in stream:
            yield number

    assert (keyed.input_topics[0].key_type, keyed.input_topics[0].value_type) == (str, int)


def test_options_and_names(app, orders, totals):
    dead = app.topic("dead")
    policy = Retry(3, then=DeadLetter(dead))
    agent = app.agent(orders, sink=[totals], concurrency=4, on_error=policy, name="other")(record)
    assert (agent.name, agent.concurrency, agent.on_error, agent.sink_topics) == ("other", 4, policy, (totals,))
    assert app.agent(orders, thread=True)(sync_record).thread


def test_an_agent_as_a_sink_is_its_topic(app):
    first = app.agent(record)
    second = app.agent(app.topic("raw-keys", value_type=Order), sink=first, name="second")(lambda_like := _identity)
    assert second.fn is lambda_like
    assert (second.sinks, second.sink_topics) == ((first,), first.input_topics)


def _identity(order: Order) -> Order:
    return order


def _maybe(order: Order) -> Order | None:
    return order


async def _orders(stream: Stream[Order]) -> AsyncIterator[Order]:
    async for order in stream:
        yield order


@pytest.mark.parametrize(
    ("fn", "remedy"),
    [
        (_identity, "return sf.Out(value, key=...) and annotate `-> sf.Out[Order]`"),
        (_maybe, "return sf.Out(value, key=...) and annotate `-> sf.Out[Order]`"),
        (_orders, "yield sf.Out(value, key=...) and annotate `-> AsyncIterator[sf.Out[Order]]`"),
    ],
)
@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ({"key_type": int}, "int as int"),
        ({"key_type": str, "key_serializer": "json"}, "str as json"),
        ({}, "bytes | None as raw"),
    ],
)
def test_results_that_can_have_no_key_of_the_sink_are_refused(app, orders, fn, remedy, key, shown):
    sink = app.topic("by-number", value_type=Order, **key)
    with pytest.raises(TopologyError) as caught:
        app.agent(orders, sink=[orders, sink] if fn is _maybe else sink)(fn)
    for part in (f"agent '{fn.__name__}'", "'orders' (str as str)", f"'by-number' has others ({shown})", remedy):
        assert part in str(caught.value)


def _out(order: Order) -> Out[Order]:
    return Out(order, key=1)


def _out_or_not(order: Order) -> Out[Order] | Order:
    return order


def _unsaid(order: Order):
    return order


def _anything(order: Order) -> Any:
    return order


def _wrongly_annotated(order: Order) -> Order:
    return Out(order, key=1)  # type: ignore[return-value]


@pytest.mark.parametrize("fn", [_out, _out_or_not, _unsaid, _anything, _wrongly_annotated])
def test_results_that_may_have_a_key_of_their_own_are_not(app, orders, fn):
    sink = app.topic("by-number", key_type=int, value_type=Order)
    assert app.agent(orders, sink=sink)(fn).sink_topics == (sink,)


def test_keys_that_can_be_inherited_from_one_of_several_topics_are_not_refused(app, orders):
    other = app.topic("other", key_type=int, value_type=Order)
    for number, sink in enumerate((orders, other, app.topic("null", key_type=str | None, value_type=Order))):
        app.agent([orders, other], sink=sink, name=f"n{number}")(_identity)


def test_several_topics(app, orders):
    more = app.topic("more", value_type=Big)
    assert app.agent([orders, more])(record).input_topics == (orders, more)


def test_an_agent_over_a_step_reads_what_the_step_writes(app, orders):
    step = orders.group_by("user")
    agent = app.agent(step)(record)
    assert (agent.sources, agent.input_topics) == ((step,), (step.topic,))


def test_annotations_as_text_are_read_where_the_function_is_decorated(app):
    class Local(msgspec.Struct):
        x: int

    @app.agent
    async def text(stream: "Stream[Local]") -> "AsyncIterator[Missing]":  # noqa: F821
        async for _ in stream:
            yield None

    @app.agent
    async def nested(stream: Stream["Local"]) -> None: ...

    assert text.value_type is nested.value_type is Local


def test_an_async_generator_needs_no_annotation_where_the_topic_has_the_type(app, orders):
    @app.agent(orders)
    async def plain(stream):
        async for order in stream:
            yield order

    assert (plain.kind, plain.value_type) == ("generator", Order)


def test_a_wrapped_function_is_what_it_wraps(app, orders):
    def traced(fn):
        @functools.wraps(fn)
        def wrapper(*args):
            return fn(*args)

        return wrapper

    agent = app.agent(orders)(traced(generator))
    assert (agent.name, agent.kind) == ("generator", "generator")


def test_a_method_is_an_agent_too(app, orders):
    class Service:
        async def handle(self, order: Order) -> None: ...

    service = Service()
    assert app.agent(orders)(service.handle).fn == service.handle


@pytest.mark.parametrize("annotation", [Order, Order | None, Order | Total, HasUser, Any, object])
def test_a_parameter_may_take_more_than_the_topic_has(app, orders, annotation):
    async def wide(value) -> None: ...

    wide.__annotations__["value"] = annotation
    assert app.agent(orders)(wide).value_type is annotation


def test_results_may_be_less_than_the_sink_takes(app, orders):
    @app.agent(orders, sink=orders)
    async def narrow(stream: Stream[Order]) -> AsyncGenerator[Big | Out[Order] | Out[None] | None, None]:
        yield None

    assert narrow.sink_topics == (orders,)


# --- misuse ----------------------------------------------------------------------------------------------------------


async def unannotated(order):
    return order


async def unannotated_generator(stream):
    yield stream


async def two(stream: Stream[Order], more: int) -> None: ...


async def none_at_all() -> None: ...


async def keyword_only(*, stream: Stream[Order]) -> None: ...


async def event(order: Event[Order, str]) -> None: ...


async def generator_of_a_value(order: Order) -> AsyncIterator[Order]:
    yield order


def sync_generator(stream: Stream[Order]) -> Iterator[Order]:
    yield Order("a", 1.0)


def sync_generator_of_a_value(order: Order) -> Iterator[Order]:
    yield order


def sync_over_stream(stream: Stream[Order]) -> None: ...


async def of_totals(stream: Stream[Total]) -> None: ...


async def keyed_by_int(stream: Stream[Order, int]) -> None: ...


async def returns_nothing(order: Order) -> None: ...


async def yields_orders(stream: Stream[Order]) -> AsyncIterator[Order]:
    async for order in stream:
        yield order


async def takes(stream: Stream[Order]) -> None:
    async def inner() -> None:
        async for _ in stream.take(10):
            pass

    await inner()


async def dangling(order: "Missing") -> None: ...  # noqa: F821


async def bare_stream(stream: Stream) -> None: ...


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (unannotated, {}, "annotate `order`, so that it is known what the agent takes: `order: sf.Stream[Order]`"),
        (two, {}, "takes one parameter, the stream or the value, not (stream, more)"),
        (none_at_all, {}, "takes one parameter"),
        (keyword_only, {}, "takes one parameter"),
        (event, {}, "iterate over `stream.events()`"),
        (generator_of_a_value, {}, "its parameter says Order: annotate it `sf.Stream[Order]`"),
        (sync_generator, {}, "a generator has to be asynchronous: `async def sync_generator(stream: sf.Stream[Order])"),
        (sync_generator_of_a_value, {}, "a generator has to be asynchronous"),
        (sync_over_stream, {}, "a function over a stream is asynchronous: `async def sync_over_stream("),
        (of_totals, {}, "topic 'orders' has value_type=Order, and the function takes Total; declare both the same"),
        (keyed_by_int, {}, "topic 'orders' has key_type=str, and the function takes int"),
        (dangling, {}, "the annotation of `order`, 'Missing', cannot be evaluated"),
        (record, {"concurrency": 0}, "concurrency=0: at least 1"),
        (record, {"concurrency": True}, "concurrency=True"),
        (record, {"concurrency": "2"}, "concurrency='2'"),
        (takes, {"concurrency": 2}, "take() makes many records one unit, concurrency=2 keeps each its own"),
        (record, {"on_error": Skip}, "write sf.Skip(), not the class sf.Skip"),
        (record, {"on_error": "skip"}, "'skip' is no error policy"),
        (record, {"on_error": None}, "None is no error policy"),
        (record, {"thread": True}, "thread=True is for `def`"),
        (generator, {"thread": True}, "thread=True is for `def`"),
        (record, {"name": "a b"}, "agent 'a b': use 1 to 249"),
        (over_stream, {"sink": "totals"}, "sink='totals': a sink is a topic or an agent"),
        (record, {"sink": ["totals"]}, "a sink is a topic or an agent"),
        (sync_record, {"name": ""}, None),
    ],
)
def test_misuse_says_what_to_write(app, orders, fn, options, message):
    if message is None:
        assert app.agent(orders, **options)(fn).name == fn.__name__
        return
    with pytest.raises(RefusedError) as raised:
        app.agent(orders, **options)(fn)
    assert message in str(raised.value)
    assert not app.agents


def test_misuse_of_sinks(app, orders, totals):
    with pytest.raises(TopologyError, match="it has a sink and never yields"):
        app.agent(orders, sink=totals)(over_stream)
    with pytest.raises(TopologyError, match="its annotation says that nothing comes out of it"):
        app.agent(orders, sink=totals)(returns_nothing)
    with pytest.raises(TopologyError, match="its sink 'totals' takes Total, and the function gives Order"):
        app.agent(orders, sink=totals)(yields_orders)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("orders", r"it reads 'orders', which is not a topic: declare `orders = app.topic\("),
        (["orders"], "which is not a topic"),
        ([], "there is no topic in"),
        (3, "it reads 3"),
    ],
)
def test_misuse_of_sources(app, source, message):
    with pytest.raises(TopologyError, match=message):
        app.agent(source)(record)


def test_an_agent_is_no_source_and_no_function(app, orders):
    first = app.agent(orders)(record)
    with pytest.raises(TopologyError, match=r"agents; make this one the sink= of 'record'"):
        app.agent(first)(sync_record)
    with pytest.raises(TopologyError, match="an agent is a function, not <agent 'record'"):
        app.agent(orders, name="again")(first)
    with pytest.raises(TopologyError, match="an agent is a function, not <class"):
        app.agent(orders)(Order)
    with pytest.raises(TopologyError, match="reads a topic twice: orders, orders"):
        app.agent([orders, orders])(sync_record)


def test_a_name_is_needed_and_its_own(app, orders):
    with pytest.raises(ConfigurationError, match="has no name to call the agent by; add name="):
        app.agent(orders)(lambda order: order)
    app.agent(orders)(record)
    with pytest.raises(TopologyError, match=r"two agents are called 'record': one at .*test_agent.py:\d+, one at"):
        app.agent(orders)(record)


def test_an_agent_without_topic_and_type_is_refused(app):
    with pytest.raises(TopologyError, match=r"agent 'unannotated_generator' .*nothing says what it reads"):
        app.agent(unannotated_generator)
    with pytest.raises(TopologyError, match="nothing says what it reads"):
        app.agent(bare_stream)
    with pytest.raises(TopologyError, match="annotate `order`"):
        app.agent(unannotated)


def test_topics_of_another_app_are_refused(app, orders):
    other = Declarations("other").topic("orders", key_type=str, value_type=Order)
    for source, options, verb in (
        (other, {}, "it reads 'orders' of app 'other'"),
        (orders, {"sink": other}, "it has the sink 'orders' of app 'other'"),
        (orders, {"on_error": DeadLetter(other)}, "it sends its dead letters to 'orders' of app 'other'"),
    ):
        with pytest.raises(TopologyError, match=verb):
            app.agent(source, **options)(_identity)


def test_an_own_topic_may_not_differ_from_a_declared_one(app):
    app.topic("shop-record", value_type=Total)
    with pytest.raises(TopologyError, match="topic 'shop-record' is declared twice"):
        app.agent(record)


# --- sending ---------------------------------------------------------------------------------------------------------


class Sender:
    def __init__(self):
        self.sent = []

    async def send(self, outgoing):
        self.send_nowait(outgoing)
        return RecordMetadata(outgoing[0].name, 0, 0, 0)

    def send_nowait(self, outgoing):
        topic, *what = outgoing
        self.sent.append((topic.name, *what))

    async def ask(self, agent, value, *, key, timeout_s):
        self.sent.append((agent.name, key, value, timeout_s))
        return None


async def test_a_call_is_the_functions(app, orders):
    agent = app.agent(orders)(record)
    assert await agent(Order("ann", 1.0)) == Total("ann")
    assert app.agent(orders)(sync_record)(Order("ann", 1.0)) == Total("ann")


async def test_sends_go_to_the_first_topic(app, orders):
    agent, sender = app.agent([orders, app.topic("b", key_type=str, value_type=Order)])(record), Sender()
    with registered_sender(app, sender):
        assert await agent.cast(Order("a", 1.0), key="k") == RecordMetadata("orders", 0, 0, 0)
        await agent.send(key="k", value=None, partition=1, timestamp_ms=2, headers=[("h", b"")])
        agent.send_nowait(value=Order("b", 1.0))
        assert await agent.ask(Order("c", 1.0), key="k", timeout_s=1) is None
        assert await agent.ask(Order("c", 1.0)) is None
    assert sender.sent == [
        ("orders", "k", Order("a", 1.0), None, None, ()),
        ("orders", "k", None, 1, 2, [("h", b"")]),
        ("orders", None, Order("b", 1.0), None, None, ()),
        ("record", "k", Order("c", 1.0), 1),
        ("record", None, Order("c", 1.0), 30.0),
    ]


async def test_an_ask_that_cannot_be_answered_is_refused_first(app, orders):
    class Turn:
        def refuse_ask(self, agent):
            raise TopologyError(agent.name)

    agent = app.agent(orders)(record)
    with registered_sender(app, Sender()) as _:
        token = current_turn.set(Turn())
        try:
            with pytest.raises(TopologyError, match="record"):
                await agent.ask(Order("a", 1.0))
        finally:
            current_turn.reset(token)
        with pytest.raises(ConfigurationError, match="timeout_s=0"):
            await agent.ask(Order("a", 1.0), timeout_s=0)
