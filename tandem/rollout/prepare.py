"""Items into weighted minibatches: packing, what other models say of them, the method's estimate, weights."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tandem.batch import Batch, filled
from tandem.data.packing import pack, pack_examples, stamp
from tandem.errors import UserError
from tandem.functional.corrections import mismatch
from tandem.methods.base import Estimate, Method
from tandem.roles import Metrics, Seat, call_all
from tandem.seeds import derive_seed
from tandem.types import Example, Rollout


@dataclass(kw_only=True)
class Prepared:
    """A step's batch, ready to be cut into minibatches, and the method's next state."""

    batch: Batch
    state: dict[str, float]
    metrics: Metrics
    made_by: Preparation
    """What says how it is cut."""
    seed: int
    """The step's own."""

    def __len__(self) -> int:
        """Minibatches in all: fewer than asked for where there are fewer sequences or pairs."""
        return self.made_by.epochs * min(self.made_by.minibatches, self.batch.units)

    def __iter__(self) -> Iterator[Batch]:
        """Minibatches of whole sequences or pairs, shuffled anew each epoch by the step's own seed.

        Weights are stamped from all of a minibatch's tokens, before it is cut into micro-batches.
        """
        epochs, method = self.made_by.epochs, self.made_by.method
        count = len(self) // epochs
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "minibatches", epoch))
            order = torch.randperm(self.batch.units, generator=generator)
            for units in order.tensor_split(count):
                minibatch = self.batch if count == epochs == 1 else self.batch.select(units.tolist())
                yield stamp(minibatch, method.aggregation, constant_length=self.made_by.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What stands between a step's items and the trainers.

    ``models`` are those that say something about a batch: each that the method needs, and the ``actor``. ``old_logp``
    says what the policy ratio is taken against: ``sampler`` (the engine's log-probs, nothing to compute) or
    ``trainer`` (a forward of the actor at the start of the step). That forward is saved where it would be the very one
    that is trained on: one epoch, one minibatch, and a method that does not ask before its loss.
    """

    method: Method
    models: Mapping[str, Seat]
    old_logp: Literal["sampler", "trainer"] = "sampler"
    epochs: int = 1
    minibatches: int = 1
    max_new_tokens: int = 0
    longest: int | None = None
    """Most tokens of a sequence that the method makes of several rows (``Method.aside``). None: without a limit."""
    seed: int = 0

    def __call__(self, items: Seq[Any], state: dict[str, float], step: int) -> Prepared:
        """Raises UserError where there is nothing in the items to train on."""
        examples, estimate = self.estimated(items, state)
        rollouts = [example for example in examples if isinstance(example, Rollout)]
        if rollouts and estimate.batch.advantage_T is not None:
            fill_advantages(rollouts, estimate.batch)
        return Prepared(
            batch=estimate.batch,
            state=estimate.state,
            metrics=estimate.metrics,
            made_by=self,
            seed=derive_seed(self.seed, "step", step),
        )

    def estimated(self, items: Seq[Any], state: dict[str, float]) -> tuple[list[Example], Estimate]:
        """The items' examples; what the models and the method say of them packed, and metrics of that.

        Raises UserError where there is nothing in the items to train on.
        """
        examples = [example for item in items for example in self.method.examples(item)]
        if not examples:
            raise UserError(f"{self.method.title}: none of the {len(items)} items of the step can be trained on")
        batch = pack_examples(examples)
        asked = [need.role for need in self.method.needs()]
        # A loss of pairs takes no ratios.
        own = self.old_logp == "trainer" and not self.method.pairwise
        on_policy = own and self.epochs == self.minibatches == 1 and not self.method.needs_old_logp
        if own and not on_policy:
            asked.append("actor")
        seen = call_all({role: self.models[role] for role in asked}, "score", batch)
        batch = replace(batch, on_policy=on_policy, seen=seen, aside=self._aside(items))
        metrics = sampler_gap(batch) if "actor" in seen else {}
        estimate = self.method.estimate(items, batch.to("cpu"), state)
        return examples, replace(estimate, metrics=metrics | estimate.metrics)

    def _aside(self, items: Seq[Any]) -> Batch | None:
        sequences = self.method.aside(items, self.longest)
        if not sequences:
            return None
        batch = pack(sequences)
        asked = ["actor", *(need.role for need in self.method.needs())]
        seen = call_all({role: self.models[role] for role in asked}, "score", batch)
        return replace(batch, seen=seen).to("cpu")


def fill_advantages(rollouts: Seq[Rollout], batch: Batch) -> None:
    """Gives each rollout that is in the batch, of which a method may leave some out, the advantages of its tokens."""
    advantage_T = filled(batch.advantage_T, "advantage_T").detach().cpu().double().numpy()
    bounds = batch.bounds.tolist()
    numbers = filled(batch.index_S, "index_S").tolist()
    for number, first, end in zip(numbers, bounds, bounds[1:], strict=False):
        rollouts[number].advantages = array("d", advantage_T[first:end].tobytes())


def sampler_gap(batch: Batch) -> Metrics:
    """``functional.corrections.mismatch`` of the trainable tokens of a batch that the actor has seen."""
    gap_T = batch.logp_by("actor").cpu() - filled(batch.untruncated_logp_T, "untruncated_logp_T").cpu()
    return mismatch(gap_T[batch.trainable_T.cpu()])
