"""Corrections in a step: what is left out leaves every mean, what is logged, and a fault that each was made for."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.batches import seen_batch
from helpers.sampled_step import make_step

from tandem.batch import Outputs, TokenLoss
from tandem.config import settings, with_keys
from tandem.data.packing import stamp_weights
from tandem.errors import UserError
from tandem.functional.corrections import BOUNDS, mismatch
from tandem.methods.dr_grpo import DrGRPO
from tandem.methods.grpo import GRPO
from tandem.methods.knobs import Correction
from tandem.methods.ppo import PPO
from tandem.methods.table import METHODS, method_class
from tandem.methods.tokens import TokenMethod, corrected
from tandem.parallel.world import World
from tandem.rollout.prepare import sampler_gap
from tandem.training.tally import Tally

RULES = list(BOUNDS)
OF_TOKENS = [name for name in METHODS if issubclass(method_class(name), TokenMethod)]


@pytest.fixture
def step():
    return make_step(0)


def sampled(step, gap_T=None):
    """The step's batch, whose sampler was off by ``gap_T`` from the trainer's log-probs (0: not at all)."""
    batch = step.batch()
    old_T = batch.proximal_logp_T
    return replace(batch, untruncated_logp_T=old_T if gap_T is None else old_T - gap_T * batch.trainable_T)


def loss_and_gradient(method, step, batch):
    batch = stamp_weights(method.estimate(step.groups, batch, method.initial_state()).batch, method.aggregation,
                          constant_length=16)  # fmt: skip
    loss = (method.loss(step.outputs(batch), batch).loss_T * batch.weight_T).sum()
    return loss.detach(), torch.autograd.grad(loss, step.theta)[0], batch


@pytest.mark.parametrize("correction", RULES)
def test_without_a_gap_nothing_is_corrected(step, correction):
    plain = loss_and_gradient(GRPO(), step, sampled(step))
    found = loss_and_gradient(with_keys(GRPO(), correction=correction), step, sampled(step))
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_masked_ratio_of_e_to_the_90_leaves_loss_gradient_and_denominator(step, aggregation):
    """The same as if the token had never been trainable, and the advantages were the same."""
    batch = step.batch()
    at = batch.trainable_T.nonzero().squeeze(-1)[[2, 7]]
    gap_T = torch.zeros_like(batch.weight_T)
    gap_T[at] = torch.tensor([90.0, -90.0])
    method = with_keys(DrGRPO(), correction="icepop", aggregation=aggregation)
    loss, gradient, masked = loss_and_gradient(method, step, sampled(step, gap_T))
    assert math.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert masked.weight_T[at].tolist() == [0.0, 0.0]
    assert not gradient[batch.token_ids_T[at]].any()

    without = sampled(step)
    trainable_T = without.trainable_T.clone()
    trainable_T[at] = False
    expected = loss_and_gradient(with_keys(DrGRPO(), aggregation=aggregation), step,
                                 replace(without, trainable_T=trainable_T))  # fmt: skip
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-7)
    if aggregation == "token":
        assert masked.weight_T.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_ratio_of_e_to_the_90_leaves_every_loss_finite(step, name, rule, dtype):
    """Two tokens are off, one either way; those that are left out have no gradient, and all others have one.

    By what each method makes of its advantages; with a KL and an entropy bonus in the loss.
    """
    method = with_keys(method_class(name)(), correction=rule, entropy_coef=0.01, kl="loss", kl_coef=0.1)
    batch = step.batch()
    off_N = batch.trainable_T.nonzero().squeeze(-1)[[2, 7]]
    gap_T = torch.zeros_like(batch.weight_T)
    gap_T[off_N] = torch.tensor([90.0, -90.0])
    batch = sampled(step, gap_T)
    seen = {role: out.map(lambda x: x.to(dtype)) for role, out in batch.seen.items()}
    seen["teacher"] = seen["reference"]
    batch = replace(batch, seen=seen, untruncated_logp_T=batch.untruncated_logp_T.to(dtype))
    estimate = method.estimate(step.groups, batch, method.initial_state())
    batch = stamp_weights(estimate.batch, method.aggregation, constant_length=16)
    theta = step.theta.detach().to(dtype).requires_grad_()
    theta_T = theta[batch.token_ids_T] * batch.trainable_T
    loss_T = method.loss(Outputs(logp_T=theta_T, entropy_T=theta_T.square()), batch).loss_T
    assert torch.isfinite(loss_T).all()
    (gradient,) = torch.autograd.grad((loss_T * batch.weight_T).sum(), theta)
    assert torch.isfinite(gradient).all()
    left_out = set(step.batch().token_ids_T[off_N].tolist()) - set(batch.token_ids_T[batch.trainable_T].tolist())
    assert len(left_out) == {"icepop": 2, "gap": 1, "decoupled": 1, "geo": 2}.get(rule, 0)
    assert not gradient[sorted(left_out)].any()
    assert (gradient != 0).sum() > 0.5 * batch.trainable_T.sum()
    # A weight is within its bounds, and a factor of the advantage.
    assert loss_T.abs().max() < 200


def test_a_weight_multiplies_the_surrogate_and_not_the_kl(step):
    gap_T = torch.zeros_like(step.batch().weight_T)
    gap_T[step.batch().trainable_T.nonzero().squeeze(-1)[::3]] = math.log(4.0)
    knobs = {"kl_coef": 0.1, "correction": "token_tis", "correction_high": 1.5}
    out = step.outputs(step.batch())
    surrogates, rest = [], []
    for method in (with_keys(GRPO(), kl_coef=0.1), with_keys(GRPO(), **knobs)):
        batch = method.estimate(step.groups, sampled(step, gap_T), method.initial_state()).batch
        surrogates.append(method.surrogate(out, batch).loss_T.detach())
        rest.append(method.loss(out, batch).loss_T.detach() - surrogates[-1])
    weight_T = torch.where(gap_T > 0, 1.5, 1.0)
    torch.testing.assert_close(surrogates[1], surrogates[0] * weight_T)
    torch.testing.assert_close(rest[1], rest[0])


def test_whole_sequences_go_and_the_metrics_say_which_way(step):
    """Two sequences are off by e^0.1 a token, one of a good sample and one of a bad one."""
    batch = step.batch()
    method = with_keys(DrGRPO(), correction="geo")
    advantage_T = DrGRPO().estimate(step.groups, batch, {}).batch.advantage_T
    mean_S = torch.zeros(batch.segments, dtype=torch.float64).index_add_(0, batch.segment_T, advantage_T.double())
    off_S = torch.tensor([int(mean_S.argmax()), int(mean_S.argmin())])
    off_T = torch.isin(batch.segment_T, off_S) & batch.trainable_T
    estimate = method.estimate(step.groups, sampled(step, 0.1 * off_T.float()), {})
    assert estimate.batch.index_S.tolist() == [s for s in range(batch.segments) if s not in off_S.tolist()]
    good_T, bad_T = ((sign * advantage_T > 0) & batch.trainable_T for sign in (1, -1))
    assert estimate.metrics["masked_positive"] == pytest.approx(((good_T & off_T).sum() / good_T.sum()).item())
    assert estimate.metrics["masked_negative"] == pytest.approx(((bad_T & off_T).sum() / bad_T.sum()).item())
    assert 0 < estimate.metrics["masked_positive"] < 1


def test_a_critic_learns_on_what_is_left(step):
    gap_T = torch.zeros_like(step.batch().weight_T)
    at = step.batch().trainable_T.nonzero().squeeze(-1)[3]
    gap_T[at] = 5.0
    ppo = with_keys(PPO(), correction="icepop")
    batch = ppo.estimate(step.groups, sampled(step, gap_T), ppo.initial_state()).batch
    assert not batch.trainable_T[at]
    assert torch.isfinite(ppo.value_loss(step.outputs(batch), batch).loss_T).all()


def test_nothing_left_is_said(step):
    batch = step.batch()
    method = with_keys(GRPO(), correction="geo")
    with pytest.raises(UserError, match="correction: geo leaves out every token of the step"):
        method.estimate(step.groups, sampled(step, 0.1 * batch.trainable_T.float()), {})


def test_it_needs_log_probs_of_the_start_of_the_step(step):
    assert with_keys(GRPO(), correction="icepop").needs_old_logp
    assert not GRPO().needs_old_logp
    batch = replace(sampled(step), seen={}, advantage_T=torch.ones(step.batch().tokens))
    with pytest.raises(ValueError, match="the actor has not seen the batch"):
        corrected(batch, Correction(correction="gap"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"correction": "icepop", "correction_low": 6.0}, "correction_low: expected less than correction_high, 5.0"),
        ({"correction": "geo", "correction_high": 0.5}, "correction_low: expected less than correction_high, 0.5"),
        ({"correction_high": 0.0}, "correction_high: expected more than 0, got 0.0"),
        ({"correction_gap": 1.0}, "correction_gap: expected more than 0 and less than 1, got 1.0"),
    ],
)
def test_senseless_bounds(knobs, message):
    with pytest.raises(UserError, match=message):
        with_keys(GRPO(), **knobs)


def by_plain_sums(w_N):
    return {
        "effective_sample_size": pytest.approx((w_N.sum() ** 2 / (len(w_N) * (w_N**2).sum())).item()),
        "mismatch_kl": pytest.approx((w_N - 1 - w_N.log()).mean().item()),
    }


def drawn_gap(batch):
    return 0.3 * torch.randn(batch.tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_effective_sample_size_and_mismatch_are_of_all_that_was_sampled(step):
    """What a rule leaves out must not be left out of what says how bad it is."""
    gap_T = drawn_gap(step.batch())
    gap_T[step.batch().trainable_T.nonzero()[4]] = 3.0
    batch = sampled(step, gap_T)
    found = sampler_gap(batch)
    expected = by_plain_sums(gap_T[batch.trainable_T].exp())
    assert {name: found[name] for name in expected} == expected
    assert found["effective_sample_size"] < 0.5
    left = with_keys(GRPO(), correction="icepop").estimate(step.groups, batch, {}).batch
    assert left.trainable_T.sum() < batch.trainable_T.sum()


def test_a_tally_measures_the_tokens_of_all_micro_batches(step):
    """Weights are added up before anything is divided, and quantiles are of all tokens together."""
    batch = stamp_weights(GRPO().estimate(step.groups, sampled(step), {}).batch, "token")
    gap_T = drawn_gap(batch)
    tally = Tally()
    for units in ([0, 5], [1, 2, 3, 4], list(range(6, batch.segments))):
        micro = replace(batch, return_T=gap_T).select(units)
        tally.add(micro, GRPO().loss(step.outputs(micro), micro), micro.return_T[micro.trainable_T])
    found, _ = tally.result(World())
    expected = mismatch(gap_T[batch.trainable_T])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert 0.5 < found["effective_sample_size"] < 0.99


def test_of_equal_weights_every_sample_counts(step):
    found = sampler_gap(sampled(step))
    assert (found["effective_sample_size"], found["mismatch_kl"], found["sampler_gap_max"]) == (1.0, 0.0, 0.0)


def test_a_wrong_sampler_bends_the_policy_and_a_correction_does_not_let_it():
    """A bandit in expectation over the sampler, which says the best of 5 answers ten times too rarely.

    Without a correction the gradient is that of another policy; token_tis with a bound that holds nowhere is exact.
    """
    theta = torch.tensor([0.0, 0.2, -0.3, 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    reward_V = torch.tensor([1.0, 0.0, 0.2, 0.1, 0.0], dtype=torch.float64)
    sampler_V = (theta.detach() - torch.tensor([2.3, 0, 0, 0, 0], dtype=torch.float64)).log_softmax(0)
    logp_V = theta.log_softmax(0)
    exact = torch.autograd.grad(-(logp_V.exp() @ reward_V), theta, retain_graph=True)[0]
    gradients = {}
    for rule in ("none", "token_tis"):
        knobs = Correction(correction=rule, correction_high=50.0)
        step = make_step(0)
        batch = replace(
            step.batch([replace(step.groups[0], rollouts=step.groups[0].rollouts[:1])]).select([0]),
            bounds=torch.arange(6), token_ids_T=torch.zeros(5, dtype=torch.int64),
            position_T=torch.ones(5, dtype=torch.int64), trainable_T=torch.ones(5, dtype=torch.bool),
            weight_T=sampler_V.exp(), untruncated_logp_T=sampler_V, seen={}, reward_S=reward_V,
            index_S=torch.arange(5), group_S=None, prefix_S=None, advantage_T=reward_V,
        )  # fmt: skip
        batch, _ = corrected(seen_batch(batch, old_logp_T=logp_V.detach()), knobs)
        token_loss: TokenLoss = TokenMethod.surrogate(with_keys(DrGRPO()), Outputs(logp_T=logp_V), batch)
        gradients[rule] = torch.autograd.grad((token_loss.loss_T * sampler_V.exp()).sum(), theta, retain_graph=True)[0]
    torch.testing.assert_close(gradients["token_tis"], exact)
    assert (gradients["none"] - exact).abs().max() > 0.05
    assert settings(DrGRPO())["correction"] == "none"
