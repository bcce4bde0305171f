"""A keyword that is not there is answered with the one that was probably meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from streamflow.config import nearest
from streamflow.errors import ConfigurationError

C = TypeVar("C", bound=Callable[..., Any])

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def known_keywords(call: str, handed_to: type | None = None) -> Callable[[C], C]:
    """Make a method or a class refuse an unknown keyword with the nearest known one, not with a bare `TypeError`.

    For declarations only: it costs a call more. Its type stays as it is.

    Args:
        call: How it is written, for the error: `app.topic(...)`.
        handed_to: The class that is made with the keywords where the method takes them as `**options`: what it knows is
            what the method knows.
    """

    def decorate(target: C) -> C:
        if isinstance(target, type):
            kind: Any = target
            kind.__init__ = _checked(call, kind.__init__, inspect.signature(kind.__init__))
            return cast(C, kind)
        return cast(C, _checked(call, target, _signature(target, handed_to)))

    return decorate


def _signature(fn: Callable[..., Any], handed_to: type | None) -> inspect.Signature:
    own = inspect.signature(fn)
    if handed_to is None:
        return own
    keywords = [each for each in inspect.signature(handed_to).parameters.values() if each.kind is each.KEYWORD_ONLY]
    named = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
    return own.replace(parameters=[*named, *keywords])


def _checked(call: str, fn: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    _, *parameters = signature.parameters.values()  # all of them are methods: without self
    known = [each.name for each in parameters if each.kind in _NAMED]

    @functools.wraps(fn)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in known:
                raise ConfigurationError(f"{call} has no argument {name!r}{nearest(name, known)}")
        return fn(*args, **keywords)

    checked.__dict__["__signature__"] = signature
    return checked
