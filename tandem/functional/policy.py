"""Policy-gradient surrogates: clipped ratios of tokens or of sequences, and clipped weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.functional.kl import MAX_EXPONENT
from tandem.functional.segments import segment_sum
from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def importance_ratio(logp_T: Tensor, old_logp_T: Tensor) -> Tensor:
    """``exp(logp - old_logp)``, [T], with the exponent held within ±20 so that it stays finite."""
    return (logp_T - old_logp_T).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def sequence_logp(logp_T: Tensor, trainable_T: Tensor, bounds: Tensor) -> Tensor:
    """The mean of a sequence's log-probs over its trainable tokens, at each of its tokens, [T].

    A difference of two is the log of GSPO's ratio ``(p(y) / p_old(y))^(1 / |y|)`` (arXiv:2507.18071, eq. 7).
    """
    sum_S = segment_sum(torch.where(trainable_T, logp_T, 0.0), bounds)
    mean_S = sum_S / segment_sum(trainable_T.to(logp_T.dtype), bounds).clamp(min=1)
    return mean_S.repeat_interleave(bounds.diff().to(mean_S.device), output_size=logp_T.numel())


def clipped_policy_loss(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate ``-min(ratio A, clip(ratio, 1 - low, 1 + high) A)`` (arXiv:1707.06347, eq. 7), all [T].

    ``low`` and ``high`` may differ (clip-higher of DAPO, arXiv:2503.14476, section 3.1). ``dual_clip`` c > 1 bounds
    the loss of a negative advantage by ``-c A`` (dual-clip PPO, arXiv:1912.09729; the delta of two-sided GRPO,
    arXiv:2505.07291, is the same). Returns the loss, and 1.0 for each token at which a bound holds and no gradient
    flows (else 0.0): its mean is the clip fraction. The bound of ±20 on the ratio's exponent is one of them.
    """
    ratio_T = importance_ratio(logp_T, old_logp_T)
    surrogate_T = ratio_T * advantage_T
    bounded_T = torch.min(surrogate_T, ratio_T.clamp(1 - low, 1 + high) * advantage_T)
    if dual_clip is not None:
        floor_T = dual_clip * advantage_T
        bounded_T = torch.where(advantage_T < 0, torch.max(bounded_T, floor_T), bounded_T)
    held_T = (logp_T - old_logp_T).abs() > MAX_EXPONENT
    return -bounded_T, ((bounded_T != surrogate_T) | held_T).to(ratio_T.dtype)


def clipped_weight_loss(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """CISPO's ``-sg(clip(ratio, 1 - low, 1 + high)) A logp`` (arXiv:2506.13585, eq. 4), all [T]: every token learns.

    ``sg`` is a number that is not differentiated. ``dual_clip`` is the bound from above where the advantage is
    negative. Returns the loss, and 1.0 for each token whose weight a bound holds (else 0.0).
    """
    ratio_T = importance_ratio(logp_T.detach(), old_logp_T)
    weight_T = ratio_T.clamp(1 - low, 1 + high)
    if dual_clip is not None:
        weight_T = torch.where(advantage_T < 0, weight_T.clamp(max=dual_clip), weight_T)
    return -weight_T * advantage_T * logp_T, (weight_T != ratio_T).to(ratio_T.dtype)
