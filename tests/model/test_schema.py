import collections.abc
import enum
import types
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional, Protocol, TypedDict, TypeVar, Union

import msgspec
import pytest
import typing_extensions

from streamflow.errors import SchemaError
from streamflow.model.schema import (
    allows_none,
    field_type,
    is_mapping,
    members,
    shape_of,
    surely_differs,
    type_name,
    without_none,
)

T = TypeVar("T")


class Order(msgspec.Struct):
    user: str
    amount: float
    tags: list[str] | None = None


class Big(Order):
    pass


class Page(msgspec.Struct, Generic[T]):
    item: T
    following: "Page[int] | None" = None


class Pair(NamedTuple):
    left: int


class Row(TypedDict):
    name: Annotated[str, msgspec.Meta(min_length=1)]


class Other(typing_extensions.TypedDict):
    name: str


@dataclass
class Point:
    x: int


class Sized(Protocol):
    size: int


class Colour(enum.Enum):
    RED = 1


UserId = NewType("UserId", str)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (Order, "Order"),
        (Order | None, "Order | None"),
        (Optional[Order], "Order | None"),  # noqa: UP045
        (Union[int, str], "int | str"),  # noqa: UP007
        (list[Order], "list[Order]"),
        (dict[str, list[int]], "dict[str, list[int]]"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Literal["a", 1], "Literal['a', 1]"),
        (Annotated[int, msgspec.Meta(ge=0)], "int"),
        (UserId, "UserId"),
        (Page[Order], "Page[Order]"),
        (Any, "Any"),
        (None, "None"),
    ],
)
def test_types_are_named_as_they_are_written(form, name):
    assert type_name(form) == name


def test_a_local_class_is_named_without_its_function():
    class Inner:
        pass

    assert type_name(Inner) == "Inner"


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (Order, False),
        (Order | None, True),
        (Annotated[Order | None, "note"], True),
        (None, True),
        (Any, True),
        (object, True),
        (list[None], False),
        (UserId, False),
    ],
)
def test_none_is_allowed_where_the_type_says_so(form, answer):
    assert allows_none(form) is answer


def test_members_of_a_union_are_flat_and_bare():
    assert members(Union[int, Annotated[str | None, "note"]]) == (int, str, type(None))  # noqa: UP007
    assert members(UserId) == (str,)


@pytest.mark.parametrize(
    ("form", "outer", "exact"),
    [
        (Order, (Order,), Order),
        (Order | None, (Order, type(None)), Order),
        (Page[int], (Page,), Page),
        (list[int], (list, tuple), list),
        (dict[str, int], (dict, collections.abc.Mapping), dict),
        (collections.abc.Mapping[str, int], (dict, collections.abc.Mapping), dict),
        (float, (float, int), float),
        (Row, (dict,), dict),
        (Pair, (Pair,), Pair),
        (Point, (Point,), Point),
        (Colour, (Colour,), Colour),
        (Literal["a"], (str,), None),
        (int | str, (int, str), None),
        (Any, None, None),
        (Any | None, None, None),
    ],
)
def test_outer_types(form, outer, exact):
    shape = shape_of(form)
    assert shape.outer_types == outer
    assert shape.exact_type is exact


@pytest.mark.parametrize(
    ("form", "field", "answer"),
    [
        (Order, "user", str),
        (Order, "tags", list[str] | None),
        (Big, "amount", float),
        (Order | None, "user", str),
        (Page[str], "item", str),
        (Pair, "left", int),
        (Point, "x", int),
        (Row, "name", Annotated[str, msgspec.Meta(min_length=1)]),
        (dict[str, int], "anything", int),
        (dict, "anything", Any),
        (Any, "anything", Any),
        (Order | Point | None, "missing", None),
    ],
)
def test_types_of_fields(form, field, answer):
    if answer is None:
        with pytest.raises(SchemaError):
            field_type(form, field)
    else:
        assert field_type(form, field) == answer


@pytest.mark.parametrize(
    ("form", "field", "message"),
    [
        (Order, "usr", "Order has no field 'usr'; did you mean 'user'?"),
        (Order, "zzz", "it has user, amount, tags"),
        (int, "real", "int has no fields, so no field 'real': give a function instead"),
        (list[Order], "user", "has no fields"),
    ],
)
def test_a_field_that_is_not_there(form, field, message):
    with pytest.raises(SchemaError) as raised:
        field_type(form, field)
    assert message in str(raised.value)


def test_what_is_read_by_item():
    assert is_mapping(Row)
    assert is_mapping(dict[str, int] | None)
    assert is_mapping(Any)
    assert not is_mapping(Order)
    assert not is_mapping(Order | dict[str, int])


@pytest.mark.parametrize(
    ("given", "wanted", "answer"),
    [
        (Order, Order, False),
        (Big, Order, False),
        (Order, Big, True),
        (Order, Point, True),
        (Order | None, Order, True),
        (Order, Order | None, False),
        (int, float, False),
        (float, int, True),
        (str, UserId, False),
        (Order, Any, False),
        (Any, Order, False),
        (Order, object, False),
        (Order, Sized, False),
        (Order, T, False),
        (list[int], list[str], False),
        (dict, Row, False),
        (Row, Order, True),
        (Row, Other, False),
        (int | str, str, True),
        (None, None, False),
    ],
)
def test_types_surely_differ_only_where_that_is_certain(given, wanted, answer):
    assert surely_differs(given, wanted) is answer


def test_recursive_types_and_limits_are_described():
    assert shape_of(Page[int]).exact_type is Page
    assert shape_of(Annotated[str, msgspec.Meta(max_length=3)]).exact_type is str


def test_a_type_that_msgspec_does_not_know():
    with pytest.raises(SchemaError, match=r"SimpleNamespace at `\$\[...\]`"):
        shape_of(list[types.SimpleNamespace])


@pytest.mark.parametrize(
    ("form", "rest"),
    [
        (int | None, int),
        (Annotated[int | None, "x"], int),
        (int | str | None, int | str),
        (int, None),
        (int | str, None),
        (Any, None),
        (None, None),
        (type(None), None),
    ],
)
def test_a_type_without_none(form, rest):
    assert without_none(form) == rest
