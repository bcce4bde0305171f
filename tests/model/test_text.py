from typing import Annotated, Any

import msgspec
import pytest

from streamflow.errors import ConfigurationError, DeserializationError
from streamflow.model.serde import bind_codec
from streamflow.model.text import plain, reader_of, shown


class Item(msgspec.Struct):
    sku: str
    count: Annotated[int, msgspec.Meta(ge=1)]


class Order(msgspec.Struct):
    order_id: int
    items: list[Item]


def codec(form: Any, serializer: Any = None):
    return bind_codec(form, serializer, topic="orders", part="value")


@pytest.mark.parametrize(
    ("form", "serializer", "text", "value"),
    [
        (str, None, "ann", "ann"),
        (str, None, '{"a": 1}', '{"a": 1}'),
        (str | None, None, "ann", "ann"),
        (str, "json", '"ann"', "ann"),
        (bytes, None, "grüße", "grüße".encode()),
        (int, None, "-7", -7),
        (float, None, "2.5", 2.5),
        (float, None, "3", 3.0),
        (bool, None, "true", True),
        (list[int], None, "[1,2]", [1, 2]),
        (Item, None, '{"sku":"a","count":2}', Item("a", 2)),
        (Item, "msgpack", '{"sku":"a","count":2}', Item("a", 2)),
        (Any, "json", '{"a": null}', {"a": None}),
    ],
)
def test_text_is_read_by_the_topics_type(form, serializer, text, value):
    assert reader_of(codec(form, serializer))(text) == value


@pytest.mark.parametrize(
    ("form", "serializer", "text", "message"),
    [
        (Order, None, '{"order_id":1,"items":[{"sku":"a","count":"x"}]}', "`$.items[0].count`"),
        (Order, None, '{"order_id":1,"items":[{"sku":"a","count":0}]}', "`$.items[0].count`"),
        (Order, None, '{"items":[]}', "missing required field `order_id`"),
        (Order, None, "ann", "it is read as JSON, so text stands in quotes"),
        (tuple[str, float], None, "ann", "is read as a JSON list of 2, such as '[\"like this\", 1.5]'"),
        (tuple[Item, int], None, "ann", "is read as a JSON list of 2"),
        (tuple[int, ...], None, "7", "is read as a JSON list"),
        (Item, "msgpack", '{"sku":"a","count":"x"}', "`$.count`"),
        (int, None, "many", "'many'"),
        (int, None, str(2**70), "orders"),
        (Annotated[str, msgspec.Meta(max_length=3)], None, "four", "length"),
    ],
)
def test_text_that_does_not_fit_is_refused_with_the_path(form, serializer, text, message):
    with pytest.raises(ConfigurationError) as caught:
        reader_of(codec(form, serializer))(text)
    assert message.lower() in str(caught.value).lower()
    assert "orders" in str(caught.value)


async def test_what_was_stored_is_shown():
    item = codec(Item)
    assert await shown(item, item.encode(Item("a", 2)), ()) == {"sku": "a", "count": 2}
    assert await shown(item, None, ()) is None
    assert await shown(None, b"abc", ()) == "abc"
    with pytest.raises(DeserializationError):
        await shown(item, b"abc", ())


def test_anything_can_be_shown():
    assert plain(b"\xff\x00") == {"base64": "/wA="}
    assert plain({1: b"x"}) == {"1": "eA=="}
    assert plain(complex(1, 2)) == "(1+2j)"
