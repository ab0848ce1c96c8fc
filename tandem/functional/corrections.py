"""What corrects for samples of a sampler whose probabilities are not the trainer's: weights, and tokens left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from tandem.functional.kl import MAX_EXPONENT
from tandem.functional.segments import segment_sum
from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["token_tis", "sequence_tis", "decoupled", "icepop", "geo", "gap"]
BOUNDS: dict[str, tuple[float, float]] = {
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "decoupled": (0.0, 5.0),
    "icepop": (0.2, 5.0),
    "geo": (0.99, 1.01),
    "gap": (0.0, 5.0),
}
"""The usual bounds of each rule, from below and from above."""
QUANTILES = (0.01, 0.5, 0.99)
"""Of the ratio between trainer and sampler, 3 quantiles are logged: that of 1%, the median and that of 99%."""


def correction(
    logp_T: Tensor,
    sampler_logp_T: Tensor,
    trainable_T: Tensor,
    bounds: Tensor,
    rule: Rule,
    *,
    low: float = 0.0,
    high: float = math.inf,
    gap: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weight of each token, and whether it is kept, both [T]; of tokens that are not trainable 0 and False.

    With ``w = exp(logp - sampler_logp)``, the trainer's probability of a sampled token over the sampler's:

    - ``token_tis``: ``clip(w, low, high)`` (truncated importance sampling: Yao et al. 2025, "Your
      Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    - ``sequence_tis``: the same of the product of ``w`` over the sequence, for each of its tokens.
    - ``decoupled``: ``w`` where ``low <= w <= high``; other tokens are left out. Without bounds it is the decoupled
      objective of AReaL (arXiv:2505.24298, eq. 5), whose code leaves out what is above a cap.
    - ``icepop``: the same with a bound from below, too (IcePop, arXiv:2510.18855).
    - ``geo``: ``w`` in sequences with ``low <= exp(mean log w) <= high``; other sequences are left out.
    - ``gap``: ``clip(w, low, high)`` where the two probabilities differ by ``gap`` at most; other tokens are left out.
      Two small probabilities never differ by much, whatever their ratio: what bounds that is the clipping.

    What is kept is told in log space, and only that is exponentiated, with an exponent within ±20: a weight is finite
    whatever the log-probs.
    """
    log_w_T = torch.where(trainable_T, logp_T - sampler_logp_T, 0.0)
    lowest, highest = math.log(low) if low > 0 else -math.inf, math.log(high)
    kept_T = trainable_T
    if rule in ("sequence_tis", "geo"):
        counts_S = bounds.diff().to(log_w_T.device)
        log_w_S = segment_sum(log_w_T, bounds)
        if rule == "geo":
            mean_S = log_w_S / segment_sum(trainable_T.to(log_w_T.dtype), bounds).clamp(min=1)
            inside_S = (mean_S >= lowest) & (mean_S <= highest)
            kept_T = trainable_T & inside_S.repeat_interleave(counts_S)
        else:
            log_w_T = log_w_S.repeat_interleave(counts_S)
    elif rule in ("decoupled", "icepop"):
        kept_T = trainable_T & (log_w_T >= lowest) & (log_w_T <= highest)
    elif rule == "gap":
        kept_T = trainable_T & ((logp_T.exp() - sampler_logp_T.exp()).abs() <= gap)
    if rule in ("token_tis", "sequence_tis", "gap"):
        log_w_T = log_w_T.clamp(lowest, highest)
    weight_T = log_w_T.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    return torch.where(kept_T, weight_T, 0.0), kept_T


def mismatch(gap_N: Tensor) -> dict[str, float]:
    """How far a sampler's log-probs are from the trainer's, over N tokens: the trainer's less the sampler's, in nats.

    With ``w = exp(gap)``, the trainer's probability of a token over the sampler's:

    - ``sampler_gap_max``, ``sampler_gap_mean``: of the absolute gap, in nats.
    - ``effective_sample_size``: ``(sum w)^2 / (N sum w^2)`` (Kish 1965), the share of the N tokens that they are worth
      as the trainer's own.
    - ``mismatch_kl``: the mean of ``w - 1 - log w``, k3 of KL(sampler || trainer), in nats per token.
    - ``mismatch_ratio_q01``, ``_q50``, ``_q99``: quantiles of ``w``: of q, the smallest that is not exceeded by q N.

    A gap that is NaN is one that nobody knows, and none of the N; where none is known there are no metrics.
    """
    gap_N = gap_N[~gap_N.isnan()].double()
    if not gap_N.numel():
        return {}
    log_w_N = gap_N.clamp(-300.0, 300.0)  # the square of w is a number of float64
    w_N = log_w_N.exp()
    absolute_N = gap_N.abs()
    found = {
        "sampler_gap_max": absolute_N.max().item(),
        "sampler_gap_mean": absolute_N.mean().item(),
        "effective_sample_size": (w_N.mean().square() / w_N.square().mean()).clamp(max=1.0).item(),
        "mismatch_kl": (w_N - 1 - gap_N).mean().item(),
    }
    for q in QUANTILES:
        place = max(math.ceil(q * w_N.numel()), 1)
        found[f"mismatch_ratio_q{round(100 * q):02d}"] = w_N.kthvalue(place).values.item()
    return found
