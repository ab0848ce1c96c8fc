"""How a reward function is called: by TRL's convention, in whichever process it is.

Imports nothing heavy: the process in which a run's rewards are judged holds this and the functions' own modules.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import sys
import traceback
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tandem.rewards.loading import one_line

Scores = list[float | None]


class Fault(Exception):
    """A call that gave no scores: ``what`` was wrong goes after the reward's name, ``then`` after the sample's.

    ``sample`` is the index of the one at fault, if it is known. ``raised``: the function itself failed, and may not
    fail when it is called again.
    """

    def __init__(self, what: str, sample: int | None = None, then: str = "", *, raised: bool = False) -> None:
        super().__init__(what)
        self.what, self.sample, self.then, self.raised = what, sample, then, raised


@dataclass(frozen=True)
class Wants:
    """The arguments that a function names, and whether it takes all others too; the file that it is written in."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    everything: bool
    file: str | None

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Wants:
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return cls(
            required=tuple(p.name for p in named if p.default is p.empty),
            optional=tuple(p.name for p in named if p.default is not p.empty),
            everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
            file=_source_file(function),
        )

    def of_offered(self, offered: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """What the function is called with."""
        if self.everything:
            return dict(offered)
        return {name: offered[name] for name in (*self.required, *self.optional) if name in offered}


class LocalFunction:
    """A reward function in this process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.wants = Wants.of(function)
        self._function = function
        self._runner: asyncio.Runner | None = None

    def __call__(self, arguments: Mapping[str, list[Any]], samples: int, seed: int | None = None) -> Scores:
        """One number a sample, None where the function leaves it out. Raises Fault where it gives anything else.

        ``seed`` is what Python's, numpy's and torch's global generators start from; None leaves them alone.
        """
        if seed is not None:
            _seed_generators(seed)
        try:
            result = self._run(arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything, and must not end ours
            sample = _last_sample(error.__traceback__, self.wants.file, arguments.get("completions", ()))
            then = "" if sample is None else ", last at "
            raise Fault(f"raised {self._described(error)}{then}", sample, raised=True) from error
        if hasattr(result, "tolist"):
            result = result.tolist()  # an array or a tensor
        if not isinstance(result, list | tuple):
            kind = type(result).__name__
            raise Fault(f"returned a value of type {kind}; it must return a list with one number or None a sample")
        if len(result) != samples:
            raise Fault(f"returned {len(result)} values for {samples} samples; it must return one a sample")
        return [_number(value, index) for index, value in enumerate(result)]

    def _run(self, arguments: Mapping[str, list[Any]]) -> Any:
        result = self._function(**arguments)
        if not inspect.isawaitable(result):
            return result
        if self._runner is None:
            # One loop for all calls: a client that the function keeps between them is bound to it.
            self._runner = asyncio.Runner()
            weakref.finalize(self, self._runner.close)
        return self._runner.run(_awaited(result))

    def _described(self, error: BaseException) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if f.filename == self.wants.file), frames[-1])
        return f"{one_line(error)} ({Path(frame.filename).name}:{frame.lineno})"


def _number(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # a number in an array's or a tensor's clothes
    if not isinstance(value, int | float):
        raise Fault(f"returned a value of type {type(value).__name__}, not a number or None, for ", index)
    if not math.isfinite(value):
        raise Fault(f"returned {float(value)} for ", index, "; return None to leave a sample out")
    return float(value)


def _last_sample(trace: TracebackType | None, file: str | None, completions: Any) -> int | None:
    """The sample that the function was at, by its completion among the variables of the function's own file.

    Calling again with one sample at a time would say it too, and make every request of a judge on a server anew.
    """
    frames = [frame for frame, _ in traceback.walk_tb(trace) if frame.f_code.co_filename == file]
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            for index, completion in enumerate(completions):
                if value is completion:
                    return index
    return None


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _source_file(function: Callable[..., Any]) -> str | None:
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code.co_filename if code else None
