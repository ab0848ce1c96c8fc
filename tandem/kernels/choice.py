"""Which experts a token takes, of what its router says of all: one kernel on a GPU, plain torch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tandem.kernels.available import on_triton

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Rule:
    """How experts are chosen by their scores, and what each of those chosen weighs."""

    picks: int
    score: Score = "softmax"
    """What a logit becomes; a correction is added to it for the choice alone (arXiv:2408.15664)."""
    groups: int = 1
    """Experts lie in groups; only those of the ``kept`` best are chosen from (arXiv:2405.04434, section 2.1.2)."""
    kept: int = 1
    best: int = 1
    """A group is as good as the sum of its best experts, one or two."""
    shared: bool = False
    """Whether one chosen weighs its share of the sum of their scores and ``eps``, and not its score."""
    eps: float = 0.0
    scale: float = 1.0
    """Of all weights."""


def choose(logit_TX: Tensor, correction_X: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Weights [T, K] and experts [T, K] of float32 logits, the best first."""
    if on_triton(logit_TX):
        from tandem.kernels import choice_triton

        return choice_triton.choose(logit_TX, correction_X, rule)
    return choose_torch(logit_TX, correction_X, rule)


def choose_torch(logit_TX: Tensor, correction_X: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """``choose`` in plain torch."""
    score_TX = logit_TX.softmax(-1) if rule.score == "softmax" else logit_TX.sigmoid()
    ranked_TX = score_TX if correction_X is None else score_TX + correction_X
    if rule.groups > 1:
        ranked_TGS = ranked_TX.unflatten(-1, (rule.groups, -1))
        group_TG = ranked_TGS.topk(rule.best, dim=-1).values.sum(-1)
        out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(-1, group_TG.topk(rule.kept).indices, False)
        ranked_TX = ranked_TGS.masked_fill(out_TG[..., None], float("-inf")).flatten(-2)
    index_TK = ranked_TX.topk(rule.picks).indices
    weight_TK = score_TX.gather(-1, index_TK)
    if rule.shared:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + rule.eps)
    return weight_TK * rule.scale, index_TK
