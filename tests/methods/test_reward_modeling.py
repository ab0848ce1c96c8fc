"""The reward-model loss against OpenRLHF's and TRL's losses, and its independence of packing."""

import math
import random
import statistics

import pytest
import torch
from helpers.models import micro_batches

from tandem.batch import Outputs
from tandem.data.packing import pack_pairs, stamp_unit_weights
from tandem.methods.rm import RewardModeling
from tandem.models.loading import load_scalar
from tandem.models.sharing import sharing_of
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import PreferencePair, Sequence

CHOSEN, REJECTED, MARGIN = [1.3, -0.2, 0.5], [0.4, 0.6, 0.5], [0.0, 0.5, 0.25]
# OpenRLHF 0.11.2 models/loss.PairWiseLoss on each pair, in float64; TRL 1.16 reward_trainer has the same formula.
LOSSES = [0.3411538747320878, 1.5410084538329922, 0.8259394198788436]


def sequence(start, length):
    return Sequence(token_ids=list(range(start, start + length)), trainable=[False] + [True] * (length - 1))


PAIRS = [
    PreferencePair(chosen=sequence(10 * i, 3 + i), rejected=sequence(10 * i + 5, 2 + i), margin=m)
    for i, m in enumerate(MARGIN)
]
SCORES = torch.zeros(40, dtype=torch.float64)
for i, (c, r) in enumerate(zip(CHOSEN, REJECTED, strict=True)):
    SCORES[PAIRS[i].chosen.token_ids[-1]], SCORES[PAIRS[i].rejected.token_ids[-1]] = c, r


def outputs(batch, scores=SCORES):
    return Outputs(scalar_T=scores[batch.token_ids_T])


def total(method, batch, scores=SCORES):
    return (method.loss(outputs(batch, scores), batch).loss_T * batch.weight_T).sum()


def test_golden():
    batch = stamp_unit_weights(pack_pairs(PAIRS))
    token_loss = RewardModeling().loss(outputs(batch), batch)
    last = batch.last_S[0::2]
    assert token_loss.loss_T[last].tolist() == pytest.approx(LOSSES, abs=1e-7)
    elsewhere = torch.ones(batch.tokens, dtype=torch.bool)
    elsewhere[last] = False
    assert (token_loss.loss_T[elsewhere] == 0).all()
    assert total(RewardModeling(), batch).item() == pytest.approx(statistics.fmean(LOSSES), abs=1e-7)


def test_centering_is_trls():
    # TRL adds center_rewards_coefficient * mean((chosen + rejected)^2).
    batch = stamp_unit_weights(pack_pairs(PAIRS))
    penalty = statistics.fmean((c + r) ** 2 for c, r in zip(CHOSEN, REJECTED, strict=True))
    got = total(RewardModeling(center_coef=0.01), batch).item()
    assert got == pytest.approx(statistics.fmean(LOSSES) + 0.01 * penalty, abs=1e-7)


def test_metrics_sit_where_the_weights_are():
    batch = stamp_unit_weights(pack_pairs(PAIRS))
    metrics_T = RewardModeling().loss(outputs(batch), batch).metrics_T
    weighted = {name: value_T[batch.weight_T != 0].mean().item() for name, value_T in metrics_T.items()}
    # The third pair is a tie: wrong.
    assert weighted == pytest.approx(
        {
            "accuracy": 1 / 3,
            "score_gap": statistics.fmean(c - r for c, r in zip(CHOSEN, REJECTED, strict=True)),
            "chosen_score": statistics.fmean(CHOSEN),
            "rejected_score": statistics.fmean(REJECTED),
        }
    )


def test_a_tie_costs_log_two():
    batch = stamp_unit_weights(pack_pairs([PreferencePair(chosen=sequence(0, 2), rejected=sequence(5, 2))]))
    assert total(RewardModeling(), batch, torch.ones(40, dtype=torch.float64)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "change", [lambda b: micro_batches(b, 1), lambda b: micro_batches(b, 9), lambda b: [b.select([2, 0, 1])]]
)
def test_packing_and_micro_batches_do_not_matter(change):
    batch = stamp_unit_weights(pack_pairs(PAIRS))
    method = RewardModeling(center_coef=0.01)
    gradients, losses = [], []
    for parts in ([batch], list(change(batch))):
        scores = SCORES.clone().requires_grad_()
        loss = sum(total(method, part, scores) for part in parts)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, scores)[0])
    assert losses[1] == pytest.approx(losses[0], abs=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_gradcheck():
    batch = stamp_unit_weights(pack_pairs(PAIRS))
    scalar_T = outputs(batch).scalar_T.requires_grad_()
    method = RewardModeling(center_coef=0.01)
    assert torch.autograd.gradcheck(lambda x: method.loss(Outputs(scalar_T=x), batch).loss_T, (scalar_T,))


def test_a_shared_prompt_changes_neither_loss_nor_gradient(model_folder):
    """Law 3, on a real model: pairs whose prompts go through once, against each sequence by itself."""
    rng = random.Random(0)

    def ids(count):
        return [rng.randrange(2, 60) for _ in range(count)]

    pairs = []
    for length in (40, 12, 25, 3):
        prompt = ids(length)
        sides = [Sequence(token_ids=[*prompt, *answer], trainable=[False] * length + [True] * len(answer))
                 for answer in (ids(5), ids(9))]  # fmt: skip
        pairs.append(PreferencePair(chosen=sides[0], rejected=sides[1], margin=rng.random()))
    model = load_scalar(model_folder, new_head="random", seed=0, device="cpu")
    method = RewardModeling(center_coef=0.01)
    trainer = LocalTrainer(model, method.loss, OptimParams(learning_rate=0.0, total_steps=1), token_budget=10_000)
    batch = stamp_unit_weights(pack_pairs(pairs))
    assert sharing_of(batch).dropped_S.sum() == 80
    found = []
    for variant, budget in ((batch.unshared(), 10_000), (batch, 10_000), (batch, 70), (batch.select([3, 1, 0, 2]), 1)):
        trainer.token_budget = budget
        trainer.optimizer.zero_grad()
        loss = trainer.forward_backward(variant)["loss"]
        found.append((loss, [p.grad.clone() for p in model.module.parameters()]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        for gradient, wanted in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-6 * max(wanted.abs().max().item(), 1.0))
