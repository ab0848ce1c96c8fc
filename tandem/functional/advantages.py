"""Advantages: generalized advantage estimation, whitening, and baselines inside a group of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem.functional.segments import segment_sum
from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def gae(
    reward_T: Tensor, value_T: Tensor, trainable_T: Tensor, bounds: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, eq. 16; the finite sum of arXiv:1707.06347, eq. 11).

    ``delta_t = r_t + gamma V_t' - V_t``, ``A_t = delta_t + gamma lam A_t'``, return ``R_t = A_t + V_t``, where ``t'``
    is the next *trainable* token of the segment: tool output in between neither decays nor ends anything. After the
    last trainable token the value is 0.

    All [T], ``trainable_T`` bool, ``bounds`` int64 [S + 1]; ``lam`` is one number, or one of each segment [S]
    (``length_adaptive_lambda``). Returns advantage_T and return_T, 0 where not trainable.
    """
    with torch.no_grad():
        count_S = segment_sum(trainable_T.float(), bounds).long()
        if count_S.sum() == 0:
            return torch.zeros_like(value_T), torch.zeros_like(value_T)
        # Trainable tokens only, one row a segment, padded on the right with zeros: an absorbing state of value 0.
        real_SL = torch.arange(int(count_S.max()), device=value_T.device) < count_S[:, None]
        reward_SL = value_T.new_zeros(real_SL.shape).masked_scatter(real_SL, reward_T[trainable_T].to(value_T.dtype))
        value_SL = value_T.new_zeros(real_SL.shape).masked_scatter(real_SL, value_T[trainable_T])
        advantage_SL = torch.zeros_like(value_SL)
        next_value_S = next_advantage_S = value_T.new_zeros(count_S.shape)
        for t in reversed(range(real_SL.shape[1])):
            delta_S = reward_SL[:, t] + gamma * next_value_S - value_SL[:, t]
            next_advantage_S = delta_S + gamma * lam * next_advantage_S
            next_value_S = value_SL[:, t]
            advantage_SL[:, t] = next_advantage_S
        advantage_T = torch.zeros_like(value_T).masked_scatter(trainable_T, advantage_SL[real_SL])
        return advantage_T, (advantage_T + value_T) * trainable_T


def length_adaptive_lambda(trainable_T: Tensor, bounds: Tensor, alpha: float) -> Tensor:
    """GAE's lambda of each segment [S], ``max(0, 1 - 1 / (alpha l))`` for ``l`` trainable tokens, in float64.

    Length-adaptive GAE (VAPO, arXiv:2504.05118, section 4.2): the coefficients of a segment's TD errors sum to about
    ``1 / (1 - lambda) = alpha l``, so that the reward at the end reaches the first tokens of a long answer, and a short
    one has less variance. An answer of at most ``1 / alpha`` tokens has 0, the critic's one-step error.
    """
    count_S = segment_sum(trainable_T.double(), bounds)
    return (1 - 1 / (alpha * count_S.clamp(min=1))).clamp(min=0)


def whiten(x_T: Tensor, mask_T: Tensor, floor: float) -> Tensor:
    """``(x - mean) / max(std, floor)`` over the tokens where ``mask_T`` is true (biased std); 0 elsewhere.

    PPO's advantages since openai/lm-human-preferences (``whiten`` in its utils, the code of arXiv:1909.08593), there
    with ``sqrt(var + 1e-8)``. ``floor`` is the spread that rounding alone could make (``rounding_of``): what is below
    it is not blown up to a signal. It is meant for all that one batch of samples holds, not for a micro-batch.
    """
    # In float64: in float32 the square of 1e20 is inf, and a number divided by that a silent 0.
    x_N = x_T[mask_T].double()
    if x_N.numel() == 0:
        return torch.zeros_like(x_T)
    centred_N = x_N - x_N.mean()
    spread = max(float(centred_N.square().mean().sqrt()), floor)
    whitened_N = centred_N / spread if spread > 0 else centred_N
    return torch.zeros_like(x_T).masked_scatter(mask_T, whitened_N.to(x_T.dtype))


def centred(rewards: Sequence[float]) -> list[float]:
    """``r_i - mean(r)`` (Dr.GRPO, arXiv:2503.20783, section 3). Exactly 0 where all rewards are equal."""
    if _all_equal(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    return [r - mean for r in rewards]


def group_normalised(rewards: Sequence[float], eps: float = 1e-4) -> list[float]:
    """``(r_i - mean(r)) / (std(r) + eps)`` with the unbiased std (GRPO, arXiv:2402.03300, section 4.1.2).

    A group of one, or of equal rewards, says nothing about which sample was better: exactly 0 for each.
    """
    if _all_equal(rewards):
        return [0.0] * len(rewards)
    deviations = centred(rewards)
    # The root of a sum of squares, none of which overflows.
    std = math.hypot(*deviations) / math.sqrt(len(rewards) - 1)
    return [deviation / (std + eps) for deviation in deviations]


def _all_equal(rewards: Sequence[float]) -> bool:
    # Told apart before any arithmetic: the rounding of a mean must not become an advantage.
    return len(set(rewards)) <= 1
