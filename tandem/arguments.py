"""Arguments of what a person calls from Python, looked at before anything is done with them."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tandem.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)  # a tensor's or numpy's, too
    except TypeError:
        return False
    return True


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", _is_whole),
    float: ("a number", lambda value: hasattr(value, "__float__")),
    str: ("a text", lambda value: isinstance(value, str)),
    type(None): ("None", lambda value: value is None),
}
"""Of plain types, what a value of them is, and whether it is one."""


def checked(function: F) -> F:
    """``function``, which raises UserError where an argument is not of the plain type that it is declared with.

    Plain are numbers, text, True and False, None, and some words (``Literal``), or one of several of these. Of a class
    it is what makes one.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        hints = get_type_hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and (wanted := _wanted(hints[name], value)):
                raise UserError(f"{name} is {value!r}; it must be {wanted}")
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _wanted(hint: Any, value: Any) -> str:
    """What a value must be, and is not; empty where it may be what it is, or nobody can say."""
    wanted = []
    for one in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(one) is Literal:
            words, fits = " or ".join(map(repr, get_args(one))), value in get_args(one)
        elif one in _PLAIN:
            words, fits = _PLAIN[one][0], _PLAIN[one][1](value)
        else:
            return ""
        if fits:
            return ""
        wanted.append(words)
    return " or ".join(wanted)
