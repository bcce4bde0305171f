"""What a declared type allows: its name, its outermost Python types, its fields, and whether msgspec can handle it.

Everything here runs once, while topics are declared; nothing of it is on a record's way.
"""

from __future__ import annotations

import collections.abc
import datetime
import decimal
import difflib
import math
import types
import typing
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import msgspec
from msgspec import inspect as info

from streamflow.errors import SchemaError

_BYTES = (bytes, bytearray, memoryview)
# What msgspec's description of a type means in classes: what a value may be, the most usual class first.
_OUTER: dict[type[info.Type], tuple[type, ...]] = {
    info.BoolType: (bool,),
    info.IntType: (int,),
    info.FloatType: (float, int),
    info.StrType: (str,),
    info.BytesType: _BYTES,
    info.ByteArrayType: (bytearray, bytes, memoryview),
    info.MemoryViewType: (memoryview, bytes, bytearray),
    info.DateTimeType: (datetime.datetime,),
    info.DateType: (datetime.date,),
    info.TimeType: (datetime.time,),
    info.TimeDeltaType: (datetime.timedelta,),
    info.UUIDType: (uuid.UUID,),
    info.DecimalType: (decimal.Decimal,),
    info.ExtType: (msgspec.msgpack.Ext,),
    info.RawType: (msgspec.Raw,),
    info.ListType: (list, tuple),
    info.VarTupleType: (tuple,),
    info.TupleType: (tuple,),
    info.SetType: (set, frozenset),
    info.FrozenSetType: (frozenset, set),
    info.DictType: (dict, collections.abc.Mapping),
    info.TypedDictType: (dict,),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A type as the serializers see it.

    Attributes:
        form: The declared type.
        known: msgspec's description of it, without `None` and without metadata.
        outer_types: Classes whose instances may be encoded; None means any.
        exact_type: The class that nearly every value has, or None where several are as likely.
    """

    form: Any
    known: info.Type
    outer_types: tuple[type, ...] | None
    exact_type: type | None


def shape_of(form: Any) -> Shape:
    """Describe a type and check that msgspec can handle all of it.

    Args:
        form: Any type form.

    Raises:
        SchemaError: It cannot; the message says which part of it and where.
    """
    try:
        known = _without_metadata(info.type_info(form))
        msgspec.json.Decoder(form)
    except NameError as exc:
        raise SchemaError(f"the type {type_name(form)} refers to something that is not defined: {exc}") from exc
    except (TypeError, ValueError) as exc:
        raise SchemaError(f"the type {type_name(form)} cannot be used: {exc}") from exc
    unknown = _first_unknown(known, "$", set())
    if unknown is not None:
        place, kind = unknown
        raise SchemaError(f"the type {type_name(form)} has {type_name(kind)} at `{place}`, which msgspec does not know")
    outer = _outer_types(known)
    return Shape(form, _without_none(known), outer, _exact_type(known))


_IMMUTABLE = (
    info.BoolType,
    info.IntType,
    info.FloatType,
    info.StrType,
    info.BytesType,
    info.DateTimeType,
    info.DateType,
    info.TimeType,
    info.TimeDeltaType,
    info.UUIDType,
    info.DecimalType,
    info.EnumType,
    info.LiteralType,
    info.NoneType,
)


def is_immutable(form: Any) -> bool:
    """Whether values of a type can surely not be changed in place, nor anything inside them.

    Args:
        form: A type that `shape_of` takes.
    """
    try:
        return _is_immutable(info.type_info(form), set())
    except (TypeError, ValueError, NameError):
        return False


def holds_sets(form: Any) -> bool:
    """Whether values of a type may hold sets, which are not written in the same order each time.

    Args:
        form: A type that `shape_of` takes.
    """
    return _holds_sets(info.type_info(form), set())


def takes_null_for_float(form: Any) -> bool:
    """Whether a float of a type may be read back as None from JSON, which has no infinity and no NaN.

    Args:
        form: A type that `shape_of` takes.
    """
    return _takes_null_for_float(info.type_info(form), set())


def _takes_null_for_float(known: info.Type, seen: set[Any]) -> bool:
    known = _without_metadata(known)
    if isinstance(known, info.UnionType):
        kinds = {type(_without_metadata(part)) for part in known.types}
        return {info.FloatType, info.NoneType} <= kinds or any(_takes_null_for_float(x, seen) for x in known.types)
    if isinstance(known, info.StructType | info.DataclassType | info.NamedTupleType | info.TypedDictType):
        if known.cls in seen:
            return False
        seen.add(known.cls)
        return any(_takes_null_for_float(field.type, seen) for field in known.fields)
    return any(_takes_null_for_float(part, seen) for _, part in _parts(known, ""))


def has_odd_float(value: Any) -> bool:
    """Whether a value holds an infinity or a NaN.

    Args:
        value: Anything that msgspec writes.
    """
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(has_odd_float(part) for part in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(has_odd_float, value))
    if value is None or isinstance(value, str | bytes | int):
        return False
    plain = msgspec.to_builtins(value, builtin_types=(bytes, datetime.datetime), str_keys=False)
    return type(plain) in (dict, list) and has_odd_float(plain)


def _holds_sets(known: info.Type, seen: set[Any]) -> bool:
    known = _without_metadata(known)
    if isinstance(known, info.SetType | info.FrozenSetType):
        return True
    if isinstance(known, info.StructType | info.DataclassType | info.NamedTupleType | info.TypedDictType):
        if known.cls in seen:
            return False
        seen.add(known.cls)
        return any(_holds_sets(field.type, seen) for field in known.fields)
    return any(_holds_sets(part, seen) for _, part in _parts(known, ""))


def _is_immutable(known: info.Type, seen: set[Any]) -> bool:
    known = _without_metadata(known)
    if isinstance(known, info.UnionType):
        return all(_is_immutable(part, seen) for part in known.types)
    if isinstance(known, info.VarTupleType | info.FrozenSetType):
        return _is_immutable(known.item_type, seen)
    if isinstance(known, info.TupleType):
        return all(_is_immutable(part, seen) for part in known.item_types)
    if isinstance(known, info.StructType | info.DataclassType | info.NamedTupleType):
        if known.cls in seen:
            return True
        seen.add(known.cls)
        return _is_frozen(known.cls) and all(_is_immutable(field.type, seen) for field in known.fields)
    return isinstance(known, _IMMUTABLE)


_SEVERAL_WRITINGS: dict[type[info.Type], str] = {
    info.FloatType: "a float",
    info.DecimalType: "a Decimal",
    info.DateTimeType: "a datetime",
    info.TimeType: "a time",
    info.AnyType: "values of any type",
}
_NUMBERS = (info.IntType, info.BoolType)
_MADE_IN = ("<string>", "<attrs generated")


def equal_in_several_writings(form: Any) -> str:
    """What a type has in it of which equal values are not always written the same; empty when nothing."""
    return _several_writings(info.type_info(form), set())


def _several_writings(known: info.Type, seen: set[Any]) -> str:
    known = _without_metadata(known)
    found = _SEVERAL_WRITINGS.get(type(known), "")
    if isinstance(known, info.UnionType):
        numbers = [part for part in map(_without_metadata, known.types) if isinstance(part, _NUMBERS)]
        return "bool beside int" if len(numbers) > 1 else _first_of(known.types, seen)
    if isinstance(known, info.StructType | info.DataclassType | info.NamedTupleType | info.TypedDictType):
        if known.cls in seen:
            return ""
        seen.add(known.cls)
        if own := _own_equality(known.cls):
            return own
        return _first_of([field.type for field in known.fields], seen)
    return found or _first_of([part for _, part in _parts(known, "$")], seen)


def _own_equality(cls: Any) -> str:
    """How the equality of a class may pass over some of its fields; empty where it surely does not."""
    cls = get_origin(cls) or cls
    if not all(getattr(field, "compare", True) for field in getattr(cls, "__dataclass_fields__", {}).values()):
        return "a field with compare=False"
    if not all(getattr(field, "eq", True) for field in getattr(cls, "__attrs_attrs__", ())):
        return "a field with eq=False"
    equality = cls.__eq__
    if equality in (object.__eq__, tuple.__eq__, dict.__eq__, msgspec.Struct.__eq__):
        return ""
    # What dataclasses and attrs make is compiled from text, and stands in no file.
    is_made = getattr(equality, "__code__", None) is not None and equality.__code__.co_filename.startswith(_MADE_IN)
    return "" if is_made else f"a class with an __eq__ of its own ({type_name(cls)})"


def _first_of(parts: Iterable[info.Type], seen: set[Any]) -> str:
    return next((found for part in parts if (found := _several_writings(part, seen))), "")


def _is_frozen(cls: Any) -> bool:
    origin = get_origin(cls) or cls
    if issubclass(origin, msgspec.Struct):
        return bool(origin.__struct_config__.frozen)
    if is_dataclass(origin):
        return bool(getattr(origin, "__dataclass_params__").frozen)  # noqa: B009 - typeshed has it not
    return issubclass(origin, tuple)


def type_name(form: Any) -> str:
    """A type as a user would write it: `Order | None`, `list[Order]`."""
    if form is None or form is type(None):
        return "None"
    if isinstance(form, typing.ForwardRef):
        return form.__forward_arg__
    origin = get_origin(form)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, get_args(form)))}]"
    if origin is typing.Annotated:
        return type_name(get_args(form)[0])
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(part) for part in get_args(form))
    if origin is not None:
        arguments = ", ".join("..." if part is Ellipsis else type_name(part) for part in get_args(form))
        return f"{type_name(origin)}[{arguments}]"
    name = getattr(form, "__qualname__", None) or getattr(form, "__name__", None)
    return str(name).rsplit("<locals>.", maxsplit=1)[-1] if name else repr(form).removeprefix("typing.")


def allows_none(form: Any) -> bool:
    """Whether `None` is a value of the type."""
    form = bare(form)
    return form is None or form in (type(None), Any, object) or any(allows_none(part) for part in _alternatives(form))


def without_none(form: Any) -> Any | None:
    """A union that has `None` among its alternatives, without it; None for every other type."""
    parts = members(form)
    rest = [part for part in parts if part is not None and part is not type(None)]
    return Union[tuple(rest)] if rest and len(rest) < len(parts) else None  # noqa: UP007 (parts are known at run time only)


def members(form: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself, aliases and annotations taken off."""
    form = bare(form)
    alternatives = _alternatives(form)
    return tuple(part for one in alternatives for part in members(one)) if alternatives else (form,)


def bare(form: Any) -> Any:
    """A type without `Annotated`, without `type X = ...` aliases and without `NewType`."""
    while True:
        if get_origin(form) is typing.Annotated:
            form = get_args(form)[0]
        elif isinstance(form, typing.NewType):
            form = form.__supertype__
        elif type(form).__name__ == "TypeAliasType" and hasattr(form, "__value__"):
            form = form.__value__
        else:
            return form


def surely_differs(given: Any, wanted: Any) -> bool:
    """Whether values of `given` can certainly not be passed where `wanted` is declared.

    Only plain classes and unions of them are judged; for everything else the type checker has the word.
    """
    accepted = members(wanted)
    if not all(_plain(part) for part in accepted) or any(part in (Any, object) for part in accepted):
        return False
    return any(_plain(part) and part is not Any and not _fits_one(part, accepted) for part in members(given))


def field_type(form: Any, field: str) -> Any:
    """The annotation of a field of a struct, dataclass, attrs class, named tuple or TypedDict.

    Args:
        form: The type that has the field; of a union every member must have it.
        field: Its name.

    Returns:
        The field's type; `Any` where the type does not say (a dict, `Any`).

    Raises:
        SchemaError: There is no such field; the message names the nearest.
    """
    found = {_member_field(part, field) for part in members(form) if part is not type(None)}
    return found.pop() if len(found) == 1 else Any


def part_example(form: Any) -> str:
    """How the first part of a key of several parts is read, `key[0]` or `key.user`; empty for a key of one part."""
    for one in members(form):
        origin = get_origin(one) or one
        if _is_class(origin) and _has_fields(origin):
            return f"key.{next(iter(origin.__annotations__), '...')}"
        if _is_class(origin) and issubclass(origin, tuple):
            return "key[0]"
    return ""


def is_mapping(form: Any) -> bool:
    """Whether values are read by `value[field]` rather than `value.field` (dicts, TypedDicts, untyped JSON)."""
    classes = [get_origin(part) or part for part in members(form) if part is not type(None)]
    return all(one in (Any, object) or (_is_class(one) and issubclass(one, collections.abc.Mapping)) for one in classes)


def _member_field(form: Any, field: str) -> Any:
    origin = get_origin(form) or form
    if not _is_class(origin):
        return Any
    if not (hasattr(origin, "__annotations__") and _has_fields(origin)):
        if issubclass(origin, collections.abc.Mapping):
            arguments = get_args(form)
            return arguments[1] if len(arguments) == 2 else Any
        if origin is object:
            return Any
        raise SchemaError(f"{type_name(form)} has no fields, so no field {field!r}: give a function instead")
    try:
        hints = typing.get_type_hints(origin, include_extras=True)
    except NameError as exc:
        raise SchemaError(f"the type {type_name(form)} refers to something that is not defined: {exc}") from exc
    if field not in hints:
        near = difflib.get_close_matches(field, hints, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(hints)}"
        raise SchemaError(f"{type_name(form)} has no field {field!r}; {advice}")
    parameters = getattr(origin, "__parameters__", ())
    return dict(zip(parameters, get_args(form), strict=False)).get(hints[field], hints[field])


def _has_fields(cls: type) -> bool:
    return (
        issubclass(cls, msgspec.Struct)
        or is_dataclass(cls)
        or hasattr(cls, "__attrs_attrs__")
        or typing.is_typeddict(cls)
        or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    )


def _is_class(form: Any) -> TypeGuard[type[Any]]:
    # Since Python 3.11 typing.Any is a class, too.
    return isinstance(form, type) and form is not Any and get_origin(form) is None


def _plain(form: Any) -> bool:
    return form is None or form is Any or (_is_class(form) and not getattr(form, "_is_protocol", False))


def _fits_one(part: Any, accepted: tuple[Any, ...]) -> bool:
    if part is None or part is type(None):
        return None in accepted or type(None) in accepted
    if part is int and float in accepted:
        return True
    try:
        return any(issubclass(part, one) for one in accepted if one is not None)
    except TypeError:
        return True  # a TypedDict cannot be asked


def _alternatives(form: Any) -> tuple[Any, ...]:
    return get_args(form) if get_origin(form) in (Union, types.UnionType) else ()


def _without_metadata(known: info.Type) -> info.Type:
    while isinstance(known, info.Metadata):
        known = known.type
    return known


def _without_none(known: info.Type) -> info.Type:
    if isinstance(known, info.UnionType):
        rest = [part for part in known.types if not isinstance(part, info.NoneType)]
        return _without_metadata(rest[0]) if len(rest) == 1 else info.UnionType(tuple(rest))
    return known


def _outer_types(known: info.Type) -> tuple[type, ...] | None:
    known = _without_metadata(known)
    if isinstance(known, info.NoneType):
        return (type(None),)
    if isinstance(known, info.UnionType):
        parts = [_outer_types(part) for part in known.types]
        return None if None in parts else tuple(one for part in parts if part is not None for one in part)
    if isinstance(known, info.LiteralType):
        return tuple({type(value) for value in known.values})
    if isinstance(known, info.EnumType | info.StructType | info.DataclassType | info.NamedTupleType):
        return (get_origin(known.cls) or known.cls,)
    return _OUTER.get(type(known))


def _exact_type(known: info.Type) -> type | None:
    known = _without_none(known)
    if isinstance(known, info.UnionType | info.LiteralType | info.NoneType | info.RawType):
        return None
    outer = _outer_types(known)
    return None if outer is None else outer[0]


def _first_unknown(known: info.Type, place: str, seen: set[Any]) -> tuple[str, Any] | None:
    """The first part of a type that msgspec would hand to a hook, with its place."""
    known = _without_metadata(known)
    if isinstance(known, info.CustomType):
        return place, known.cls
    if isinstance(known, info.StructType | info.DataclassType | info.NamedTupleType | info.TypedDictType):
        if known.cls in seen:
            return None
        seen.add(known.cls)
        inner = [(f"{place}.{field.encode_name}", field.type) for field in known.fields]
    else:
        inner = _parts(known, place)
    found = (_first_unknown(part, where, seen) for where, part in inner)
    return next((one for one in found if one is not None), None)


def _parts(known: info.Type, place: str) -> list[tuple[str, info.Type]]:
    inner: list[tuple[str, info.Type]] = []
    for name in known.__struct_fields__:
        value = getattr(known, name)
        here = place if isinstance(known, info.UnionType) else f"{place}[...]"
        if isinstance(value, info.Type):
            inner.append((here, value))
        elif isinstance(value, tuple):
            inner.extend((here, part) for part in value if isinstance(part, info.Type))
    return inner
