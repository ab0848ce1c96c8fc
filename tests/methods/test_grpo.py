"""GRPO against TRL's numbers and the paper's equation written as loops."""

import math
import statistics

import pytest
import torch
from helpers.batches import unseen_by
from helpers.sampled_step import make_step

from tandem.batch import Outputs
from tandem.config import settings, with_keys
from tandem.data.packing import stamp_weights
from tandem.errors import UserError
from tandem.methods.grpo import GRPO
from tandem.types import Group, Prompt, Rollout

PAPER = {"aggregation": "sequence", "kl_coef": 0.04, "kl_estimator": "k3", "dual_clip": None}
"""The settings of arXiv:2402.03300."""


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
        (PAPER, "sequence", None),
        (PAPER | {"aggregation": "token", "clip_high": 0.28}, "token", None),
        (PAPER | {"aggregation": "constant"}, "constant", 20),
    ],
)
def test_loss_is_the_papers(step, knobs, mean, length):
    """arXiv:2402.03300, eq. 3 and 4, as loops; over tokens as DAPO's eq. 8, over a fixed length as Dr.GRPO."""
    grpo = with_keys(GRPO(), **knobs)
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
                logp, old = step.theta[rollout.token_ids[t]].item(), batch.proximal_logp_T[start + t].item()
                ratio, x = math.exp(logp - old), batch.logp_by("reference")[start + t].item() - logp
                clipped = min(max(ratio, 0.8), 1 + settings(grpo)["clip_high"])
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


def test_no_reference_is_needed_without_a_kl_coefficient(step):
    grpo = GRPO()
    assert grpo.needs() == ()
    batch = unseen_by(step.batch(), "reference")
    estimate = grpo.estimate(step.groups, batch, grpo.initial_state())
    assert torch.isfinite(grpo.loss(step.outputs(estimate.batch), estimate.batch).loss_T).all()


def test_impossible_knobs():
    with pytest.raises(UserError, match="clip_low: expected from 0 to 1, got 2"):
        with_keys(GRPO(), clip_low=2)


def test_kl_in_the_reward_is_each_samples_own(step):
    """The sum over a sample's trainable tokens, off its reward before the mean is taken; left out are left out."""
    step.groups[0].rollouts[1].reward = None
    step.groups[2].rollouts[0].stop = "error"
    batch = step.batch()
    grpo = with_keys(GRPO(), kl="reward", kl_coef=0.3)
    got = grpo.estimate(step.groups, batch, grpo.initial_state())
    s = 0
    for g in step.groups:
        charged = []
        for r in g.usable:
            at = [batch.bounds[s].item() + t for t, trainable in enumerate(r.trainable) if trainable]
            charged.append(r.reward - 0.3 * sum((batch.proximal_logp_T - batch.logp_by("reference"))[at].tolist()))
            s += 1
        mean, std = statistics.fmean(charged), statistics.stdev(charged)
        for i, value in enumerate(charged, start=s - len(charged)):
            rows = slice(batch.bounds[i], batch.bounds[i + 1])
            own = got.batch.advantage_T[rows][batch.trainable_T[rows]]
            assert own.tolist() == pytest.approx([(value - mean) / (std + 1e-4)] * len(own), abs=1e-6)
    # And only there: the loss is the one without a KL.
    out = step.outputs(got.batch)
    assert torch.equal(grpo.loss(out, got.batch).loss_T, GRPO().loss(out, got.batch).loss_T)


def test_share_of_groups_that_teach_nothing(step):
    for rollout in step.groups[1].rollouts:
        rollout.reward = 0.3
    grpo = with_keys(GRPO(), kl="reward", kl_coef=0.1)
    metrics = grpo.estimate(step.groups, step.batch(), grpo.initial_state()).metrics
    assert metrics["equal_reward_groups"] == 0.25
    masked = {"masked_positive", "masked_negative"}
    assert set(metrics) == {"equal_reward_groups", "kl", "kl_per_sequence", "kl_coef"} | masked


@pytest.mark.parametrize("kl_estimator", ["ratio_k3", "k3", "k2"])
def test_loss_gradcheck(step, kl_estimator):
    grpo = with_keys(GRPO(), kl_coef=0.1, kl_estimator=kl_estimator)
    batch = grpo.estimate(step.groups, step.batch(), grpo.initial_state()).batch.select([0, 1])
    logp = step.theta[batch.token_ids_T].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo.loss(Outputs(logp_T=x), batch).loss_T, (logp,))
