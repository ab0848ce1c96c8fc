"""What methods on samples share: the clipped surrogate with its metrics, and the KL to the reference."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tandem.batch import Batch, Outputs, TokenLoss, filled
from tandem.errors import expect
from tandem.functional.kl import kl_estimate, kl_loss
from tandem.functional.policy import clipped_policy_loss, importance_ratio
from tandem.functional.segments import segment_sum
from tandem.lazy import torch
from tandem.roles import Metrics
from tandem.types import Group

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED_LEADS = ("reward", "kl", "entropy", "response_length", "eos_share")
"""Metrics that the display of a method on samples shows."""
KLPlace = Literal["reward", "loss", "none"]
"""Where the KL to the reference counts: in the reward, as a loss of its own, or nowhere."""


def check_clipped(knobs: Any) -> None:
    """Checks the knobs of ``clipped_surrogate``. Raises UserError naming the first that is wrong."""
    expect(knobs, "from 0 to 1", lambda x: 0 <= x <= 1, "clip_low")
    expect(knobs, "0 or more", lambda x: x >= 0, "clip_high")
    expect(knobs, "more than 1", lambda x: x > 1, "dual_clip")


def uses_kl(knobs: Any) -> bool:
    """Whether a reference is needed: nothing is computed for a KL that counts nowhere."""
    return knobs.kl != "none" and knobs.kl_coef != 0


def clipped_surrogate(
    out: Outputs, batch: Batch, *, low: float, high: float, dual_clip: float | None = None
) -> TokenLoss:
    """PPO's clipped loss against ``batch.proximal_logp_T`` (formula: ``clipped_policy_loss``).

    Metrics: ``policy_loss``, ``ratio``, ``clip_fraction``, ``approx_kl`` (k3 of KL(old || new), nats per token) and,
    where the forward gave it, ``entropy``.
    """
    logp_T, old_logp_T = filled(out.logp_T, "out.logp_T"), batch.proximal_logp_T
    advantage_T = filled(batch.advantage_T, "advantage_T")
    loss_T, clipped_T = clipped_policy_loss(logp_T, old_logp_T, advantage_T, low, high, dual_clip)
    metrics_T = {
        "policy_loss": loss_T.detach(),
        "ratio": importance_ratio(logp_T.detach(), old_logp_T),
        "clip_fraction": clipped_T,
        "approx_kl": kl_estimate(old_logp_T, logp_T.detach(), "k3"),
    }
    if out.entropy_T is not None:
        metrics_T["entropy"] = out.entropy_T.detach()
    return TokenLoss(loss_T=loss_T, metrics_T=metrics_T)


def clipped_with_kl(knobs: Any, out: Outputs, batch: Batch) -> TokenLoss:
    """The clipped surrogate, and, with ``kl="loss"``, ``kl_coef`` times the KL to the reference (``kl_loss``).

    Adds the metric ``kl_loss``, in nats. ``kl_coef`` (``batch.state``) is in units of the advantages a nat: of rewards,
    where nothing has scaled the advantages.
    """
    token_loss = clipped_surrogate(out, batch, low=knobs.clip_low, high=knobs.clip_high, dual_clip=knobs.dual_clip)
    if knobs.kl != "loss" or not uses_kl(knobs):
        return token_loss
    logp_T = filled(out.logp_T, "out.logp_T")
    ratio_T = importance_ratio(logp_T, batch.proximal_logp_T)
    kl_T = kl_loss(logp_T, batch.logp_by("reference"), ratio_T, knobs.kl_estimator)
    return TokenLoss(
        loss_T=token_loss.loss_T + batch.state["kl_coef"] * kl_T,
        metrics_T=token_loss.metrics_T | {"kl_loss": kl_T.detach()},
    )


def sampled_kl(batch: Batch, role: str = "reference", name: str = "kl") -> tuple[Tensor, Metrics]:
    """k1 of KL(sampling policy || the model of that ``role``) for each token, [T], 0 where not trainable.

    Metrics: ``<name>``, its mean over tokens, and ``<name>_per_sequence``, the mean over sequences of its sum, in nats.
    """
    k1_T = kl_estimate(batch.proximal_logp_T, batch.logp_by(role), "k1")
    k1_T = torch.where(batch.trainable_T, k1_T, 0.0)
    return k1_T, {
        name: k1_T[batch.trainable_T].mean().item(),
        f"{name}_per_sequence": segment_sum(k1_T, batch.bounds).mean().item(),
    }


def charge_kl(knobs: Any, groups: Seq[Group], batch: Batch) -> tuple[Seq[Group], Batch, Metrics]:
    """The KL to the reference where the baseline is a prompt's other samples.

    Returns the groups, with ``kl="reward"`` less ``kl_coef`` times the sum of a sample's k1 over its tokens in its
    reward: the whole sample's KL, as its reward is the whole sample's. Then the batch with the state that
    ``clipped_with_kl`` reads, and metrics: ``equal_reward_groups``, the share of groups whose rewards are equal as they
    were given, and those of ``sampled_kl``.
    """
    judged = [group.rewards for group in groups if group.rewards]
    metrics: Metrics = {"equal_reward_groups": sum(len(set(r)) == 1 for r in judged) / len(judged)}
    if uses_kl(knobs):
        k1_T, kl_metrics = sampled_kl(batch)
        metrics |= kl_metrics
        if knobs.kl == "reward":
            groups = less(groups, (knobs.kl_coef * segment_sum(k1_T, batch.bounds)).tolist())
    return groups, replace(batch, state={"kl_coef": knobs.kl_coef}), metrics


def less(groups: Seq[Group], costs: Seq[float]) -> list[Group]:
    """The groups with their usable rollouts alone, each with its cost off its reward. ``costs`` are in their order."""
    left = iter(costs)
    return [
        replace(
            group,
            rollouts=[
                replace(r, reward=reward - next(left)) for r, reward in zip(group.usable, group.rewards, strict=True)
            ],
        )
        for group in groups
    ]
