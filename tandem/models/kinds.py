"""Classes of ours for parts of somebody's model, made of the parts' own, whose instances can be pickled and copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def kind_of(make: Callable[[Any], Any], kind: Any, **members: Any) -> Any:
    """A subclass of ``kind`` that has these members. ``make``: a function of a module, which gives it for ``kind``.

    Pickle finds a class by its name, and this one has none: whoever reads an instance makes the class again.
    """
    own = {"__module__": make.__module__, "__reduce__": lambda part: (_anew, (make, kind), vars(part))}
    return type(kind.__name__, (kind,), own | members)


def _anew(make: Callable[[Any], Any], kind: Any) -> Any:
    """One that is empty yet."""
    ours = make(kind)
    return ours.__new__(ours)
