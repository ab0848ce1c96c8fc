"""The clipped policy-gradient surrogate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.functional.kl import MAX_EXPONENT
from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def importance_ratio(logp_T: Tensor, old_logp_T: Tensor) -> Tensor:
    """``exp(logp - old_logp)``, [T], with the exponent held within ±20 so that it stays finite."""
    return (logp_T - old_logp_T).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


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
