"""The critic's loss and how well it explains the returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.functional.rounding import rounding_of
from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def clipped_value_loss(
    value_T: Tensor, old_value_T: Tensor, return_T: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """``max((V - R)^2, (V_old + clip(V - V_old, ±clip) - R)^2) / 2``, all [T]; ``clip=None`` is plain squared error.

    PPO's released code (openai/baselines, ppo2; arXiv:2005.12729, section 3). Returns the loss, and 1.0 for each
    token at which the clipped error is the larger one and no gradient flows (else 0.0).
    """
    error_T = (value_T - return_T).square()
    if clip is None:
        return 0.5 * error_T, torch.zeros_like(error_T)
    moved_T = value_T - old_value_T
    # Inside the bounds the clipped value is the value: put together again, it would be so but for rounding.
    clipped_T = torch.where(moved_T.abs() > clip, old_value_T + moved_T.clamp(-clip, clip), value_T)
    clipped_error_T = (clipped_T - return_T).square()
    return 0.5 * torch.max(error_T, clipped_error_T), (clipped_error_T > error_T).to(value_T.dtype)


def explained_variance(value_T: Tensor, return_T: Tensor, mask_T: Tensor) -> float:
    """``1 - Var(R - V) / Var(R)`` over the tokens where ``mask_T`` is true. 1 is perfect, 0 no better than a constant.

    0 where the returns do not vary by more than rounding (``rounding_of``): there is nothing to explain.
    """
    return_N, value_N = return_T[mask_T].double(), value_T[mask_T].double()
    if return_N.numel() == 0:
        return 0.0
    variance = float(return_N.var(correction=0))
    if variance <= rounding_of(return_N, value_N) ** 2:
        return 0.0
    return 1.0 - float((return_N - value_N).var(correction=0)) / variance
