"""How a step is packed, cut and padded must not show in its loss or gradient (float64: 1e-12; the law says 1e-6)."""

from dataclasses import replace

import pytest
import torch
from conftest import micro_batches
from helpers.sampled_step import make_step

from tandem.data.packing import stamp_weights
from tandem.methods.grpo import GRPO
from tandem.methods.ppo import PPO


@pytest.fixture
def step():
    return make_step(0)


METHODS = {
    "ppo": PPO(),
    "ppo_loss_kl_entropy": PPO(kl="loss", entropy_coef=0.01, dual_clip=2.0, normalize_rewards=True),
    "ppo_sequence_mean": PPO(aggregation="sequence", whiten_advantages=False, value_clip=None, kl="none"),
    "grpo": GRPO(),
    "grpo_kl_loss": GRPO(kl_coef=0.1),
    "grpo_kl_reward": GRPO(kl="reward", kl_coef=0.1),
    "dr_grpo": GRPO(normalize="none", aggregation="constant", kl_coef=0.0),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def loss_and_gradients(method, step, batch, micro_batches):
    """Of one optimizer step, added up over micro-batches as the trainer does."""
    stamped = stamp_weights(batch, method.aggregation, constant_length=16)
    stamped = replace(stamped, weight_T=stamped.weight_T.double())
    parameters = [step.theta, step.omega]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    total = 0.0
    for micro in micro_batches(stamped):
        out = step.outputs(micro)
        loss = sum((of_role(out, micro).loss_T * micro.weight_T).sum() for of_role in method.losses().values())
        loss.backward()
        total += loss.item()
    return torch.cat([torch.tensor([total], dtype=torch.float64), *(p.grad for p in parameters)])


def whole(batch):
    return [batch]


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("token_budget", [1, 20, 50])
def test_micro_batches_add_up_to_the_whole(method, step, token_budget):
    batch = method.estimate(step.groups, step.batch(), method.initial_state()).batch
    expected = loss_and_gradients(method, step, batch, whole)
    assert expected.abs().sum() > 0
    # Weights are float32 before the cast: 1e-9.
    close(loss_and_gradients(method, step, batch, lambda b: micro_batches(b, token_budget)), expected, 1e-9)


def test_packing_order_does_not_matter(method, step):
    batch = method.estimate(step.groups, step.batch(), method.initial_state()).batch
    order = [7, 2, 11, 0, 5, 1, 3, 10, 4, 9, 8, 6]
    expected = loss_and_gradients(method, step, batch, whole)
    close(loss_and_gradients(method, step, batch.select(order), whole), expected, 1e-9)


def test_order_of_the_groups_does_not_matter(method, step):
    forwards = method.estimate(step.groups, step.batch(), method.initial_state())
    turned = step.groups[::-1]
    backwards = method.estimate(turned, step.batch(turned), method.initial_state())
    close(
        loss_and_gradients(method, step, backwards.batch, whole),
        loss_and_gradients(method, step, forwards.batch, whole),
        1e-9,
    )
    assert backwards.metrics == pytest.approx(forwards.metrics, abs=1e-12)
    assert backwards.state == pytest.approx(forwards.state, abs=1e-12)


def test_tokens_that_are_not_trained_on_do_not_matter(method):
    results = []
    for extra in ({}, {"extra_prompt": 5}, {"extra_tail": 3}):
        step = make_step(0, **extra)
        estimate = method.estimate(step.groups, step.batch(), method.initial_state())
        results.append((loss_and_gradients(method, step, estimate.batch, whole), estimate.metrics))
    for result, metrics in results[1:]:
        close(result, results[0][0])
        assert metrics == pytest.approx(results[0][1], abs=1e-12)


def test_every_loss_is_zero_and_finite_where_not_trainable(method, step):
    batch = method.estimate(step.groups, step.batch(), method.initial_state()).batch
    token_loss = method.loss(step.outputs(batch), batch)
    assert (token_loss.loss_T[~batch.trainable_T] == 0).all()
    assert all(torch.isfinite(m).all() and m.shape == (batch.tokens,) for m in token_loss.metrics_T.values())
    assert not any(m.requires_grad for m in token_loss.metrics_T.values())
