"""Law 3: packing, order, token budget and accumulation change neither loss nor gradient: within 1e-6, in float32.

On the cut that the trainer makes, prompts that several samples share included, against a float64 copy of the module
that sees one sequence at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.models import VOCABULARY, make_module, make_tokenizer
from torch import Tensor

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.data.packing import pack, stamp_weights
from tandem.models.loading import prepare_module
from tandem.parallel.shares import shares
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Sequence

SAMPLES = 4
PROMPTS = (3, 40, 17, 9)
WHOLE = 10_000


def sequences_of() -> list[Sequence]:
    """Four samples of each prompt, and some sequences that begin like no other, one of them of one token."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    made = []
    for length in PROMPTS:
        prompt = ids(length)
        made += [(prompt, ids(5 + 7 * sample)) for sample in range(SAMPLES)]
    made += [([], ids(count)) for count in (1, 2, 90)]
    return [
        Sequence(
            token_ids=[*prompt, *answer],
            trainable=[False] * len(prompt) + (torch.rand(len(answer), generator=generator) < 0.8).tolist(),
        )
        for prompt, answer in made
    ]


def loss(out: Outputs, batch: Batch) -> TokenLoss:
    """One that is not linear in the log-probs: each token's gradient depends on its own."""
    assert out.logp_T is not None
    return TokenLoss(loss_T=(0.3 * out.logp_T).exp() - out.logp_T)


def by_hand(module: Any, sequences: list[Sequence], weight_T: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, of one sequence after the other."""
    module.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        log_p = module(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(1, len(sequence.token_ids)):
            logp = log_p[t - 1, sequence.token_ids[t]]
            total = total + weight_T[start + t].double() * ((0.3 * logp).exp() - logp)
        start += len(sequence.token_ids)
    total.backward()
    return total.item(), {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox", "mistral_sliding", "bloom"])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut(name):
    module = make_module(name)
    truth = copy.deepcopy(module).double()
    trainer = LocalTrainer(
        prepare_module(module, make_tokenizer()), loss, OptimParams(learning_rate=1.0, total_steps=1), token_budget=1
    )
    sequences = sequences_of()
    batch = stamp_weights(pack(sequences), "sequence")
    expected_loss, expected = by_hand(truth, sequences, batch.weight_T)
    order = torch.randperm(batch.units, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled, halves = batch.select(order), [batch.select(order[:7]), batch.select(order[7:])]
    micro_batches = []
    for parts, budget in (
        ([batch], WHOLE), ([batch], 150), ([batch], 60), ([batch], 1), ([shuffled], WHOLE), ([shuffled], 90),
        (halves, WHOLE), (halves, 40),
    ):  # fmt: skip
        trainer.token_budget = budget
        trainer.optimizer.zero_grad()
        micro_batches.append(sum(len(list(shares(part, budget, trainer.world))) for part in parts))
        found = sum(trainer.forward_backward(part)["loss"] for part in parts)
        assert found == pytest.approx(expected_loss, abs=1e-6)
        for parameter_name, parameter in module.named_parameters():
            want = expected[parameter_name]
            # Relative to the largest of the tensor where that is above 1: a float32 has 7 digits.
            scale = max(want.abs().max().item(), 1.0)
            torch.testing.assert_close(parameter.grad.double(), want, atol=1e-6 * scale, rtol=0)
    assert micro_batches[0] == 1
    assert micro_batches[3] == batch.units
    assert len(set(micro_batches)) >= 5
