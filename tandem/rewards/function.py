"""A Python function as a reward, called by TRL's convention.

``f(prompts=…, completions=…, completion_ids=…, **columns) -> list[float | None]``: parallel lists, one entry a
sample; ``columns`` are the dataset's other fields. The function names what it wants and gets only that, or takes
``**kwargs`` and gets everything. It may be ``async``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.rewards.loading import import_function, one_line, shortened
from tandem.roles import RewardBatch

Scores = list[float | None]


def load_reward(source: str) -> FunctionReward:
    """``FILE.py:function`` or ``package.module:function`` as a reward named after the function.

    Raises UserError where it cannot be imported: see ``tandem.rewards.loading``.
    """
    return FunctionReward(import_function(source), name=source.rpartition(":")[2])


class FunctionReward:
    """Calls ``function`` and checks what it returns. ``name`` is the function's, unless given."""

    def __init__(self, function: Callable[..., Any], *, name: str | None = None) -> None:
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self._function = function
        self._parameters = inspect.signature(function).parameters.values()
        self._runner: asyncio.Runner | None = None

    def score(self, batch: RewardBatch) -> Scores:
        """One number a sample, None where the function leaves it out.

        Raises UserError: where the function wants a column that the dataset lacks; where it raises (the exception,
        the line, and the first sample on which it raises when called again with one at a time); where it returns
        anything but one finite number or None a sample (which one, and its completion).
        """
        arguments = self._arguments(batch)
        samples = len(batch.completions)
        try:
            result = self._call(arguments)
        except Exception as error:  # the user's code may raise anything
            raise self._blame(error, arguments, batch) from error
        if hasattr(result, "tolist"):
            result = result.tolist()  # an array or a tensor
        if not isinstance(result, list | tuple):
            raise UserError(
                f"reward {self.name!r} returned a {type(result).__name__}; it must return a list with one number or "
                "None a sample"
            )
        if len(result) != samples:
            raise UserError(
                f"reward {self.name!r} returned {len(result)} values for {samples} samples; it must return one a sample"
            )
        return [self._checked(value, index, batch) for index, value in enumerate(result)]

    def _arguments(self, batch: RewardBatch) -> dict[str, list[Any]]:
        offered = {
            **batch.columns,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": [rollout.completion_ids for rollout in batch.rollouts],
        }
        named = [p for p in self._parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [p.name for p in named if p.default is p.empty and p.name not in offered]
        if missing:
            raise UserError(
                f"reward {self.name!r} wants the column {missing[0]!r}, which the dataset lacks; it can have: "
                f"{', '.join(sorted(offered))}"
            )
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            return offered
        return {p.name: offered[p.name] for p in named if p.name in offered}

    def _call(self, arguments: dict[str, list[Any]]) -> Any:
        result = self._function(**arguments)
        if not inspect.isawaitable(result):
            return result
        if self._runner is None:
            # One loop for all calls: a client that the function keeps between them is bound to it.
            self._runner = asyncio.Runner()
            weakref.finalize(self, self._runner.close)
        return self._runner.run(_awaited(result))

    def _blame(self, error: Exception, arguments: dict[str, list[Any]], batch: RewardBatch) -> UserError:
        """The error of a batch, put down to the first sample that fails alone."""
        for index in range(len(batch.completions)):
            try:
                self._call({name: values[index : index + 1] for name, values in arguments.items()})
            except Exception as alone:  # as above
                return UserError(f"reward {self.name!r} raised {self._described(alone)} on {sample(batch, index)}")
        return UserError(
            f"reward {self.name!r} raised {self._described(error)} on {len(batch.completions)} samples together, "
            "though on none of them alone"
        )

    def _described(self, error: Exception) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if f.filename == _source_file(self._function)), frames[-1])
        return f"{one_line(error)} ({Path(frame.filename).name}:{frame.lineno})"

    def _checked(self, value: Any, index: int, batch: RewardBatch) -> float | None:
        if value is None:
            return None
        if getattr(value, "ndim", None) == 0:
            value = value.item()  # a number in an array's or a tensor's clothes
        if not isinstance(value, int | float):
            raise UserError(
                f"reward {self.name!r} returned a {type(value).__name__}, not a number or None, for "
                f"{sample(batch, index)}"
            )
        if not math.isfinite(value):
            raise UserError(
                f"reward {self.name!r} returned {float(value)} for {sample(batch, index)}; return None to leave a "
                "sample out"
            )
        return float(value)


def sample(batch: RewardBatch, index: int) -> str:
    """A sample as an error names it: its place in the batch, its prompt and its completion, shortened."""
    completion = batch.completions[index]
    text = completion if isinstance(completion, str) else completion[-1].get("content")
    return f"sample {index} (prompt {batch.rollouts[index].prompt_id}): completion {shortened(repr(text))}"


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _source_file(function: Callable[..., Any]) -> str | None:
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code.co_filename if code else None
