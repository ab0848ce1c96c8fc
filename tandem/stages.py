"""Where the seconds before the steps of a run go: those of each stage of a start, in whichever process it happens.

Whoever does a part of a start names it (``stage``), and knows nobody who counts. Whoever wants to know counts
(``Stages.counted``), and where nobody does a name costs nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Seconds = dict[str, float]
"""By the name of a stage."""
HERE = "here"
"""The process of a run's command, among others by their names."""
SHOWN_S = 0.05
"""What took less is not told."""


class Stages:
    """Seconds of each stage in one process, from now on."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.ended: Seconds = {}
        self._compiled = _seconds_compiled()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Adds up the stages of the body, in this thread."""
        token = _outer.set(_Outer(self))
        try:
            yield
        finally:
            _outer.reset(token)

    def add(self, name: str, seconds: float) -> None:
        """A stage has taken so long, or so much longer."""
        self.ended[name] = self.ended.get(name, 0.0) + seconds

    def so_far(self) -> Seconds:
        """Of every stage that has ended, and of ``compiling``, which torch counts itself."""
        compiling = _seconds_compiled() - self._compiled
        return self.ended | ({"compiling": compiling} if compiling > 0 else {})

    @property
    def total(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self.begun


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The body is this stage of a start, but for stages within it."""
    outer = _outer.get()
    if outer is None:
        yield
        return
    inner = _Outer(outer.stages)
    token, start = _outer.set(inner), time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - start
        _outer.reset(token)
        outer.within += took
        outer.stages.add(name, took - inner.within)


@contextmanager
def counting() -> Iterator[Stages]:
    """What counts the stages here already, or one that does so in the body."""
    outer = _outer.get()
    if outer is not None:
        yield outer.stages
        return
    stages = Stages()
    with stages.counted():
        yield stages


def told(seconds: Mapping[str, float]) -> str:
    """``loading 12, proof 5.3``, the stages in the order in which they ended first."""
    return ", ".join(f"{name} {told_seconds(took)}" for name, took in seconds.items() if took >= SHOWN_S)


def told_seconds(seconds: float) -> str:
    """``12``, ``5.3``."""
    return f"{seconds:.{0 if seconds >= 9.95 else 1}f}"


def longest(of_process: Mapping[str, Seconds]) -> str:
    """The process whose stages took longest; ``HERE`` only where no other has any."""
    others = {name: sum(seconds.values()) for name, seconds in of_process.items() if name != HERE and seconds}
    return max(others, key=others.__getitem__, default=HERE)


def since(before: Mapping[str, Seconds], now: Mapping[str, Seconds]) -> dict[str, Seconds]:
    """What the stages of each process have taken since ``before``, those that took something."""
    return {
        name: {
            stage: round(more, 3)
            for stage, took in seconds.items()
            if (more := took - before.get(name, {}).get(stage, 0.0)) >= SHOWN_S
        }
        for name, seconds in now.items()
    }


def told_start(of_process: Mapping[str, Seconds], total: float) -> str:
    """The stages of this process, and of the one that it has waited for longest, in seconds of ``total``."""
    name = longest(of_process)
    parts = {"": of_process[HERE]} | ({} if name == HERE else {f"{name}: ": of_process[name]})
    other = {"other": total - sum(sum(seconds.values()) for seconds in parts.values())}
    lines = [*(f"{who}{told(seconds)}" for who, seconds in parts.items()), told(other)]
    return "; ".join(filter(None, lines))


@dataclass
class _Outer:
    """The stage in progress."""

    stages: Stages
    within: float = 0.0
    """Seconds of stages within it."""


_outer: ContextVar[_Outer | None] = ContextVar("_outer", default=None)


def _seconds_compiled() -> float:
    """What torch has compiled for in this process, in the forward and in the backward."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.calculate_time_spent()["total_wall_time"] if dynamo is not None else 0.0
