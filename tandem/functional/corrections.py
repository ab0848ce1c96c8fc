"""What corrects for samples of a sampler whose probabilities are not the trainer's: weights, and tokens left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from tandem.functional.kl import MAX_EXPONENT
from tandem.functional.segments import segment_sum
from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["token_tis", "sequence_tis", "icepop", "geo", "gap"]
BOUNDS: dict[str, tuple[float, float]] = {
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 5.0),
    "icepop": (0.2, 5.0),
    "geo": (0.99, 1.01),
}
"""The usual bounds of the rules that have any, from below and from above."""


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
    - ``icepop``: ``w`` where ``low <= w <= high``; other tokens are left out (IcePop, arXiv:2510.18855).
    - ``geo``: ``w`` in sequences with ``low <= exp(mean log w) <= high``; other sequences are left out.
    - ``gap``: ``w`` where the two probabilities differ by ``gap`` at most; other tokens are left out.

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
    elif rule == "icepop":
        kept_T = trainable_T & (log_w_T >= lowest) & (log_w_T <= highest)
    elif rule == "gap":
        kept_T = trainable_T & ((logp_T.exp() - sampler_logp_T.exp()).abs() <= gap)
    if rule in ("token_tis", "sequence_tis"):
        log_w_T = log_w_T.clamp(lowest, highest)
    weight_T = log_w_T.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    return torch.where(kept_T, weight_T, 0.0), kept_T
