"""Policy, value and pair losses against OpenRLHF's and their definitions."""

import math

import pytest
import torch

from tandem.functional.policy import clipped_policy_loss, importance_ratio
from tandem.functional.preference import reward_pair_loss
from tandem.functional.value import clipped_value_loss, explained_variance

LOGP = torch.tensor([-0.5, -1.2, -0.3, -2.0, -0.9, -0.1], dtype=torch.float64)
OLD = torch.tensor([-0.7, -1.0, -0.3, -1.2, -1.6, -1.9], dtype=torch.float64)
ADVANTAGE = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.8, -0.6], dtype=torch.float64)


@pytest.mark.parametrize(("dual_clip", "last", "clip_fraction"), [(None, 3.6297884786477668, 1 / 3), (3.0, 1.8, 1 / 2)])
def test_policy_golden_from_openrlhf(dual_clip, last, clip_fraction):
    # OpenRLHF 0.11.2 models/loss.PolicyLoss(0.2, 0.28, dual_clip) in float64, one token at a time.
    # Its clip_ratio is 1/3 for both; ours also counts the token that the dual clip stopped.
    expected = [-1.2214027581601699, 0.40936537653899097, -2.0, 1.2000000000000002, -1.024, last]
    loss, clipped = clipped_policy_loss(LOGP, OLD, ADVANTAGE, 0.2, 0.28, dual_clip)
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert clipped.mean().item() == pytest.approx(clip_fraction)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_clipped_tokens_are_those_without_a_gradient(dual_clip):
    logp = LOGP.clone().requires_grad_()
    loss, clipped = clipped_policy_loss(logp, OLD, ADVANTAGE, 0.2, 0.28, dual_clip)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.equal(gradient == 0, clipped.bool())


def test_a_ratio_held_at_its_exponents_bound_counts_as_clipped():
    logp = torch.tensor([0.0, -30.0, -1.0, 0.0], requires_grad=True)
    old, advantage = torch.tensor([-25.0, 0.0, -1.1, -19.0]), torch.tensor([-1.0, 1.0, -1.0, -1.0])
    loss, clipped = clipped_policy_loss(logp, old, advantage, 0.2, 0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert clipped.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert torch.equal(gradient == 0, clipped.bool())


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_gradcheck(dual_clip):
    logp = LOGP.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, OLD, ADVANTAGE, 0.2, 0.28, dual_clip)[0], (logp,))


def test_ratio_stays_finite():
    ratio = importance_ratio(torch.tensor([0.0, -500.0, -1.0]), torch.tensor([-500.0, 0.0, -1.0]))
    assert ratio.tolist() == pytest.approx([math.exp(20), math.exp(-20), 1.0], rel=1e-6)


VALUE = torch.tensor([0.2, -0.4, 1.0, 0.5], dtype=torch.float64)
OLD_VALUE = torch.tensor([0.5, -0.3, 0.4, 0.5], dtype=torch.float64)
RETURN = torch.tensor([1.0, -0.2, 0.1, 0.9], dtype=torch.float64)


def test_without_a_clip_it_is_half_the_squared_error():
    loss, clipped = clipped_value_loss(VALUE, OLD_VALUE, RETURN, None)
    halves = [(v - r) ** 2 / 2 for v, r in zip(VALUE.tolist(), RETURN.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(halves, abs=1e-15)
    assert not clipped.any()
    # As with a clip that nothing reaches: a critic's learning rate means the same either way.
    assert torch.equal(clipped_value_loss(VALUE, OLD_VALUE, RETURN, 10.0)[0], loss)


def test_value_golden_from_openrlhf():
    # OpenRLHF 0.11.2 models/loss.ValueLoss(clip_eps=0.2) in float64, one token at a time, and their mean.
    loss, clipped = clipped_value_loss(VALUE, OLD_VALUE, RETURN, 0.2)
    assert loss.tolist() == pytest.approx([0.32, 0.02, 0.405, 0.08], abs=1e-12)
    assert loss.mean().item() == pytest.approx(0.20625, abs=1e-12)
    assert clipped.tolist() == [0.0] * 4


def test_value_clip_stops_the_gradient_of_values_that_moved_far_towards_the_return():
    value = torch.tensor([0.9, 0.9], requires_grad=True)
    loss, clipped = clipped_value_loss(value, torch.tensor([0.0, 0.0]), torch.tensor([1.0, -1.0]), 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    assert clipped.tolist() == [1.0, 0.0]
    # max(0.1^2, 0.8^2) / 2 and max(1.9^2, 1.2^2) / 2.
    assert loss.tolist() == pytest.approx([0.32, 1.805], abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, 1.9], abs=1e-6)


def test_rounding_is_not_counted_as_a_clipped_value():
    # In float32 old + (new - old) is not new: on 425 of these tokens by an error that is the larger one.
    g = torch.Generator().manual_seed(0)
    old, value, returns = (scale * torch.randn(1000, generator=g) for scale in (0.05, 1e-3, 1e-3))
    assert (value - old).abs().max() < 0.21
    loss, clipped = clipped_value_loss(value, old, returns, 0.21)
    assert clipped.sum() == 0
    assert torch.equal(loss, (value - returns).square() / 2)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_gradcheck(clip):
    value = VALUE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, OLD_VALUE, RETURN, clip)[0], (value,))


def test_explained_variance():
    mask = torch.tensor([True, True, True, False])
    returns = torch.tensor([1.0, 2.0, 3.0, 100.0])
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.full((4,), 2.0), returns, mask) == pytest.approx(0.0)
    # R - V = (0.5, 0, 1): variance 1/6 of a variance of 2/3.
    assert explained_variance(torch.tensor([0.5, 2.0, 2.0, -9.0]), returns, mask) == pytest.approx(0.75)
    assert explained_variance(returns, torch.ones(4), mask) == 0.0


def test_explained_variance_of_returns_that_are_equal_up_to_rounding():
    returns = torch.ones(1000) + torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 2e-7
    values = torch.linspace(0.9, 1.1, 1000)
    assert returns.unique().numel() > 1
    assert explained_variance(values, returns, torch.ones(1000, dtype=torch.bool)) == 0.0


def test_pair_golden_from_openrlhf():
    # OpenRLHF 0.11.2 models/loss.PairWiseLoss in float64, one pair at a time; TRL's reward_trainer is the same.
    chosen, rejected, margin = torch.tensor([[1.3, -0.2, 0.5], [0.4, 0.6, 0.5], [0.0, 0.5, 0.25]], dtype=torch.float64)
    loss = reward_pair_loss(chosen, rejected, margin)
    assert loss.tolist() == pytest.approx([0.3411538747320878, 1.5410084538329922, 0.8259394198788436], abs=1e-12)
    assert reward_pair_loss(chosen[2:], rejected[2:]).item() == pytest.approx(math.log(2), abs=1e-12)


def test_pair_loss_far_away_and_gradcheck():
    far = reward_pair_loss(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]))
    assert far.tolist() == [1000.0, 0.0]
    chosen = torch.tensor([1.3, -0.2], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, r: reward_pair_loss(c, r, 0.3), (chosen, rejected))
