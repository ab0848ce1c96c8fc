"""A step of any method: items such as it reads, packed, seen by the models it needs, and its losses' gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from helpers.sampled_step import make_step
from tandem.batch import Batch, Outputs
from tandem.data.packing import pack, pack_examples, stamp
from tandem.methods.base import Estimate, Method, Samples
from tandem.types import LabelledAnswer, PreferencePair, Sequence, Solution

IDS = 4000
"""Token ids below this. Every token of a step has an id of its own, which stands for it however it is packed."""
Cut = Callable[[Batch], list[Batch]]


def items_of(method: Method, seed: int = 0, **extra: int) -> list[Any]:
    """Groups of judged samples, demonstrations, preference pairs or labelled answers, as the method reads them.

    One of the groups has equal rewards. ``extra`` is ``make_step``'s.
    """
    if isinstance(method.reads, Samples):
        groups = make_step(seed, **extra).groups
        for rollout in groups[1].rollouts:
            rollout.reward = 0.3
        return groups
    rng, ids = random.Random(seed), iter(range(IDS))

    def row(prompt: int, answer: int) -> Sequence:
        own = [next(ids) for _ in range(prompt + answer)]
        return Sequence(token_ids=own, trainable=[False] * prompt + [True] * answer)

    if method.reads.kind == "unpaired":
        return [LabelledAnswer(answer=row(2, rng.randint(1, 9)), desirable=i % 3 != 1) for i in range(7)]
    if method.reads.kind == "steps":
        labels = [[1.0, 1.0], [1.0, 0.0, 0.0], [0.3], [0.9, 0.5, 0.2, 0.8], [1.0]]
        texts = [row(8, 2 * len(of)) for of in labels]
        for text in texts:
            text.trainable = [False] * 8 + [False, True] * (len(text.trainable) // 2 - 4)
        return [Solution(text=t, labels=of, prompt_length=8) for t, of in zip(texts, labels, strict=True)]
    if method.reads.kind in ("demonstrations", "text"):
        return [row(rng.randint(1, 4), rng.randint(1, 9)) for _ in range(7)]
    return [
        PreferencePair(chosen=row(2, rng.randint(1, 9)), rejected=row(2, rng.randint(1, 9)), margin=rng.random())
        for _ in range(5)
    ]


def doubled(batch: Batch) -> Batch:
    """The batch in float64."""
    floats = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(
        batch,
        **{name: x.double() for name, x in floats.items() if isinstance(x, Tensor) and x.is_floating_point()},
    )


class Models:
    """The policy and the models that a method needs: what each says of a token is an entry of its table, by id.

    ``tables`` are those being trained, by role; at the start of the step each said what is in ``start``. The
    ``sampler`` is nearly the policy at the start: for one token in ten it is far off.
    """

    def __init__(self, method: Method, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads = {"actor": method.head} | {need.role: need.head for need in method.needs()}
        self.diverges = method.asks_of("actor").divergence is not None
        self.start, self.tables = {}, {}
        for role, head in self.heads.items():
            drawn = torch.randn(2, IDS, generator=generator, dtype=torch.float64)
            self.start[role] = 0.5 * drawn[0] - (1.5 if head == "lm" else 0.0)
            if role in method.losses():
                self.tables[role] = (self.start[role] + 0.2 * drawn[1]).requires_grad_()

        drawn = torch.randn(2, IDS, generator=generator, dtype=torch.float64)
        self.sampler = self.start["actor"] + torch.where(drawn[0] > 1.3, 3.0, 0.01) * drawn[1]

    def said(self, role: str, table: Tensor, batch: Batch) -> Outputs:
        table_T = table[batch.token_ids_T]
        if self.heads[role] == "scalar":
            return Outputs(scalar_T=table_T)
        square_T = table_T.square() * batch.trainable_T
        asked = role == "actor" and self.diverges
        return Outputs(
            logp_T=table_T * batch.trainable_T, entropy_T=square_T, divergence_T=square_T / 2 if asked else None
        )

    def seen(self, batch: Batch) -> dict[str, Outputs]:
        """What all of them said at the start of the step."""
        return {role: self.said(role, table, batch) for role, table in self.start.items()}


def estimated(method: Method, models: Models, items: Seq[Any]) -> Estimate:
    """The items that the method keeps, packed, seen, estimated, and with their weights stamped."""
    kept = [item for item in items if method.keep(item)]
    batch = doubled(pack_examples([example for item in kept for example in method.examples(item)]))
    if sequences := method.aside(kept, None):
        aside = doubled(pack(sequences))
        batch = replace(batch, aside=replace(aside, seen=models.seen(aside)))
    if batch.untruncated_logp_T is not None:
        batch = replace(batch, untruncated_logp_T=models.sampler[batch.token_ids_T] * batch.trainable_T)
    estimate = method.estimate(kept, replace(batch, seen=models.seen(batch)), method.initial_state())
    return replace(estimate, batch=doubled(stamp(estimate.batch, method.aggregation, constant_length=16)))


def losses_and_gradients(method: Method, models: Models, batch: Batch, cut: Cut = lambda batch: [batch]) -> Tensor:
    """Of every model that is trained: its loss and its gradient by token id, added up over micro-batches."""
    found = []
    for role, loss in method.losses().items():
        table, total = models.tables[role], torch.zeros((), dtype=torch.float64)
        for micro in cut(batch):
            total = total + (loss(models.said(role, table, micro), micro).loss_T * micro.weight_T).sum()
        found += [total.detach()[None], *torch.autograd.grad(total, table)]
    return torch.cat(found)
