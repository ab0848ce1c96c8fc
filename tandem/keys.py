"""What a key of a config says of itself beside its type, its default and its help, as metadata of a dataclass field.

A key may say several of these things, joined by ``|``, and a subclass that gives it another default need not say them
again. What holds keys, a section of a config or the knobs of a method, is ``Checked``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

from tandem.errors import UserError

ONE_START = {"one_start": True}
"""It concerns one start of a run, and so is not written to the run's config."""
PATH = {"path": True}
"""Its values are paths, or may be: a leading ``~`` stands for the home folder."""
INFINITE = {"infinite": True}
"""It may be infinite; elsewhere that would end in numbers that are none."""
MAY_CHANGE = {"may_change": lambda config: ""}
"""A resumed run may have another value of it, since nothing that is computed depends on it."""
PREFIXED = {"prefixed": True}
"""Of a section: its keys carry its name, ``placement.actor``."""


def may_change(unless: Callable[[Any], str]) -> dict[str, Any]:
    """As ``MAY_CHANGE``, but where ``unless(config)`` gives a reason against it."""
    return {"may_change": unless}


def needs(*conditions: tuple[Any, ...]) -> dict[str, Any]:
    """It has an effect only where all ``conditions`` hold; elsewhere it is refused.

    A condition is another key and the values that it must have, ``("engine.kind", "vllm")``; without values, it must
    be set: not None, nothing, ``"none"`` or 0. ``("part", "reference")`` asks for one of the parts that the run has.
    """
    return {"needs": conditions}


def must(be: str, holds: Callable[[Any], Any]) -> dict[str, Any]:
    """What its value must ``be``, in words, and whether one is that. None is not asked."""
    return {"must": (be, holds)}


AT_LEAST_0 = must("0 or more", lambda value: value >= 0)
AT_LEAST_1 = must("1 or more", lambda value: value >= 1)
ABOVE_0 = must("more than 0", lambda value: value > 0)
FROM_0_TO_1 = must("from 0 to 1", lambda value: 0 <= value <= 1)
A_SHARE = must("more than 0 and at most 1", lambda value: 0 < value <= 1)
A_TEXT = must("a text", bool)
A_FOLDER = must("a folder", bool)
A_MODEL = must("a folder or a name on the hub", bool)
ANYTHING = must("anything", lambda value: True)
"""Of a key to which a subclass gives a default that its first class refuses."""


class Checked:
    """Keys that are what they must be: making one raises UserError, naming the key, where one is not."""

    prefix: ClassVar[str] = ""
    """Before the names of its keys, in messages."""

    def __post_init__(self) -> None:
        for name, said in said_of(type(self)).items():
            value = getattr(self, name)
            if "must" in said and value is not None:
                be, holds = said["must"]
                if not holds(value):
                    raise UserError(f"{self.prefix}{name}: expected {be}, got {value!r}")


def said_of(cls: type[Any]) -> dict[str, dict[str, Any]]:
    """What each key of a dataclass says of itself, by name; also one to which a subclass gives another default."""
    found: dict[str, dict[str, Any]] = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        found |= {f.name: found.get(f.name, {}) | dict(f.metadata) for f in fields(base)}
    return found
