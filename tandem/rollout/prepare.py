"""Judged groups into weighted minibatches: packing, scores of the frozen models, advantages, weights."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from tandem.batch import Batch
from tandem.data.packing import pack_rollouts, stamp_weights
from tandem.roles import Algorithm, Metrics, Seat, call_all
from tandem.seeds import derive_seed
from tandem.types import Aggregation, Group

HELD_OUT = ("reward", "response_length", "eos_share")
"""Of held-out samples 3 kinds of metrics are reported: those whose names begin with one of these words."""


@dataclass(kw_only=True)
class Prepared:
    """A step's batch, ready to be cut into minibatches, and the algorithm's next state."""

    batch: Batch
    state: dict[str, float]
    metrics: Metrics
    epochs: int
    minibatches: int
    aggregation: Aggregation
    constant_length: int
    seed: int

    def __len__(self) -> int:
        """Minibatches in all: fewer than asked for where there are fewer sequences."""
        return self.epochs * min(self.minibatches, self.batch.units)

    def __iter__(self) -> Iterator[Batch]:
        """Minibatches of whole sequences, shuffled anew each epoch by the step's own seed.

        Weights are stamped from all of a minibatch's tokens, before it is cut into micro-batches.
        """
        count = len(self) // self.epochs
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "minibatches", epoch))
            order = torch.randperm(self.batch.units, generator=generator)
            for units in order.tensor_split(count):
                minibatch = self.batch if count == self.epochs == 1 else self.batch.select(units.tolist())
                yield stamp_weights(minibatch, self.aggregation, constant_length=self.constant_length)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What stands between judged groups and the trainer.

    ``old_logp`` says what the policy ratio is taken against: ``sampler`` (the engine's log-probs, nothing to
    compute) or ``trainer`` (a forward of ``actor`` at the start of the step). That forward is saved where it would be
    the very one that is trained on: one epoch, one minibatch, and an algorithm that does not ask before its loss.
    """

    algorithm: Algorithm
    reference: Seat | None = None
    critic: Seat | None = None
    actor: Seat | None = None
    old_logp: Literal["sampler", "trainer"] = "sampler"
    epochs: int = 1
    minibatches: int = 1
    max_new_tokens: int = 0
    seed: int = 0

    def __call__(self, groups: Seq[Group], state: dict[str, float], step: int) -> Prepared:
        """At least one rollout must be usable, which ``Judge`` sees to."""
        rollouts = [r for group in groups for r in group.usable]
        batch = pack_rollouts(rollouts)
        metrics: Metrics = {}
        asked: dict[str, Seat | None] = {"reference": self.reference, "critic": self.critic}
        on_policy = self.epochs == self.minibatches == 1 and not self.algorithm.needs_old_logp
        if self.old_logp == "trainer" and not on_policy:
            asked["actor"] = self.actor
        scores = call_all({role: seat for role, seat in asked.items() if seat is not None}, "score", batch)
        batch = replace(
            batch,
            on_policy=self.old_logp == "trainer" and on_policy,
            reference_logp_T=scores["reference"].logp_T if "reference" in scores else None,
            old_value_T=scores["critic"].value_T if "critic" in scores else None,
            old_logp_T=scores["actor"].logp_T if "actor" in scores else None,
        )
        if "actor" in scores:
            metrics |= sampler_gap(batch)
        estimate = self.algorithm.estimate(groups, batch.to("cpu"), state)
        for rollout, advantage in zip(rollouts, mean_advantages(estimate.batch), strict=True):
            rollout.advantage = advantage
        return Prepared(
            batch=estimate.batch,
            state=estimate.state,
            metrics=metrics | estimate.metrics,
            epochs=self.epochs,
            minibatches=self.minibatches,
            aggregation=self.algorithm.aggregation,
            constant_length=self.max_new_tokens,
            seed=derive_seed(self.seed, "step", step),
        )


def mean_advantages(batch: Batch) -> list[float]:
    """Each segment's mean advantage over its trainable tokens."""
    if batch.advantage_T is None:
        raise ValueError("the batch has no advantage_T")
    trained_T = batch.trainable_T.double()
    # Differences of running sums: one pass, where a sum for each segment takes several operations for each.
    running_2T = torch.stack([batch.advantage_T * trained_T, trained_T]).cumsum(1)
    sum_S, count_S = F.pad(running_2T, (1, 0))[:, batch.bounds].diff(dim=1)
    return (sum_S / count_S.clamp(min=1)).tolist()


def sampler_gap(batch: Batch) -> Metrics:
    """Largest and mean absolute difference between the sampler's and the trainer's log-probs, in nats."""
    if batch.old_logp_T is None or batch.behaviour_logp_T is None:
        raise ValueError("sampler_gap needs old_logp_T and behaviour_logp_T")
    gap_N = (batch.old_logp_T.cpu() - batch.behaviour_logp_T.cpu())[batch.trainable_T.cpu()].abs()
    return {"sampler_gap_max": gap_N.max().item(), "sampler_gap_mean": gap_N.mean().item()}


def held_out_metrics(groups: Seq[Group]) -> Metrics:
    """Reward, lengths and how they ended, of samples that are not trained on: names begin with ``eval/``."""
    return {f"eval/{name}": v for name, v in rollout_metrics(groups).items() if name.startswith(HELD_OUT)}


def rollout_metrics(groups: Seq[Group]) -> Metrics:
    """Reward and its spread, lengths, how they ended, and how many were left out."""
    rollouts = [r for group in groups for r in group.rollouts]
    usable = [r for r in rollouts if r.usable]
    rewards = torch.tensor([r.reward for r in usable], dtype=torch.float64)
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts], dtype=torch.float64)
    metrics: Metrics = {
        "reward": rewards.mean().item() if usable else float("nan"),
        "reward_std": rewards.std(correction=0).item() if usable else float("nan"),
        "reward_min": rewards.min().item() if usable else float("nan"),
        "reward_max": rewards.max().item() if usable else float("nan"),
        "response_length": lengths.mean().item(),
        "response_length_max": lengths.max().item(),
        "eos_share": sum(r.stop != "length" for r in rollouts) / len(rollouts),
        "left_out": float(len(rollouts) - len(usable)),
        "sampled_tokens": float(lengths.sum()),
    }
    for name in sorted({name for r in rollouts for name in r.reward_parts}):
        parts = [r.reward_parts[name] for r in rollouts if name in r.reward_parts]
        metrics[f"reward/{name}"] = sum(parts) / len(parts)
    return metrics
