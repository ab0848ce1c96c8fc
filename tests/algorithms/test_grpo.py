"""GRPO against TRL's numbers and the paper's equation written as loops."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from sampled_step import make_step

from tandem.algorithms.grpo import GRPO
from tandem.data.packing import pack, stamp_weights
from tandem.errors import UserError
from tandem.types import Group, Outputs, Prompt, Rollout, Sequence


@pytest.fixture
def step():
    return make_step(0)


def group(*rewards):
    rollouts = [
        Rollout(
            prompt_id="p",
            sample_index=i,
            token_ids=[0, 1],
            prompt_length=1,
            trainable=[False, True],
            behaviour_logp=[0.0, 0.0],
            untruncated_logp=[0.0, 0.0],
            stop="error" if r == "error" else "eos",
            reward=0.0 if r == "error" else r,
        )
        for i, r in enumerate(rewards)
    ]
    return Group(prompt=Prompt(prompt_id="p", prompt="", token_ids=(0,)), rollouts=rollouts)


def test_advantages_golden_from_trl():
    # TRL 1.16 grpo_trainer with scale_rewards="group": (r - mean) / (std + 1e-4), in float64.
    expected = [0.35852573077925715, -0.8365600384849332, -0.8365600384849332, -0.239017153852838, 1.5536115000434474]
    assert GRPO().advantages(group(1.0, 0.0, 0.0, 0.5, 2.0)) == pytest.approx(expected, abs=1e-12)
    # scale_rewards="none" (Dr.GRPO).
    assert GRPO(normalize="none").advantages(group(1.0, 0.0, 0.0, 0.5, 2.0)) == pytest.approx(
        [0.3, -0.7, -0.7, -0.2, 1.3], abs=1e-12
    )


def test_what_failed_enters_no_baseline():
    alone = GRPO().advantages(group(1.0, 0.0, 2.0))
    assert GRPO().advantages(group(1.0, "error", 0.0, None, 2.0)) == alone


@pytest.mark.parametrize("normalize", ["std", "none"])
@pytest.mark.parametrize("rewards", [(1.0,), (0.1, 0.1, 0.1), ("error", 1.0)])
def test_groups_of_one_and_ties_give_zero(normalize, rewards):
    advantages = GRPO(normalize=normalize).advantages(group(*rewards))
    assert set(advantages) == {0.0}


@pytest.mark.parametrize(
    ("knobs", "mean", "length"),
    [
        ({}, "sequence", None),
        ({"aggregation": "token", "clip_high": 0.28}, "token", None),
        ({"aggregation": "constant"}, "constant", 20),
    ],
)
def test_loss_is_the_papers(step, knobs, mean, length):
    """arXiv:2402.03300, eq. 3 and 4, as loops; over tokens as DAPO's eq. 8, over a fixed length as Dr.GRPO."""
    grpo = GRPO(**knobs)
    estimate = grpo.estimate(step.groups, step.batch(), grpo.initial_state())
    batch = stamp_weights(estimate.batch, grpo.aggregation, constant_length=length)
    got = (grpo.loss(step.outputs(batch), batch).loss_T * batch.weight_T).sum().item()

    sequences, s = [], 0
    for g in step.groups:
        baseline, std = statistics.fmean(g.rewards), statistics.stdev(g.rewards)
        for rollout in g.rollouts:
            advantage = (rollout.reward - baseline) / (std + 1e-4)
            start, tokens = batch.bounds[s].item(), []
            for t, trainable in enumerate(rollout.trainable):
                if not trainable:
                    continue
                logp, old = step.theta[rollout.token_ids[t]].item(), batch.old_logp_T[start + t].item()
                ratio, x = math.exp(logp - old), batch.reference_logp_T[start + t].item() - logp
                clipped = min(max(ratio, 0.8), 1 + grpo.clip_high)
                tokens.append(-min(ratio * advantage, clipped * advantage) + 0.04 * (math.exp(x) - x - 1))
            sequences.append(tokens)
            s += 1
    totals = [sum(tokens) for tokens in sequences]
    expected = {
        "sequence": statistics.fmean(total / len(tokens) for total, tokens in zip(totals, sequences, strict=True)),
        "token": sum(totals) / sum(map(len, sequences)),
        "constant": sum(totals) / (len(sequences) * 20),
    }[mean]
    # Advantages and weights are float32.
    assert got == pytest.approx(expected, abs=1e-6)


def test_loss_golden_from_trl():
    # The golden of test_ppo's KL loss: the per-token loss is the same function.
    def tensor(*x):
        return torch.tensor([0.0, *x], dtype=torch.float64)

    batch = replace(
        pack([Sequence(token_ids=[0] * 7, trainable=[False] + [True] * 6)]),
        old_logp_T=tensor(-0.7, -1.0, -0.3, -1.2, -1.6, -1.9),
        reference_logp_T=tensor(-0.6, -1.1, -0.5, -1.7, -1.0, -0.4),
        advantage_T=tensor(1.0, -0.5, 2.0, -1.5, 0.8, -0.6),
        kl_coef=0.04,
    )
    out = Outputs(logp_T=tensor(-0.5, -1.2, -0.3, -2.0, -0.9, -0.1))
    stamped = stamp_weights(batch, "sequence")
    loss_T = GRPO().loss(out, stamped).loss_T
    # TRL 1.16 grpo_trainer, loss_type="grpo", epsilon 0.2, beta 0.04: the scalar loss.
    assert (loss_T * stamped.weight_T).sum().item() == pytest.approx(0.18068733276768145, abs=1e-7)


def test_no_reference_is_needed_without_a_kl_coefficient(step):
    grpo = GRPO(kl_coef=0.0)
    assert not grpo.needs_reference
    batch = replace(step.batch(), reference_logp_T=None)
    estimate = grpo.estimate(step.groups, batch, {})
    assert torch.isfinite(grpo.loss(step.outputs(estimate.batch), estimate.batch).loss_T).all()


def test_impossible_knobs():
    with pytest.raises(UserError, match="clip_low: expected from 0 to 1, got 2"):
        GRPO(clip_low=2)


def test_share_of_groups_that_teach_nothing(step):
    for rollout in step.groups[1].rollouts:
        rollout.reward = 0.3
    metrics = GRPO().estimate(step.groups, step.batch(), {}).metrics
    assert metrics["equal_reward_groups"] == 0.25
    assert set(metrics) == {"equal_reward_groups", "kl", "kl_per_sequence"}


def test_loss_gradcheck(step):
    grpo = GRPO()
    batch = grpo.estimate(step.groups, step.batch(), {}).batch.select([0, 1])
    logp = step.theta[batch.token_ids_T].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo.loss(Outputs(logp_T=x), batch).loss_T, (logp,))
