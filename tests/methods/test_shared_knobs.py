"""Knobs that methods share do in each of them what the page says, whatever its advantages are."""

from dataclasses import replace

import pytest
import torch
from helpers.batches import seen_batch
from helpers.method_steps import Models, estimated, items_of
from helpers.sampled_step import make_step

from tandem.batch import Outputs
from tandem.config import with_keys
from tandem.data.packing import pack
from tandem.functional.kl import adaptive_kl_coef
from tandem.methods.gspo import GSPO
from tandem.methods.opd import OPD
from tandem.methods.table import SAMPLES, method_class
from tandem.methods.tokens import TokenMethod
from tandem.types import Sequence

CLASSES = [cls for name in SAMPLES if issubclass(cls := method_class(name), TokenMethod)]


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def method(request):
    return request.param()


def test_each_method_on_tokens_has_them():
    assert {name for name in SAMPLES if not issubclass(method_class(name), TokenMethod)} == {"online-dpo"}


def advantages_of(method, reward):
    items = items_of(method)
    items[0].rollouts[0].reward = reward
    return estimated(method, Models(method), items).batch.advantage_T


def test_rewards_are_clipped_before_any_baseline(method):
    """Clipped after it, one reward of a million would still move every advantage of its group or step."""
    method = with_keys(method, reward_clip=2.0, **({"reward_coef": 1.0} if isinstance(method, OPD) else {}))
    assert torch.equal(advantages_of(method, 1e6), advantages_of(method, 2.0))
    assert not torch.equal(advantages_of(method, 1.9), advantages_of(method, 2.0))
    wide = with_keys(method, reward_clip=None)
    assert not torch.equal(advantages_of(wide, 1e6), advantages_of(wide, 2.0))


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_the_controller_steers_the_coefficient_of_the_next_step(method, kl):
    method = with_keys(method, kl=kl, kl_coef=0.2, kl_target=3.0, kl_horizon=50)
    estimate = estimated(method, Models(method), items_of(method))
    found = estimate.metrics["kl_per_sequence"]
    sequences = sum(len(g.usable) for g in items_of(method) if method.keep(g))
    expected = adaptive_kl_coef(0.2, found, target=3.0, samples=sequences, horizon=50)
    assert estimate.state["kl_coef"] == pytest.approx(expected, abs=1e-12)
    assert expected != 0.2
    # This step's own is where it was.
    assert estimate.batch.state["kl_coef"] == estimate.metrics["kl_coef"] == 0.2


def test_the_entropy_bonus_is_that_of_each_token(method):
    method = with_keys(method, entropy_coef=0.25)
    assert method.asks.entropy_gradient
    models = Models(method)
    batch = estimated(method, models, items_of(method)).batch
    said = models.said("actor", models.tables["actor"].detach(), batch)
    entropy_T = said.entropy_T.requires_grad_()
    (gradient_T,) = torch.autograd.grad(method.loss(replace(said, entropy_T=entropy_T), batch).loss_T.sum(), entropy_T)
    assert torch.equal(gradient_T, torch.full_like(entropy_T, -0.25))


def test_dual_clip_bounds_what_a_bad_sample_can_do(method):
    """Of a bad sample whose tokens have become e^3 times likelier: at most c times its advantage, or weight."""
    method = with_keys(method, dual_clip=2.0, kl="none")
    step = make_step(0)
    batch = replace(step.batch(), advantage_T=-step.batch().trainable_T.double())
    logp_T = (batch.proximal_logp_T + 3.0 * batch.trainable_T).requires_grad_()
    loss_T = method.surrogate(Outputs(logp_T=logp_T), batch).loss_T[batch.trainable_T]
    unbounded = with_keys(method, dual_clip=None, clip_high=1e9)
    far_T = unbounded.surrogate(Outputs(logp_T=logp_T), batch).loss_T[batch.trainable_T]
    if type(method).__name__ == "CISPO":
        torch.testing.assert_close(loss_T, 2.0 * logp_T[batch.trainable_T])
        assert (far_T / loss_T).min() > 5
    else:
        assert (loss_T == 2.0).all()
        assert far_T.min() > 20


def test_gspo_clips_as_its_paper_does():
    """arXiv:2507.18071, section 5.1: 3e-4 from below and 4e-4 from above, of ratios of whole sequences."""
    batch = replace(pack([Sequence(token_ids=[1, 2], trainable=[False, True])] * 4), advantage_T=torch.zeros(8))
    batch.advantage_T[1::2] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    batch = seen_batch(batch, old_logp_T=torch.zeros(8, dtype=torch.float64))
    logp_T = torch.zeros(8, dtype=torch.float64)
    logp_T[1::2] = torch.tensor([1 + 3.9e-4, 1 + 4.1e-4, 1 - 2.9e-4, 1 - 3.1e-4], dtype=torch.float64).log()
    clipped_T = GSPO().surrogate(Outputs(logp_T=logp_T), batch).metrics_T["clip_fraction"]
    assert clipped_T[1::2].tolist() == [0.0, 1.0, 0.0, 1.0]
