"""REINFORCE, REINFORCE++ and its baseline form against loops in float64."""

import json
import statistics

import pytest
import torch
from helpers.sampled_step import make_step

from tandem.batch import Outputs
from tandem.config import with_keys
from tandem.data.packing import stamp_weights
from tandem.errors import UserError
from tandem.methods.reinforce import REINFORCE
from tandem.methods.reinforce_pp import ReinforcePP
from tandem.methods.reinforce_pp_baseline import ReinforcePPBaseline


@pytest.fixture
def step():
    return make_step(0)


def samples(step, batch):
    """(group number, reward, indices of the trainable tokens) of each sample."""
    found, s = [], 0
    for number, group in enumerate(step.groups):
        for rollout in group.rollouts:
            at = [batch.bounds[s].item() + t for t, trainable in enumerate(rollout.trainable) if trainable]
            found.append((number, rollout.reward, at))
            s += 1
    return found


def kl_of(batch, at):
    return [(batch.proximal_logp_T[t] - batch.logp_by("reference")[t]).item() for t in at]


@pytest.mark.parametrize("baseline", ["batch", "none"])
def test_reinforce_is_the_reward_less_its_kl_less_the_baseline(step, baseline):
    method, batch = with_keys(REINFORCE(), baseline=baseline, kl_coef=0.2), step.batch()
    estimate = method.estimate(step.groups, batch, method.initial_state())
    charged = [reward - 0.2 * sum(kl_of(batch, at)) for _, reward, at in samples(step, batch)]
    mean = statistics.fmean(charged) if baseline == "batch" else 0.0
    for value, (_, _, at) in zip(charged, samples(step, batch), strict=True):
        assert estimate.batch.advantage_T[at].tolist() == pytest.approx([value - mean] * len(at), abs=1e-6)
    assert estimate.metrics.get("baseline", 0.0) == pytest.approx(mean, abs=1e-12)


def test_gradient_is_that_of_the_log_likelihood_times_the_advantage(step):
    """Williams 1992, at the first minibatch, whose ratio is 1."""
    method, batch = with_keys(REINFORCE(), kl_coef=0.0), step.batch()
    batch = stamp_weights(method.estimate(step.groups, batch, {}).batch, "constant", constant_length=16)
    logp_T = batch.proximal_logp_T.clone().requires_grad_()
    loss = (method.loss(Outputs(logp_T=logp_T), batch).loss_T * batch.weight_T).sum()
    plain = -(logp_T * batch.advantage_T * batch.weight_T).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logp_T)[0] for x in (loss, plain)))


def test_the_moving_baseline_is_that_of_the_steps_before():
    method = with_keys(REINFORCE(), baseline="running", baseline_decay=0.8, kl="none")
    state, means = method.initial_state(), []
    for seed in range(4):
        step = make_step(seed)
        estimate = method.estimate(step.groups, step.batch(), state)
        rewards = [r.reward for g in step.groups for r in g.rollouts]
        # 0.2, 0.16, 0.128 ... for the last step, the one before it, and so on, over their sum.
        weights = [0.2 * 0.8**age for age in range(len(means))][::-1]
        before = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights) if means else None
        expected = statistics.fmean(rewards) if before is None else before
        assert estimate.metrics["baseline"] == pytest.approx(expected, abs=1e-12)
        first = estimate.batch.trainable_T.nonzero()[0]
        assert estimate.batch.advantage_T[first].item() == pytest.approx(rewards[0] - expected, abs=1e-6)
        means.append(statistics.fmean(rewards))
        state = json.loads(json.dumps(estimate.state))  # as a checkpoint keeps it


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("cls", [ReinforcePP, ReinforcePPBaseline])
def test_reinforce_pp_adds_up_and_whitens_over_the_step(step, cls, gamma):
    """arXiv:2501.03262: r at the last token less beta k1 at each, the sum from each token on, (A - mean) / std."""
    method, batch = with_keys(cls(), gamma=gamma, kl="reward", kl_coef=0.2, reward_clip=1.0), step.batch()
    estimate = method.estimate(step.groups, batch, method.initial_state())
    clipped = [min(max(reward, -1.0), 1.0) for _, reward, _ in samples(step, batch)]
    returns = []
    for i, (number, _, at) in enumerate(samples(step, batch)):
        group = [clipped[j] for j, (other, _, _) in enumerate(samples(step, batch)) if other == number]
        later, tokens = 0.0, []
        for place, kl in reversed(list(enumerate(kl_of(batch, at)))):
            last = clipped[i] - (statistics.fmean(group) if cls is ReinforcePPBaseline else 0.0)
            later = (last if place == len(at) - 1 else 0.0) - 0.2 * kl + gamma * later
            tokens.insert(0, later)
        returns.append(tokens)
    every = [x for tokens in returns for x in tokens]
    mean, std = statistics.fmean(every), statistics.pstdev(every)
    for tokens, (_, _, at) in zip(returns, samples(step, batch), strict=True):
        assert estimate.batch.advantage_T[at].tolist() == pytest.approx([(x - mean) / std for x in tokens], abs=1e-5)
    assert estimate.metrics["return_mean"] == pytest.approx(mean, abs=1e-6)
    assert estimate.metrics["reward_clip_fraction"] == sum(abs(r) > 1 for _, r, _ in samples(step, batch)) / len(
        clipped
    )


@pytest.mark.parametrize("cls", [ReinforcePP, ReinforcePPBaseline])
def test_equal_rewards_are_not_blown_up(step, cls):
    for group in step.groups:
        for rollout in group.rollouts:
            rollout.reward = 0.1
    method = with_keys(cls(), kl_coef=0.0)
    assert method.estimate(step.groups, step.batch(), {}).batch.advantage_T.abs().max() < 1e-4


def test_of_a_group_of_equal_rewards_only_the_baseline_form_learns_nothing(step):
    for rollout in step.groups[1].rollouts:
        rollout.reward = 0.3
    found = {}
    for cls in (ReinforcePP, ReinforcePPBaseline):
        method = with_keys(cls(), kl_coef=0.0)
        batch = method.estimate(step.groups, step.batch(), {}).batch
        own_T = torch.isin(batch.segment_T, torch.tensor([3, 4, 5])) & batch.trainable_T
        found[cls] = batch.advantage_T[own_T].unique()
    assert len(found[ReinforcePPBaseline]) == len(found[ReinforcePP]) == 1
    assert abs(found[ReinforcePPBaseline].item()) < 0.2 < abs(found[ReinforcePP].item())


def test_senseless_knobs():
    with pytest.raises(UserError, match="baseline_decay: expected at least 0 and less than 1, got 1"):
        with_keys(REINFORCE(), baseline_decay=1.0)
    with pytest.raises(UserError, match="gamma: expected from 0 to 1, got 2"):
        with_keys(ReinforcePP(), gamma=2.0)
