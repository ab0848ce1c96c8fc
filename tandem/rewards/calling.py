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
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from tandem.errors import UserError
from tandem.futures import Begun, Later
from tandem.rewards.loading import one_line
from tandem.types import Judgement

Scores = list[float | None]
Per = Literal["sample", "group", "all"]
"""What a function judges in one call: one sample, the samples of one prompt, or those of a whole step."""
Function = TypeVar("Function", bound=Callable[..., Any])


def judges(per: Per) -> Callable[[Function], Function]:
    """Declares what a reward function judges in one call, which then begins as soon as that has been sampled.

    ``sample``: ``f(prompt, completion, completion_ids, **columns) -> float | None``, one of each. ``group``: lists as
    TRL gives them, of the samples of one prompt. ``all``, as without a declaration: lists of all samples of a step.

    >>> @judges("sample")
    ... def short(completion):
    ...     return float(len(completion) < 100)
    """
    if per not in ("sample", "group", "all"):
        raise UserError(f"judges: expected 'sample', 'group' or 'all', got {per!r}")

    def declared(function: Function) -> Function:
        function.judges = per  # type: ignore[attr-defined]
        return function

    return declared


class Fault(Exception):
    """A call that gave no scores: ``what`` was wrong goes after the reward's name, ``then`` after the sample's.

    ``sample`` is the index of the one at fault, if it is known. ``raised``: the function itself failed, and may not
    fail when it is called again; ``final``: it has tried for as long as it may.
    """

    def __init__(
        self, what: str, sample: int | None = None, then: str = "", *, raised: bool = False, final: bool = False
    ) -> None:
        super().__init__(what)
        self.what, self.sample, self.then, self.raised, self.final = what, sample, then, raised, final


@dataclass(frozen=True)
class Setting:
    """What a function of Tandem's may need to know of the run."""

    deadline_s: float = 600.0
    """Longest time that a call may take, in seconds."""
    folder: str = ""
    """The run's; nothing is written before the first call."""


class Unavailable(Exception):
    """Raised by a judge that asks somebody else, and has asked for as long as it may: what it got in the end."""


class Misjudged(Exception):
    """Raised by a judge that asks somebody else and was told nonsense, which asking again would not change."""


@dataclass(frozen=True)
class Wants:
    """The arguments that a function names, and whether it takes all others too; the file that it is written in."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    everything: bool
    file: str | None
    per: Per
    awaits: bool
    """Whether it is ``async``: its calls are made side by side."""
    patient: bool
    """Whether it keeps to the deadline by itself, and so is given a little more time."""
    one_of: tuple[str, ...]
    """Columns of which it needs one, beside the arguments that it names."""
    counts: tuple[str, ...]
    """Names of what it counts beside its scores."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Wants:
        parameters = inspect.signature(function).parameters.values()
        plain = _plain(function)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return cls(
            required=tuple(p.name for p in named if p.default is p.empty),
            optional=tuple(p.name for p in named if p.default is not p.empty),
            everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
            file=_source_file(function),
            per=getattr(plain, "judges", "all"),
            awaits=inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(plain.__call__),
            patient=getattr(plain, "patient", False),
            one_of=tuple(getattr(plain, "one_of", ())),
            counts=tuple(getattr(plain, "counts", ())),
        )

    @property
    def named(self) -> tuple[str, ...]:
        """The arguments that it names."""
        return (*self.required, *self.optional)

    def of_offered(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """What the function is called with."""
        if self.everything:
            return dict(offered)
        return {name: offered[name] for name in self.named if name in offered}


class CallCounts(MutableMapping[str, int]):
    """What a function counts, of each call by itself, also of calls that are made side by side.

    What is counted where no call shows, in a thread say, is of the call that ends next.
    """

    def __init__(self, others: dict[str, int]) -> None:
        self._others = others
        self._of_call: ContextVar[dict[str, int]] = ContextVar("of_call", default=others)

    def begin(self) -> None:
        """A call begins in this context."""
        self._of_call.set(dict.fromkeys(self._others, 0))

    def take(self) -> dict[str, int]:
        """The counts of this context's call, which has ended."""
        of_call = self._of_call.get()
        # Whole numbers in an array's clothes are no plain ones, which checkpoints hold.
        found = {name: int(of_call.get(name, 0) + self._others.get(name, 0)) for name in {**self._others, **of_call}}
        self._others |= dict.fromkeys(self._others, 0)
        return found

    def __getitem__(self, name: str) -> int:
        return self._of_call.get()[name]

    def __setitem__(self, name: str, count: int) -> None:
        self._of_call.get()[name] = count

    def __delitem__(self, name: str) -> None:
        del self._of_call.get()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of_call.get())

    def __len__(self) -> int:
        return len(self._of_call.get())


class LocalFunction:
    """A reward function in this process. Its arguments are single values where it judges one sample, and else lists."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.wants = Wants.of(function)
        self._function = function
        self._runner: asyncio.Runner | None = None
        owner = _plain(function)
        given = getattr(owner, "counts", {})
        self._counts = given if isinstance(given, CallCounts) else CallCounts(given)
        if self.wants.counts:
            owner.counts = self._counts

    def begin(
        self, arguments: Mapping[str, Any], samples: int, seed: int | None, in_words: Callable[[Fault], Exception]
    ) -> Begun[Judgement]:
        """The call, made when somebody asks for what it gives (``tandem.rewards.function.JudgingFunction``)."""

        def judge() -> Judgement:
            try:
                return Judgement(self(arguments, samples, seed), self.counted())
            except Fault as fault:
                raise in_words(fault) from fault

        return Later(judge)

    def __call__(self, arguments: Mapping[str, Any], samples: int, seed: int | None = None) -> Scores:
        """One number a sample, None where the function leaves it out. Raises Fault where it gives anything else.

        ``seed`` is what Python's, numpy's and torch's global generators start from; None leaves them alone.
        """
        self._counts.begin()
        if seed is not None:
            seed_generators(seed)
        try:
            result = self._run(arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything, and must not end ours
            raise self._fault(error, arguments) from error
        return self._scores(result, samples)

    async def judged(self, arguments: Mapping[str, Any], samples: int, seed: int | None = None) -> Scores:
        """As a call, for an ``async`` function in a loop that has other calls too.

        What it draws from global generators follows from ``seed`` up to where it first waits.
        """
        self._counts.begin()
        try:
            call = self._function(**arguments)
            if seed is not None:
                seed_generators(seed)
            result = await call
        except (Exception, SystemExit) as error:
            raise self._fault(error, arguments) from error
        return self._scores(result, samples)

    def counted(self) -> dict[str, int]:
        """What the function has counted in the call that has ended in this context."""
        return self._counts.take()

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        result = self._function(**arguments)
        if not inspect.isawaitable(result):
            return result
        if self._runner is None:
            # One loop for all calls: a client that the function keeps between them is bound to it.
            self._runner = asyncio.Runner()
            weakref.finalize(self, self._runner.close)
        return self._runner.run(_awaited(result), context=copy_context())

    def _scores(self, result: Any, samples: int) -> Scores:
        if self.wants.per == "sample":
            return [_number(result, 0)]
        if hasattr(result, "tolist"):
            result = result.tolist()  # an array or a tensor
        if not isinstance(result, list | tuple):
            kind = type(result).__name__
            raise Fault(f"returned a value of type {kind}; it must return a list with one number or None a sample")
        if len(result) != samples:
            raise Fault(f"returned {len(result)} values for {samples} samples; it must return one a sample")
        return [_number(value, index) for index, value in enumerate(result)]

    def _fault(self, error: BaseException, arguments: Mapping[str, Any]) -> Fault:
        if isinstance(error, Misjudged):
            return Fault(f"{error}; asked for ", 0)
        if isinstance(error, Unavailable):
            return Fault(f"{error}; asked for ", 0, "; go on with --resume", raised=True, final=True)
        if self.wants.per == "sample":
            sample: int | None = 0
        else:
            sample = _last_sample(error.__traceback__, self.wants.file, arguments.get("completions", ()))
        then = "" if sample is None else ", last at "
        return Fault(f"raised {self._described(error)}{then}", sample, raised=True)

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
    try:
        number = float(value)
    except OverflowError:  # a whole number may be larger than any float
        number = math.inf
    if not math.isfinite(number):
        raise Fault(f"returned {number} for ", index, "; return None to leave a sample out")
    return number


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


def seed_generators(seed: int) -> None:
    """Python's, numpy's and torch's, where they are imported."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _plain(function: Callable[..., Any]) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _source_file(function: Callable[..., Any]) -> str | None:
    function = inspect.unwrap(_plain(function))
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code.co_filename if code else None
