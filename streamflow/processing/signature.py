"""What an agent's function is, by its kind and its annotations; a misuse is an error that says what to write."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args, get_origin

from streamflow.errors import TopologyError
from streamflow.model.schema import members, type_name
from streamflow.processing.out import Out
from streamflow.processing.places import calling_frame
from streamflow.processing.stream import Event, Stream

Kind: TypeAlias = Literal["generator", "stream", "record"]

UNKNOWN: Final[Any] = inspect.Parameter.empty
"""Stands for a type that nothing says."""

_ASYNC_ITERATORS = (collections.abc.AsyncIterator, collections.abc.AsyncIterable, collections.abc.AsyncGenerator)


@dataclass(frozen=True, slots=True)
class Signature:
    """An agent's function.

    Attributes:
        kind: `generator` is an async generator over the stream, `stream` a coroutine function over it, `record` is
            called with each value.
        is_async: Whether calling it gives something to await or to iterate over asynchronously.
        value_type: Type of the values it takes, or UNKNOWN.
        key_type: Type of their keys, or UNKNOWN.
        output_types: Types of what it yields or returns, `None` and `Out` taken off; None where nothing says it.
        gives_no_key: Whether what it yields or returns is certainly never an `Out`, which could have a key of its own.
    """

    kind: Kind
    is_async: bool
    value_type: Any
    key_type: Any
    output_types: tuple[Any, ...] | None
    gives_no_key: bool


def signature_of(fn: Callable[..., Any], where: str) -> Signature:
    """Read an agent's function.

    Args:
        fn: The function.
        where: Beginning of error messages.

    Raises:
        TopologyError: It cannot be an agent; the message says what to write.
    """
    if not isinstance(fn, types.FunctionType | types.MethodType):
        raise TopologyError(f"{where}: an agent is a function, not {fn!r}: `async def {_example(fn)}`")
    inner = inspect.unwrap(fn)
    is_generator = inspect.isasyncgenfunction(fn) or inspect.isasyncgenfunction(inner)
    is_async = is_generator or inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(inner)
    parameter = _only_parameter(fn, where)
    annotation = _annotation(inner, parameter, where, may_fail=is_generator)
    over_stream = (get_origin(annotation) or annotation) is Stream
    _check_form(inner, annotation, where, is_async=is_async, is_generator=is_generator, over_stream=over_stream)
    arguments = get_args(annotation) if over_stream else (annotation,)
    kind: Kind = "generator" if is_generator else "stream" if over_stream else "record"
    outputs = _outputs(inner, kind)
    return Signature(
        kind,
        is_async,
        value_type=arguments[0] if arguments and not isinstance(arguments[0], typing.TypeVar) else UNKNOWN,
        key_type=arguments[1] if len(arguments) > 1 and arguments[1] is not Any else UNKNOWN,
        output_types=None if outputs is None else _without_out(outputs),
        gives_no_key=_gives_no_key(inner, outputs or ()),
    )


def code_names(code: types.CodeType) -> set[str]:
    """Attribute and global names in a function's code and in the functions written inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= code_names(constant)
    return names


def _example(fn: object) -> str:
    return f"{getattr(fn, '__name__', None) or 'handle'}(stream: sf.Stream[Order]) -> AsyncIterator[Total]: ...".strip()


def _only_parameter(fn: Callable[..., Any], where: str) -> str:
    parameters = list(inspect.signature(fn).parameters.values())
    needed = [
        one for one in parameters if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if len(needed) != 1 or needed[0] is not parameters[0] or needed[0].kind is inspect.Parameter.KEYWORD_ONLY:
        shown = ", ".join(one.name for one in parameters)
        raise TopologyError(
            f"{where}: an agent takes one parameter, the stream or the value, not ({shown}): `async def "
            f"{_example(fn)}`; what else it needs it finds in its module; key, headers and position come with "
            "stream.events()"
        )
    return needed[0].name


def _annotation(fn: Any, name: str, where: str, *, may_fail: bool) -> Any:
    raw = fn.__annotations__.get(name, UNKNOWN)
    if raw is UNKNOWN:
        if may_fail:
            return UNKNOWN
        raise TopologyError(
            f"{where}: annotate `{name}`, so that it is known what the agent takes: `{name}: sf.Stream[Order]` to work "
            f"over the stream, `{name}: Order` to be called with each value"
        )
    try:
        return _evaluated(fn, raw)
    except Exception as exc:
        if may_fail:
            return UNKNOWN
        raise TopologyError(
            f"{where}: the annotation of `{name}`, {raw!r}, cannot be evaluated ({exc}): import its names at run time, "
            "not only under TYPE_CHECKING"
        ) from exc


def _evaluated(fn: Any, raw: Any) -> Any:
    """An annotation with its strings resolved, by the function's globals and the names where it is decorated."""
    frame = calling_frame()
    local_names = dict(frame.f_locals) if frame is not None else {}
    holder = types.SimpleNamespace(__annotations__={"it": raw})
    return typing.get_type_hints(holder, getattr(fn, "__globals__", {}), local_names, include_extras=True)["it"]


def _check_form(fn: Any, annotation: Any, where: str, *, is_async: bool, is_generator: bool, over_stream: bool) -> None:
    if inspect.isgeneratorfunction(fn):
        raise TopologyError(
            f"{where}: a generator has to be asynchronous: `async def {_example(fn)}` with `async for` over the "
            "stream, or return one value per record"
        )
    if over_stream and not is_async:
        raise TopologyError(f"{where}: a function over a stream is asynchronous: `async def {_example(fn)}`")
    if is_generator and not over_stream and annotation is not UNKNOWN:
        raise TopologyError(
            f"{where}: an async generator works over the stream, and its parameter says {type_name(annotation)}: "
            f"annotate it `sf.Stream[{type_name(annotation)}]`"
        )
    if (get_origin(annotation) or annotation) is Event:
        raise TopologyError(
            f"{where}: events come out of the stream: take `stream: sf.Stream[Order]` and iterate over "
            "`stream.events()`"
        )


def _outputs(fn: Any, kind: Kind) -> tuple[Any, ...] | None:
    """The alternatives of what it yields or returns, but for `None`; None where nothing says it."""
    raw = fn.__annotations__.get("return", UNKNOWN)
    if raw is UNKNOWN:
        return None
    try:
        form = _evaluated(fn, raw)
    except Exception:
        return None  # only needed for the check against the sink's type
    if kind == "stream":
        return ()
    if kind == "generator":
        if get_origin(form) not in _ASYNC_ITERATORS:
            return None
        form = get_args(form)[0]
    return tuple(part for part in members(form) if part is not None and part is not type(None))


def _without_out(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    found: list[Any] = []
    for part in outputs:
        if (get_origin(part) or part) is Out:
            found.extend(members(get_args(part)[0]) if get_args(part) else [Any])
        else:
            found.append(part)
    return tuple(one for one in found if one is not type(None))


def _gives_no_key(fn: Any, outputs: tuple[Any, ...]) -> bool:
    return bool(outputs) and all(map(_is_never_out, outputs)) and "Out" not in code_names(fn.__code__)


def _is_never_out(part: Any) -> bool:
    cls = get_origin(part) or part
    return (
        isinstance(cls, type)
        and cls is not Any
        and not getattr(cls, "_is_protocol", False)
        and not issubclass(Out, cls)
    )
