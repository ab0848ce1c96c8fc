"""The Triton kernel of ``choice.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.choice import Rule


def choose(logit_TX: Tensor, correction_X: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """A program a token, which looks at all experts once for each that it picks."""
    tokens, experts = logit_TX.shape
    weight_TK = logit_TX.new_empty(tokens, rule.picks)
    index_TK = torch.empty(tokens, rule.picks, dtype=torch.int64, device=logit_TX.device)
    size = experts // rule.groups
    _choose[(tokens,)](
        logit_TX, logit_TX if correction_X is None else correction_X, weight_TK, index_TK, rule.eps, rule.scale,
        SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
        GROUPS=rule.groups, GROUPS_PADDED=triton.next_power_of_2(rule.groups), KEPT=rule.kept, BEST=rule.best,
        PICKS=rule.picks, PICKS_PADDED=triton.next_power_of_2(rule.picks),
        SCORE=rule.score, SHARED=rule.shared, CORRECTED=correction_X is not None, num_warps=1,
    )  # fmt: skip
    return weight_TK, index_TK


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, corrections, weights, indices, eps, scale,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr, PICKS: tl.constexpr, PICKS_PADDED: tl.constexpr, SCORE: tl.constexpr,
    SHARED: tl.constexpr, CORRECTED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_PADDED)
    member = tl.arange(0, SIZE_PADDED)
    expert = group[:, None] * SIZE + member[None, :]
    inside = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    score = tl.load(logits + token * (GROUPS * SIZE) + expert, mask=inside, other=float("-inf"))
    if SCORE == "softmax":
        score = tl.exp(score - tl.max(tl.max(score, axis=1), axis=0))
        score = score / tl.sum(tl.sum(score, axis=1), axis=0)
    else:
        score = 1.0 / (1.0 + tl.exp(-score))
    ranked = score
    if CORRECTED:
        ranked += tl.load(corrections + expert, mask=inside, other=0.0).to(tl.float32)
    ranked = tl.where(inside, ranked, float("-inf"))
    if GROUPS > 1:
        good = tl.max(ranked, axis=1)
        if BEST == 2:
            first = tl.min(tl.where(ranked == good[:, None], member[None, :], SIZE), axis=1)
            good += tl.max(tl.where(member[None, :] == first[:, None], float("-inf"), ranked), axis=1)
        kept = group < 0
        for _ in tl.static_range(KEPT):
            left = tl.where(kept, float("-inf"), good)
            kept = kept | (
                group == tl.min(tl.where((left == tl.max(left, axis=0)) & (kept == 0), group, GROUPS), axis=0)
            )
        ranked = tl.where(kept[:, None], ranked, float("-inf"))
    place = tl.arange(0, PICKS_PADDED)
    index = tl.zeros([PICKS_PADDED], dtype=tl.int32)
    weight = tl.zeros([PICKS_PADDED], dtype=tl.float32)
    for number in tl.static_range(PICKS):
        best = tl.max(tl.max(ranked, axis=1), axis=0)
        # Of equal ones the first. Where there is none, as with NaN, the last: an expert that exists.
        chosen = tl.min(tl.min(tl.where(ranked == best, expert, GROUPS * SIZE - 1), axis=1), axis=0)
        its = tl.sum(tl.sum(tl.where(expert == chosen, tl.where(inside, score, 0.0), 0.0), axis=1), axis=0)
        ranked = tl.where(expert == chosen, float("-inf"), ranked)
        index = tl.where(place == number, chosen, index)
        weight = tl.where(place == number, its, weight)
    if SHARED:
        weight = weight / (tl.sum(weight, axis=0) + eps)
    at = token * PICKS + place
    tl.store(weights + at, weight * scale, mask=place < PICKS)
    tl.store(indices + at, index.to(tl.int64), mask=place < PICKS)
