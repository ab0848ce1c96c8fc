"""RLOO against the paper's estimator written as loops, and against the loss of TRL's trainer."""

import math

import pytest
import torch
from helpers.batches import unseen_by
from helpers.sampled_step import make_step
from test_grpo import group

from tandem.batch import Outputs
from tandem.config import settings, with_keys
from tandem.data.packing import stamp_weights
from tandem.methods.grpo import GRPO
from tandem.methods.rloo import RLOO

NO_KL = {"kl": "none"}


@pytest.fixture
def step():
    return make_step(0)


def leave_one_out(rewards):
    """Each reward less the mean of the others, one after the other."""
    found = []
    for i, reward in enumerate(rewards):
        others = [other for j, other in enumerate(rewards) if j != i]
        found.append(reward - sum(others) / len(others))
    return found


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # By hand: 1 - 3.5/4, 0 - 3.5/4 ..., and of two samples each is the other's baseline.
        ((1.0, 0.0, 0.0, 0.5, 2.0), [0.375, -0.875, -0.875, -0.25, 1.625]),
        ((1.0, 0.0), [1.0, -1.0]),
        ((0.3, 0.3, 0.3), [0.0, 0.0, 0.0]),
        ((1.0,), [0.0]),
        (("error", None, 1.0), [0.0]),
        ((), []),
    ],
)
def test_advantages_by_hand(rewards, expected):
    assert RLOO().advantages(group(*rewards)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_advantages_are_the_papers_and_those_of_the_mean_times_n_over_n_minus_1(step, size):
    rewards = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).tolist()
    found = RLOO().advantages(group(*rewards[:1], None, "error", *rewards[1:]))
    assert found == pytest.approx(leave_one_out(rewards), abs=1e-14)
    centred = GRPO(normalize="none").advantages(group(*rewards))
    assert found == pytest.approx([size / (size - 1) * x for x in centred], abs=1e-14)


def test_the_gradient_of_the_mean_reward_is_met_without_bias():
    """Over every pair of samples of a bandit of 5 tokens, by their probability."""
    rewards = [0.0, 0.1, 0.7, 1.0, 2.0]
    policy = torch.tensor([0.4, 0.3, 0.1, 0.15, 0.05], dtype=torch.float64)
    found = torch.zeros_like(policy)
    for i in range(5):
        for j in range(5):
            for token, advantage in zip((i, j), RLOO().advantages(group(rewards[i], rewards[j])), strict=True):
                log_prob_gradient = torch.eye(5, dtype=torch.float64)[token] - policy
                found += policy[i] * policy[j] * advantage * log_prob_gradient / 2
    rewards_V = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(found, policy * (rewards_V - policy @ rewards_V), rtol=0, atol=1e-15)


def charged(step, batch, coef):
    """The reward of each sample, less the coefficient times its log-ratio to the reference; a list a group."""
    found, s = [], 0
    for g in step.groups:
        found.append([])
        for r in g.usable:
            start = batch.bounds[s].item()
            at = [start + t for t, trainable in enumerate(r.trainable) if trainable]
            ratio = batch.proximal_logp_T[at].sum().item() - batch.logp_by("reference")[at].sum().item()
            found[-1].append(r.reward - coef * ratio)
            s += 1
    return found


def test_the_gradient_is_reinforces_and_trls(step):
    """At the sampling policy. TRL's loss: the mean over samples of -min(s A, clip(s) A), s the whole sample's ratio."""
    rloo = RLOO()
    estimate = rloo.estimate(step.groups, step.batch(), rloo.initial_state())
    batch = stamp_weights(estimate.batch, rloo.aggregation, constant_length=20)
    theta = step.old_logp.clone().requires_grad_()
    loss_T = rloo.loss(Outputs(logp_T=theta[batch.token_ids_T] * batch.trainable_T), batch).loss_T
    (found,) = torch.autograd.grad((loss_T * batch.weight_T).sum(), theta)

    advantages = [a for rewards in charged(step, batch, 0.05) for a in leave_one_out(rewards)]
    samples = [r for g in step.groups for r in g.rollouts]
    own = [[i for i, t in zip(r.token_ids, r.trainable, strict=True) if t] for r in samples]
    reinforce = torch.zeros_like(theta)
    for ids, advantage in zip(own, advantages, strict=True):
        reinforce[ids] = -advantage / len(samples)
    trl = theta.new_zeros(())
    for ids, advantage in zip(own, advantages, strict=True):
        ratio = (theta[ids].sum() - step.old_logp[ids].sum()).exp()
        trl = trl - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / len(samples)
    # Advantages and weights are float32; the sum is divided by the fixed length.
    torch.testing.assert_close(20 * found, reinforce, rtol=0, atol=1e-6)
    torch.testing.assert_close(20 * found, torch.autograd.grad(trl, theta)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("knobs", [NO_KL, {"kl": "loss", "kl_coef": 0.1}, {"clip_high": 0.05, "dual_clip": 1.1}])
def test_loss_is_the_pages(step, knobs):
    rloo = with_keys(RLOO(), aggregation="token", **knobs)
    batch = stamp_weights(rloo.estimate(step.groups, step.batch(), rloo.initial_state()).batch, "token")
    found = (rloo.loss(step.outputs(batch), batch).loss_T * batch.weight_T).sum().item()
    coef = settings(rloo)["kl_coef"] if settings(rloo)["kl"] == "reward" else 0.0
    advantages = [a for rewards in charged(step, batch, coef) for a in leave_one_out(rewards)]
    tokens = []
    for s, (rollout, advantage) in enumerate(
        zip((r for g in step.groups for r in g.rollouts), advantages, strict=True)
    ):
        for t, trainable in enumerate(rollout.trainable):
            if not trainable:
                continue
            at, logp = batch.bounds[s].item() + t, step.theta[rollout.token_ids[t]].item()
            ratio = math.exp(logp - batch.proximal_logp_T[at].item())
            surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1 + settings(rloo)["clip_high"]) * advantage)
            if settings(rloo)["dual_clip"] is not None and advantage < 0:
                surrogate = max(surrogate, settings(rloo)["dual_clip"] * advantage)
            x = logp - batch.logp_by("reference")[at].item()
            tokens.append(
                -surrogate + (0.1 * ratio * (math.exp(-x) - 1 + x) if settings(rloo)["kl"] == "loss" else 0.0)
            )
    # Advantages and weights are float32.
    assert found == pytest.approx(sum(tokens) / len(tokens), abs=1e-6)


@pytest.mark.parametrize("knobs", [NO_KL, {"kl_coef": 0.0}])
def test_no_reference_is_needed_without_a_kl(step, knobs):
    rloo = with_keys(RLOO(), **knobs)
    assert rloo.needs() == ()
    estimate = rloo.estimate(step.groups, unseen_by(step.batch(), "reference"), {})
    assert estimate.metrics == {"equal_reward_groups": 0.0, "masked_positive": 0.0, "masked_negative": 0.0}
    assert torch.isfinite(rloo.loss(step.outputs(estimate.batch), estimate.batch).loss_T).all()
