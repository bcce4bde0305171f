import functools
import types

import pytest

from streamflow.processing.names import named_objects


class Thing:
    """Stands for a topic."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name

    def send(self):
        raise AssertionError("user code was run")


A, B, C, D, E = (Thing(name) for name in "ABCDE")
LISTED = [C, {"d": D}]


class Trap:
    """Fails a test that runs its code."""

    def __getattr__(self, name):
        raise AssertionError(f"user code was run: {name}")

    @property
    def __class__(self):
        raise AssertionError("user code was run: __class__")

    @property
    def inner(self):
        raise AssertionError("user code was run: inner")


class Holder:
    thing = A

    def method(self):
        B.send()


class Lower(Holder):
    pass


class Service:
    def __init__(self, thing):
        self.thing = thing

    def handle(self, value):
        self.thing.send()


MODULE = types.ModuleType("other")
MODULE.thing, MODULE.inner = A, types.ModuleType("other.inner")
MODULE.inner.thing = B
MODULE.trap = Trap()
TRAP = Trap()
SERVICE = Service(D)


def found(fn):
    return list(named_objects(fn, (Thing,)))


def directly(value):
    A.send()
    B.send()
    A.send()


def by_helper(value):
    return directly(value)


def nested(value):
    def inner():
        return [B for _ in range(3)], lambda: C

    return inner


async def asynchronous(stream):
    async for _ in stream:
        yield A


def by_module(value):
    MODULE.thing.send()
    return MODULE.inner.thing


def by_class(value):
    return Lower.thing


def by_instance(value):
    SERVICE.handle(value)


def by_container(value):
    return LISTED[0]


def by_default(value, thing=A, *, other=B):
    return thing, other


def local_name(value):
    A = value
    return A


def unknown(value):
    return missing, value.A  # noqa: F821


def trapped(value):
    return TRAP.thing, MODULE.trap.thing, TRAP


def recursive(value):
    return again(value)


def again(value):
    return recursive(value), E


def foreign(value):
    return functools.reduce(value, [A])


def makes(value):
    return Holder()


@pytest.mark.parametrize(
    ("fn", "things"),
    [
        (directly, [A, B]),
        (by_helper, [A, B]),
        (nested, [B, C]),
        (asynchronous, [A]),
        (by_module, [A, B]),
        (by_class, [A]),
        (by_instance, [D]),
        (by_container, [C, D]),
        (by_default, [A, B]),
        (local_name, []),
        (unknown, []),
        (trapped, []),
        (recursive, [E]),
        (foreign, [A]),
        (makes, [A, B]),
        (Service(E).handle, [E]),
        (print, []),
        (functools.partial(directly, C), [C, A, B]),
        (functools.partial(print, C), []),
    ],
)
def test_what_code_names(fn, things):
    assert found(fn) == things


def test_closures_are_read_also_before_they_are_filled():
    def outer():
        def inner():
            return early, late

        first = found(inner)
        early = A
        second = found(inner)
        late = B
        return first, second, found(inner)

    assert outer() == ([], [A], [A, B])


def test_a_wrapped_function_is_followed():
    def traced(fn):
        @functools.wraps(fn)
        def wrapper(value):
            C.send()
            return fn(value)

        return wrapper

    assert set(found(traced(directly))) == {A, B, C}


def test_functions_of_other_modules_are_not_followed():
    other = types.FunctionType(directly.__code__, {"A": A, "B": B, "__name__": "other"})
    globals()["OTHER"] = other
    try:
        assert found(calls_other) == []
    finally:
        del globals()["OTHER"]


def calls_other(value):
    return OTHER(value)  # noqa: F821
