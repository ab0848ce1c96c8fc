"""A step of sampled groups, and a policy and a critic small enough to differentiate by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.batches import scalar_outputs, seen_batch
from tandem.batch import Batch, Outputs
from tandem.data.packing import pack_rollouts
from tandem.types import Group, Prompt, Rollout

SAMPLES = 3


@dataclass
class Step:
    """Groups of rollouts whose token ids are all different, so that an id stands for one token of the step.

    Tables are float64 [ids]; each ``*_T`` tensor is looked up by token id, whatever the packing.
    """

    groups: list[Group]
    theta: Tensor
    omega: Tensor
    old_logp: Tensor
    reference_logp: Tensor
    old_value: Tensor

    def batch(self, groups: list[Group] | None = None) -> Batch:
        """The groups packed, with everything that PPO and GRPO may ask for."""
        batch = pack_rollouts([r for g in (groups or self.groups) for r in g.usable])
        ids, mask = batch.token_ids_T, batch.trainable_T
        return seen_batch(
            replace(batch, reward_S=batch.reward_S.double()),
            old_logp_T=self.old_logp[ids] * mask,
            reference_logp_T=self.reference_logp[ids] * mask,
            old_value_T=self.old_value[ids] * mask,
        )

    def outputs(self, batch: Batch) -> Outputs:
        """What a model with parameters ``theta`` (log-probs, entropies) and ``omega`` (values) would say."""
        theta_T, omega_T = self.theta[batch.token_ids_T], self.omega[batch.token_ids_T]
        mask_T = batch.trainable_T
        return replace(scalar_outputs(omega_T * mask_T), logp_T=theta_T * mask_T, entropy_T=theta_T.square() * mask_T)


def make_step(seed: int, groups: int = 4, *, extra_prompt: int = 0, extra_tail: int = 0) -> Step:
    """``extra_prompt`` and ``extra_tail`` add tokens that are not trained on and change nothing else."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    size = 4000
    made, next_id, filler = [], 0, 3000
    for g in range(groups):
        rollouts = []
        for i in range(SAMPLES):
            masks = [rng.random() < 0.7 for _ in range(rng.randint(1, 8))] + [True]
            ids = list(range(next_id, next_id + 2 + len(masks)))
            next_id += len(ids)
            prompt = list(range(filler, filler + extra_prompt)) + ids[:2]
            tail = list(range(filler + extra_prompt, filler + extra_prompt + extra_tail))
            filler += extra_prompt + extra_tail
            tokens = prompt + ids[2:] + tail
            trainable = [False] * len(prompt) + masks + [False] * extra_tail
            rollouts.append(
                Rollout(
                    prompt_id=f"p{g}",
                    sample_index=i,
                    token_ids=tokens,
                    prompt_length=len(prompt),
                    trainable=trainable,
                    behaviour_logp=[0.0] * len(tokens),
                    untruncated_logp=[0.0] * len(tokens),
                    stop="eos",
                    reward=rng.gauss(0, 1),
                )
            )
        made.append(Group(prompt=Prompt(prompt_id=f"p{g}", prompt="", token_ids=()), rollouts=rollouts))

    def table(scale: float) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale

    old = -1.5 + table(0.3)
    return Step(
        groups=made,
        theta=(old + table(0.2)).requires_grad_(),
        omega=table(0.5).requires_grad_(),
        old_logp=old,
        reference_logp=old + table(0.3),
        old_value=table(0.5),
    )
