"""Held-out data measured after a step: rows and text by the method's own loss, prompts by samples that are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tandem.errors import RunFailure
from tandem.roles import Clock, Engine, Metrics, Seat
from tandem.rollout.judging import Judge
from tandem.rollout.measure import held_out_metrics
from tandem.rollout.prepare import Preparation
from tandem.rollout.sampling import groups_of, requests_of
from tandem.seeds import derive_seed
from tandem.types import Group, Prompt, SamplingParams

ROWS_AT_A_TIME = 64
"""Held-out rows of which a teacher's words are held at a time: 64."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one evaluation found."""

    metrics: Metrics = field(default_factory=dict)
    """Their names begin with ``eval/``, those of a set that has a name with ``eval/NAME/``."""
    groups: Mapping[str, Seq[Group]] = field(default_factory=dict)
    """The judged samples that they are of, by the name of their set."""


HeldOut = Callable[[int, Clock], Evaluation]
"""Measures held-out sets (by name; that of one that needs none is empty) with the weights that a step has ended with.
Changes nothing that training reads."""


@dataclass(frozen=True, kw_only=True)
class HeldOutRows:
    """Sets of tokenized rows, or of windows of text: the loss, and whatever the method's loss measures beside it."""

    sets: Mapping[str, Iterable[Any]]
    actor: Seat
    prepare: Preparation
    at_a_time: int | None = None
    """Rows of a set that are packed together. None: all, or 64 where a teacher says much of each token."""

    def __call__(self, step: int, phase: Clock) -> Evaluation:
        """Each set is gone through once, in order, and weighted as one optimizer step would be."""
        metrics: Metrics = {}
        for name, rows in self.sets.items():
            with phase("evaluating"):
                found = self._found(rows, step)
                metrics |= named(name, found | self.prepare.method.measured(found))
        return Evaluation(metrics=metrics)

    def _found(self, rows: Iterable[Any], step: int) -> Metrics:
        """The means over all rows."""
        method, rest = self.prepare.method, iter(rows)
        size = self.at_a_time or (None if method.asks.divergence is None else ROWS_AT_A_TIME)
        parts: list[tuple[Metrics, Metrics]] = []
        while some := [*islice(rest, size)]:
            (batch,) = self.prepare(some, {}, step)
            found, trained = self.actor.call("evaluate", batch), batch.trainable_T.sum().item()
            weights = dict.fromkeys(found, trained)
            weights["loss"] = batch.segments if method.aggregation == "sequence" else trained
            parts.append((found, weights))
        if len(parts) == 1:
            return parts[0][0]
        return {
            name: sum(found[name] * weights[name] for found, weights in parts)
            / sum(weights[name] for _, weights in parts)
            for name in parts[0][0]
        }


@dataclass(frozen=True, kw_only=True)
class HeldOutSamples:
    """Sets of prompts, each sampled a few times: judged, or measured by the method where nothing judges.

    The draws are those of step 0, which trains on nothing: the same at each evaluation, and none of training's.
    """

    sets: Mapping[str, Seq[Prompt]]
    engine: Engine
    params: SamplingParams
    samples_per_prompt: int
    judge: Judge
    success: float | None
    """The reward from which a sample is right (``measure.pass_at``)."""
    prepare: Preparation
    seed: int

    def __call__(self, step: int, phase: Clock) -> Evaluation:
        """All sets are sampled together. Raises RunFailure where two samples are of different weights."""
        params, count = self.params, self.samples_per_prompt
        requests = {
            name: requests_of(prompts, params, samples_per_prompt=count, seed=self.seed, step=0)
            for name, prompts in self.sets.items()
        }
        together = [request for of_set in requests.values() for request in of_set]
        with phase("evaluating", of=len(together) * count, done=lambda: self.engine.ended):
            completions = iter(self.engine.generate(together))
            groups = {
                name: groups_of(prompts, [next(completions) for _ in prompts]) for name, prompts in self.sets.items()
            }
            require_one_version(step, [group for of_set in groups.values() for group in of_set])
            for of_set in groups.values():
                self.judge(of_set, derive_seed(self.seed, "judge", 0))
        metrics: Metrics = {}
        for name, of_set in groups.items():
            metrics |= named(name, self._measured(of_set))
        return Evaluation(metrics=metrics, groups=groups)

    def _measured(self, groups: Seq[Group]) -> Metrics:
        if self.judge.rewards:
            return held_out_metrics(groups, success=self.success)
        _, estimate = self.prepare.estimated(groups, self.prepare.method.initial_state())
        return held_out_metrics(groups, judged=False) | estimate.metrics


def named(name: str, metrics: Metrics) -> Metrics:
    """Metrics of a held-out set under their names in ``metrics.jsonl``."""
    return {f"eval/{name}/{metric}" if name else f"eval/{metric}": value for metric, value in metrics.items()}


def require_one_version(step: int, groups: Seq[Group]) -> None:
    """Raises RunFailure where not all samples were drawn from the weights of one version."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    oldest = min(rollout.version_min for rollout in rollouts)
    newest = max(rollout.version_max for rollout in rollouts)
    if oldest != newest:
        raise RunFailure(
            f"the evaluation after step {step} has samples of weights that had seen {oldest} to {newest} optimizer "
            "steps, so it measures none of them; the engine took new weights while it sampled; go on with --resume"
        )
