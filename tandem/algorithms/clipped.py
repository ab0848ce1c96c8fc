"""What PPO and GRPO share: the clipped surrogate with its metrics, and the distance to the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.functional.fields import required
from tandem.functional.kl import kl_estimate
from tandem.functional.policy import clipped_policy_loss, importance_ratio
from tandem.functional.segments import segment_sum
from tandem.lazy import torch
from tandem.roles import Metrics
from tandem.types import Batch, Outputs, TokenLoss

if TYPE_CHECKING:
    from torch import Tensor


def clipped_surrogate(
    out: Outputs, batch: Batch, *, low: float, high: float, dual_clip: float | None = None
) -> TokenLoss:
    """PPO's clipped loss against ``batch.proximal_logp_T`` (formula: ``clipped_policy_loss``).

    Metrics: ``policy_loss``, ``ratio``, ``clip_fraction``, ``approx_kl`` (k3 of KL(old || new), nats per token) and,
    where the forward gave it, ``entropy``.
    """
    logp_T, old_logp_T = required(out.logp_T, "out.logp_T"), batch.proximal_logp_T
    ratio_T = importance_ratio(logp_T, old_logp_T)
    loss_T, clipped_T = clipped_policy_loss(ratio_T, required(batch.advantage_T, "advantage_T"), low, high, dual_clip)
    metrics_T = {
        "policy_loss": loss_T.detach(),
        "ratio": ratio_T.detach(),
        "clip_fraction": clipped_T,
        "approx_kl": kl_estimate(old_logp_T, logp_T.detach(), "k3"),
    }
    if out.entropy_T is not None:
        metrics_T["entropy"] = out.entropy_T.detach()
    return TokenLoss(loss_T=loss_T, metrics_T=metrics_T)


def add_kl_loss(token_loss: TokenLoss, out: Outputs, batch: Batch) -> TokenLoss:
    """Adds ``kl_coef * k3`` against the reference, and its k3 (nats per token) as the metric ``kl_loss``."""
    logp_T, reference_logp_T = required(out.logp_T, "out.logp_T"), required(batch.reference_logp_T, "reference_logp_T")
    k3_T = kl_estimate(logp_T, reference_logp_T, "k3")
    return TokenLoss(
        loss_T=token_loss.loss_T + batch.kl_coef * k3_T,
        metrics_T=token_loss.metrics_T | {"kl_loss": k3_T.detach()},
    )


def sampled_kl(batch: Batch) -> tuple[Tensor, Metrics]:
    """k1 of KL(sampling policy || reference) for each token, [T], 0 where not trainable.

    Metrics: ``kl``, its mean over tokens, and ``kl_per_sequence``, the mean over sequences of its sum, in nats.
    """
    k1_T = kl_estimate(batch.proximal_logp_T, required(batch.reference_logp_T, "reference_logp_T"), "k1")
    k1_T = torch.where(batch.trainable_T, k1_T, 0.0)
    return k1_T, {
        "kl": k1_T[batch.trainable_T].mean().item(),
        "kl_per_sequence": segment_sum(k1_T, batch.bounds).mean().item(),
    }
