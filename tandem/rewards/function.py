"""A Python function as a reward, called by TRL's convention.

``f(prompts=…, completions=…, completion_ids=…, **columns) -> list[float | None]``: parallel lists, one entry a
sample; ``columns`` are the dataset's other fields. The function names what it wants and gets only that, or takes
``**kwargs`` and gets everything. It may be ``async``. ``@judges("sample")`` and ``@judges("group")``
(``tandem.rewards.calling``) make it a judge of one sample, or of one prompt's samples, at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tandem.errors import RunFailure, UserError
from tandem.futures import Begun, wait_all
from tandem.rewards.calling import Fault, LocalFunction, Per, Scores, Setting, Wants
from tandem.rewards.checks import text_of
from tandem.rewards.kinds import find_function, reward_name
from tandem.rewards.loading import shortened
from tandem.roles import RewardBatch
from tandem.seeds import derive_seed
from tandem.types import Judgement

SAMPLED = ("prompts", "completions", "completion_ids", "stop_reasons")
"""What every reward function can have, whatever the dataset. How samples ended (``eos``, ``length``, ``stop_string``)
one gets that names it: ``**kwargs`` are TRL's."""
SAMPLED_ONE = ("prompt", "completion", "completion_ids", "stop_reason")
"""What a function that judges a sample at a time can have, whatever the dataset."""


@runtime_checkable
class JudgingFunction(Protocol):
    """A function with what it wants, to be called where it lives: ``LocalFunction``, or one in another process."""

    wants: Wants

    def begin(
        self, arguments: Mapping[str, Any], samples: int, seed: int | None, in_words: Callable[[Fault], Exception]
    ) -> Begun[Judgement]:
        """Begins to judge so many samples. The future's result raises what ``in_words`` makes of a Fault, or RunFailure
        where its process failed."""
        ...


def load_reward(source: str) -> FunctionReward:
    """A source of ``--reward``, such as ``FILE.py:function``, as a reward in this process.

    Raises UserError where it cannot be imported: see ``tandem.rewards.loading``.
    """
    found = find_function(source, Setting())
    return FunctionReward(found.function, name=reward_name(source), source=source, files=found.files)


class FunctionReward:
    """Calls ``function``, here or where it lives, and names the sample where that fails.

    ``name`` is the function's, unless given. ``source`` is what it was loaded by, ``files`` what it is made of
    (``tandem.rewards.loading.source_files``), ``version`` what a server says of itself.
    """

    def __init__(
        self,
        function: Callable[..., Any] | JudgingFunction,
        *,
        name: str | None = None,
        source: str = "",
        files: Mapping[str, Path] | None = None,
        version: str = "",
    ) -> None:
        self.source, self.files, self.version = source, dict(files or {}), version
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self._function: JudgingFunction = function if isinstance(function, JudgingFunction) else LocalFunction(function)

    @property
    def per(self) -> Per:
        """What it judges in one call."""
        return self._function.wants.per

    def names(self, argument: str) -> bool:
        """Whether the function names such an argument."""
        return argument in self._function.wants.named

    @property
    def _sampled(self) -> tuple[str, ...]:
        return SAMPLED_ONE if self.per == "sample" else SAMPLED

    def begin(self, batch: RewardBatch) -> Begun[Judgement]:
        """Begins one call, of a batch of what it judges in one: see ``score``, whose errors the result raises."""
        self.require_columns(batch.columns)
        ids, stops = [r.completion_ids for r in batch.rollouts], [r.stop for r in batch.rollouts]
        lists: tuple[Seq[Any], ...] = (batch.prompts, batch.completions, ids, stops)
        sampled = dict(zip(self._sampled, lists, strict=True))
        if not self.names(self._sampled[-1]):
            del sampled[self._sampled[-1]]
        offered: dict[str, Any] = {**batch.columns, **sampled}
        if self.per == "sample":
            offered = {name: value for name, (value,) in offered.items()}
        seed = None if batch.seed is None else derive_seed(batch.seed, self.name)
        arguments = self._function.wants.of_offered(offered)
        return self._function.begin(arguments, len(batch.completions), seed, partial(self._in_words, batch))

    def score(self, batch: RewardBatch) -> Scores:
        """One number a sample, None where the function leaves it out.

        Raises UserError: where the function wants a column that the dataset lacks; where it returns anything but one
        finite number or None a sample (which one, and its completion). Raises RunFailure where it raises (the
        exception, the line, and the sample that it was at, where its variables show that).
        """
        return self.judge(batch).scores

    def judge(self, batch: RewardBatch) -> Judgement:
        """As ``score``, with what all its calls have counted."""
        found = wait_all([self.begin(one) for one in divided(batch, self.per)])
        return Judgement([score for one in found for score in one.scores], added_up(one.counts for one in found))

    def require_columns(self, columns: Iterable[str], dataset: str = "the dataset") -> None:
        """Raises UserError where the function wants a column that the dataset does not have."""
        offered = {*columns, *self._sampled}
        wanted = self._function.wants.one_of
        if wanted and offered.isdisjoint(wanted):
            names, present = " or ".join(map(repr, wanted)), ", ".join(sorted(columns)) or "none"
            raise UserError(
                f"reward {self.name!r} wants the column {names}, which {dataset} lacks; columns present: {present}"
            )
        for name in self._function.wants.required:
            if name not in offered:
                hint = ""
                if self.per != "sample" and name in SAMPLED_ONE:
                    hint = f", or {name!r} with @tandem.judges('sample') above the function"
                raise UserError(
                    f"reward {self.name!r} wants the column {name!r}, which {dataset} lacks; it can have: "
                    f"{', '.join(sorted(offered))}{hint}"
                )

    def _in_words(self, batch: RewardBatch, fault: Fault) -> UserError:
        where = "" if fault.sample is None else sample_in_words(batch, fault.sample)
        kind = RunFailure if fault.raised else UserError
        return kind(f"reward {self.name!r} {fault.what}{where}{fault.then}")


def added_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of each, 0 included."""
    found: dict[str, int] = {}
    for of_one in counts:
        for name, count in of_one.items():
            found[name] = found.get(name, 0) + count
    return found


def divided(batch: RewardBatch, per: Per) -> Iterator[RewardBatch]:
    """The batch in parts of what is judged in one call, each with a seed of its own."""
    rollouts = batch.rollouts
    if per == "all":
        yield batch
        return
    starts = [
        i
        for i, rollout in enumerate(rollouts)
        if per == "sample"
        or i == 0
        or rollout.prompt_id != rollouts[i - 1].prompt_id
        or rollout.sample_index <= rollouts[i - 1].sample_index
    ]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(rollouts)], strict=True)):
        yield replace(
            batch,
            prompts=batch.prompts[start:end],
            completions=batch.completions[start:end],
            rollouts=rollouts[start:end],
            columns={name: values[start:end] for name, values in batch.columns.items()},
            seed=None if batch.seed is None else derive_seed(batch.seed, number),
        )


def sample_in_words(batch: RewardBatch, index: int) -> str:
    """A sample as an error names it: its place (in its group, if it is alone), prompt and completion, shortened."""
    completion, rollout = batch.completions[index], batch.rollouts[index]
    number = rollout.sample_index if len(batch.rollouts) == 1 else index
    return f"sample {number} (prompt {rollout.prompt_id}): completion {shortened(repr(text_of(completion)))}"
