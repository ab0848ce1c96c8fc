"""How evenly routers spread tokens over experts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from tandem.functional.segments import segment_sum
from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def balance_loss(logits: Seq[Tensor], bounds: Tensor, top_k: int) -> Tensor:
    """Each segment's load-balancing loss, [S]: ``E sum_e f_e P_e``, ``top_k`` where its tokens are spread evenly.

    ``logits`` are a router's of E experts for each layer, [T, E] each. ``f_e`` is how many of the segment's tokens have
    expert e among their ``top_k``, over their number, ``P_e`` the mean of its probability, both over all layers (Switch
    Transformer, arXiv:2101.03961, eq. 4 to 6, as transformers computes it, of one sequence at a time, which is that of
    DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20). The gradient goes through the probabilities alone.
    """
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    likely_SE = logits[0].new_zeros(bounds.numel() - 1, logits[0].shape[-1], dtype=dtype)
    chosen_SE = torch.zeros_like(likely_SE)
    for logits_TE in logits:
        likely_TE = logits_TE.to(dtype).softmax(dim=-1)
        chosen_TE = torch.zeros_like(likely_TE).scatter_(1, likely_TE.topk(top_k, dim=-1).indices, 1.0)
        chosen_SE = chosen_SE + segment_sum(chosen_TE, bounds)
        likely_SE = likely_SE + segment_sum(likely_TE, bounds)
    count_S = len(logits) * bounds.diff().to(likely_SE.device, dtype)
    return likely_SE.shape[-1] * (chosen_SE * likely_SE).sum(dim=-1) / count_S.square()


def bias_step(load_LE: Tensor, speed: float) -> Tensor:
    """What is added to the biases of L routers of E experts after an optimizer step, [L, E] float32.

    ``speed`` times the sign of ``mean - load``, each router's own mean: experts that had fewer tokens than the mean
    are picked more readily from now on (arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    ``load_LE`` is how many of the step's tokens each expert had.
    """
    load_LE = load_LE.double()
    return speed * (load_LE.mean(dim=-1, keepdim=True) - load_LE).sign().float()


def load_violation(load_LE: Tensor) -> float:
    """How far the busiest expert's load is above the mean of its router's, over that mean: the mean over L routers.

    0 where tokens are spread evenly, E / k - 1 where all take the same k of E (MaxVio of arXiv:2408.15664, eq. 4).
    """
    load_LE = load_LE.double()
    return (load_LE.amax(dim=-1) / load_LE.mean(dim=-1).clamp(min=1e-12) - 1).mean().item()
