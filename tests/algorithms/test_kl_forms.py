"""Where each form of the KL ends: a bandit of 13 tokens, in exact expectation, against the optimum in closed form."""

import math
from dataclasses import replace

import pytest
import torch

from tandem.algorithms.grpo import GRPO
from tandem.algorithms.ppo import PPO
from tandem.data.packing import pack_rollouts
from tandem.types import Group, Outputs, Prompt, Rollout

BETA = 0.3
REWARD = torch.linspace(0, 1, 13, dtype=torch.float64)
REFERENCE = (0.8 * torch.cos(torch.arange(13, dtype=torch.float64)) - REWARD).log_softmax(0)


def reverse(beta):
    """The maximum of E[r] - beta KL(pi || ref): pi is proportional to ref exp(r / beta)."""
    return (REFERENCE + REWARD / beta).softmax(0)


def forward(beta):
    """The maximum of E[r] - beta KL(ref || pi): r + beta ref / pi is the same number for every token."""
    low, high = REWARD.max().item() + 1e-9, REWARD.max().item() + beta
    for _ in range(100):
        middle = (low + high) / 2
        total = (beta * REFERENCE.exp() / (middle - REWARD)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return beta * REFERENCE.exp() / (high - REWARD)


def objective(pi):
    return (pi @ (REWARD - BETA * (pi.log() - REFERENCE))).item()


def trained(algorithm, steps=250):
    """The policy that a table of 13 logits ends at.

    Each step sees every token once, weighted by its probability: the expectation over samples of the policy. A group's
    mean over these is another baseline than over samples, which changes no expectation. The steps are those of the
    natural gradient, so that rare tokens do not take ever longer, and their size falls to 0.
    """
    rollouts = [
        Rollout(
            prompt_id="p", sample_index=v, token_ids=[0, v], prompt_length=1, trainable=[False, True],
            behaviour_logp=[0.0, 0.0], untruncated_logp=[0.0, 0.0], stop="eos", reward=r,
        )
        for v, r in enumerate(REWARD.tolist())
    ]  # fmt: skip
    groups = [Group(prompt=Prompt(prompt_id="p", prompt="", token_ids=(0,)), rollouts=rollouts)]
    packed = pack_rollouts(rollouts)
    theta = REFERENCE.clone().requires_grad_()
    state = algorithm.initial_state()

    def at_tokens(x_V):
        return torch.stack([torch.zeros_like(x_V), x_V], 1).flatten()

    for step in range(steps):
        logp_V = theta.log_softmax(0)
        batch = replace(
            packed,
            old_logp_T=at_tokens(logp_V.detach()),
            reference_logp_T=at_tokens(REFERENCE),
            old_value_T=torch.zeros(26, dtype=torch.float64),
            reward_S=REWARD,
        )
        estimate = algorithm.estimate(groups, batch, state)
        batch, state = estimate.batch, estimate.state
        loss_T = algorithm.loss(Outputs(logp_T=at_tokens(logp_V)), batch).loss_T
        probability_V = logp_V.detach().exp()
        (gradient,) = torch.autograd.grad((loss_T * at_tokens(probability_V)).sum(), theta)
        with torch.no_grad():
            theta -= 0.6 * (1 - step / steps) * gradient / probability_V
    return theta.detach().softmax(0)


GROUP_STD = REWARD.std().item() + 1e-4
STEP_STD = REWARD.std(correction=0).item()
LOSS = {"kl": "loss", "kl_coef": BETA}
PLAIN_PPO = {"whiten_advantages": False, "kl_coef": BETA}


@pytest.mark.parametrize(
    ("algorithm", "end"),
    [
        (GRPO(normalize="none", kl="reward", kl_coef=BETA), reverse(BETA)),
        (GRPO(normalize="none", **LOSS), reverse(BETA)),
        (GRPO(normalize="none", **LOSS, kl_estimator="k2"), reverse(BETA)),
        (GRPO(normalize="none", **LOSS, kl_estimator="k3"), forward(BETA)),
        (GRPO(kl="reward", kl_coef=BETA), reverse(BETA)),
        (GRPO(**LOSS), reverse(BETA * GROUP_STD)),
        (GRPO(**LOSS, kl_estimator="k3"), forward(BETA * GROUP_STD)),
        (PPO(kl="reward", **PLAIN_PPO), reverse(BETA)),
        (PPO(kl="loss", **PLAIN_PPO), reverse(BETA)),
        (PPO(kl="loss", kl_estimator="k3", **PLAIN_PPO), forward(BETA)),
        (PPO(kl="reward", kl_coef=BETA), reverse(BETA)),
        (PPO(**LOSS), reverse(BETA * STEP_STD)),
    ],
    ids=lambda x: None if isinstance(x, torch.Tensor) else f"{type(x).__name__}-{x.kl}-{x.kl_estimator}",
)
def test_each_form_ends_where_the_page_says(algorithm, end):
    pi = trained(algorithm)
    # Advantages and rewards are float32, and what is divided by its spread jitters by the last steps' size.
    torch.testing.assert_close(pi, end, rtol=0, atol=1e-3)
    best = BETA * math.log((REFERENCE + REWARD / BETA).exp().sum())
    assert objective(pi) == pytest.approx(objective(end), abs=1e-5)
    if torch.equal(end, reverse(BETA)):
        assert objective(pi) == pytest.approx(best, abs=1e-5)
    else:
        # The other direction and a scaled coefficient are other places, by more than any tolerance here.
        assert objective(pi) < best - 5e-3


def test_without_a_kl_the_reference_is_left():
    assert objective(trained(GRPO())) < objective(REFERENCE.exp())
    assert trained(GRPO()) @ REWARD > 0.9
