"""Which declared objects a function's code names: the topics it sends to, the agents it calls on, later its tables.

The code is read, never run: names are looked up in closures, module globals and classes as they are at the time of the
call, and nothing that could execute user code is touched: no property, no `__getattr__`, and no isinstance, which asks
`__class__`. What the code reaches by computation is found where it stands in a container that is named.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

_DEPTH = 3
_CONTAINER_ITEMS = 1000
_LOADS = {"LOAD_GLOBAL", "LOAD_NAME"}
_CLOSURE_LOADS = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}


def named_objects(fn: Callable[..., Any], kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """Find the declared objects that a function names, itself or by way of functions of its own module.

    Args:
        fn: The function.
        kinds: Classes of the objects looked for.

    Returns:
        Each object once, in the order in which the code names them.
    """
    search = _Search(kinds)
    search.function(fn)
    return tuple(search.found.values())


class _Search:
    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.kinds = kinds
        self.found: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._module: str | None = None

    def function(self, fn: Any) -> None:
        """Follow a function, and those that `functools.wraps` and methods put in front of it."""
        bound: list[Any] = []
        while type(fn) in (types.MethodType, functools.partial):
            if type(fn) is types.MethodType:
                bound.append(fn.__self__)
                fn = fn.__func__
            else:
                bound += [*fn.args, *fn.keywords.values()]
                fn = fn.func
        if type(fn) is not types.FunctionType or id(fn) in self._seen:
            return
        self._seen.add(id(fn))
        if self._module is None:
            self._module = inspect.unwrap(fn).__module__
        for value in bound:
            self.value(value, 0)
        closure = _closure(fn)
        for default in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
            self.value(default, 0)
        self._code(fn.__code__, fn.__globals__, closure)
        self.function(fn.__dict__.get("__wrapped__"))

    def _code(self, code: types.CodeType, names: dict[str, Any], closure: dict[str, Any]) -> None:
        for value in _loaded(code, names, closure):
            self.value(value, 0)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names, closure)

    def value(self, value: Any, depth: int) -> None:
        """Look at something the code names: it, what it holds, or the function that it is."""
        if issubclass(type(value), self.kinds):
            self.found.setdefault(id(value), value)
        elif type(value) in (types.FunctionType, types.MethodType):
            if value.__module__ == self._module:
                self.function(value)
        elif depth < _DEPTH:
            for inner in self._inside(value):
                self.value(inner, depth + 1)

    def _inside(self, value: Any) -> Iterator[Any]:
        kind = type(value)
        if kind in (list, tuple, set, frozenset):
            yield from list(value)[:_CONTAINER_ITEMS]
        elif kind is dict:
            yield from list(value.values())[:_CONTAINER_ITEMS]
        elif issubclass(kind, type):
            if _plain_dict(value).get("__module__") == self._module:
                yield from list(_plain_dict(value).values())
        elif _plain_dict(kind).get("__module__") == self._module:
            # An object of a class of the user's module: its attributes and its class's methods, by their dicts alone.
            yield from list(_plain_dict(value).values())
            yield kind


def _closure(fn: types.FunctionType) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    return cells


def _loaded(code: types.CodeType, names: dict[str, Any], closure: dict[str, Any]) -> Iterator[Any]:
    """What the code loads by name; `module.a.b` is followed as long as it leads through modules and classes."""
    current: Any = None
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in _ATTRIBUTES and issubclass(type(current), types.ModuleType):
            current = _plain_dict(current).get(name)
        elif operation in _ATTRIBUTES and issubclass(type(current), type):
            current = next((_plain_dict(one)[name] for one in _ancestors(current) if name in _plain_dict(one)), None)
        elif operation in _LOADS:
            yield from _settled(current)
            current = names.get(name)
        elif operation in _CLOSURE_LOADS:
            yield from _settled(current)
            current = closure.get(name)
        elif operation not in ("PRECALL", "PUSH_NULL", "CACHE", "RESUME"):
            yield from _settled(current)
            current = None
    yield from _settled(current)


def _settled(value: Any) -> Iterator[Any]:
    if value is not None and not issubclass(type(value), types.ModuleType):
        yield value


def _ancestors(value: type) -> tuple[type, ...]:
    found: tuple[type, ...] = type.__dict__["__mro__"].__get__(value)
    return found


def _plain_dict(value: Any) -> Any:
    """An object's own attributes, without a chance for its code to run."""
    if issubclass(type(value), type):
        return type.__dict__["__dict__"].__get__(value)
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
