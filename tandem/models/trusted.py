"""Where a model is loaded from, marked where Python code that comes with it may be run."""

from __future__ import annotations

from pathlib import Path


class Trusted(str):
    """The folder or hub name of a model whose own Python code may be run.

    That of any other text may not: a mark that gets lost on the way costs an error, never a run of somebody's code.
    """

    __slots__ = ()


def source_of(place: str | Path, trust_remote_code: bool) -> str:
    """The folder or hub name of a model, marked if its code may be run."""
    return Trusted(place) if trust_remote_code else str(place)


def is_trusted(source: str | Path) -> bool:
    """Whether the code of the model there may be run."""
    return isinstance(source, Trusted)


def trusted_as(source: str | Path, place: str) -> str:
    """Another place of a model's files, marked if the one that led there is."""
    return source_of(place, is_trusted(source))
