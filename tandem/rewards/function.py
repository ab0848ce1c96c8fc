"""A Python function as a reward, called by TRL's convention.

``f(prompts=…, completions=…, completion_ids=…, **columns) -> list[float | None]``: parallel lists, one entry a
sample; ``columns`` are the dataset's other fields. The function names what it wants and gets only that, or takes
``**kwargs`` and gets everything. It may be ``async``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tandem.errors import RunFailure, UserError
from tandem.rewards.calling import Fault, LocalFunction, Scores, Wants
from tandem.rewards.loading import import_function, imported_module, shortened
from tandem.rewards.sources import source_files
from tandem.roles import RewardBatch
from tandem.seeds import derive_seed

SAMPLED = ("prompts", "completions", "completion_ids")
"""What every reward function can have, whatever the dataset."""


@runtime_checkable
class Judging(Protocol):
    """A function with what it wants, to be called where it lives: ``LocalFunction``, or one in another process."""

    wants: Wants

    def __call__(self, arguments: Mapping[str, list[Any]], samples: int, seed: int | None = None) -> Scores:
        """Scores of so many samples. Raises Fault, or RunFailure where its process failed."""
        ...


def load_reward(source: str) -> FunctionReward:
    """``FILE.py:function`` or ``package.module:function`` as a reward named after the function, in this process.

    Raises UserError where it cannot be imported: see ``tandem.rewards.loading``.
    """
    function = import_function(source)
    files = source_files(imported_module(source))
    return FunctionReward(function, name=reward_name(source), source=source, files=files)


def reward_name(source: str) -> str:
    """The function's."""
    return source.rpartition(":")[2]


class FunctionReward:
    """Calls ``function``, here or where it lives, and names the sample where that fails.

    ``name`` is the function's, unless given. ``source`` is what it was loaded by, ``files`` what it is made of
    (``tandem.rewards.sources``).
    """

    def __init__(
        self,
        function: Callable[..., Any] | Judging,
        *,
        name: str | None = None,
        source: str = "",
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.source, self.files = source, dict(files or {})
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self._judging: Judging = function if isinstance(function, Judging) else LocalFunction(function)

    def score(self, batch: RewardBatch) -> Scores:
        """One number a sample, None where the function leaves it out.

        Raises UserError: where the function wants a column that the dataset lacks; where it returns anything but one
        finite number or None a sample (which one, and its completion). Raises RunFailure where it raises (the
        exception, the line, and the sample that it was at, where its variables show that).
        """
        self.require_columns(batch.columns)
        arguments = self._judging.wants.of_offered(
            {
                **batch.columns,
                "prompts": batch.prompts,
                "completions": batch.completions,
                "completion_ids": [rollout.completion_ids for rollout in batch.rollouts],
            }
        )
        seed = None if batch.seed is None else derive_seed(batch.seed, self.name)
        try:
            return self._judging(arguments, len(batch.completions), seed)
        except Fault as fault:
            where = "" if fault.sample is None else sample(batch, fault.sample)
            kind = RunFailure if fault.raised else UserError
            raise kind(f"reward {self.name!r} {fault.what}{where}{fault.then}") from fault

    def require_columns(self, columns: Iterable[str], dataset: str = "the dataset") -> None:
        """Raises UserError where the function wants a column that the dataset does not have."""
        offered = {*columns, *SAMPLED}
        for name in self._judging.wants.required:
            if name not in offered:
                raise UserError(
                    f"reward {self.name!r} wants the column {name!r}, which {dataset} lacks; it can have: "
                    f"{', '.join(sorted(offered))}"
                )


def sample(batch: RewardBatch, index: int) -> str:
    """A sample as an error names it: its place in the batch, its prompt and its completion, shortened."""
    completion = batch.completions[index]
    text = completion if isinstance(completion, str) else completion[-1].get("content")
    return f"sample {index} (prompt {batch.rollouts[index].prompt_id}): completion {shortened(repr(text))}"
