"""Triton kernels of ``logprob.py``. Logits are contiguous [n, V], in any floating type but float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that one program holds at a time."""


def row_stats(
    logits_nV: Tensor, target_n: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logsumexp, log-prob of the target and, if asked, entropy of each row, in one pass: a program a row."""
    rows, vocabulary = logits_nV.shape
    logsumexp_n, logp_n, entropy_n = logits_nV.new_empty((3, rows), dtype=torch.float32)
    if rows:
        _row_stats[(rows,)](
            logits_nV, target_n, logsumexp_n, logp_n, entropy_n, vocabulary, 1.0 / temperature, ENTROPY=entropy,
            BLOCK=_block(vocabulary), num_warps=8,
        )  # fmt: skip
    return logsumexp_n, logp_n, entropy_n if entropy else None


@triton.jit
def _row_stats(  # type: ignore[no-untyped-def]
    logits, targets, logsumexps, logps, entropies, vocabulary, inverse_temperature,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 64 bits: a row's offset passes 2^31 from 14k rows of 152k logits on.
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * vocabulary
    # Finite, so that differences to it are too.
    top = -1.0e30
    mass = 0.0
    tilt = 0.0
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * inverse_temperature
        higher = tl.maximum(top, tl.max(z, axis=0))
        weight = tl.exp(z - higher)
        shrink = tl.exp(top - higher)
        if ENTROPY:
            # sum_v e^(z_v - top) (z_v - top), moved along when top rises. A weight of 0 would meet -inf here.
            more = tl.sum(tl.where(weight > 0.0, weight * (z - higher), 0.0), axis=0)
            tilt = (tilt + mass * (top - higher)) * shrink + more
        mass = mass * shrink + tl.sum(weight, axis=0)
        top = higher
    logsumexp = top + tl.log(mass)
    chosen = tl.load(start + tl.load(targets + row)).to(tl.float32) * inverse_temperature
    tl.store(logsumexps + row, logsumexp)
    tl.store(logps + row, chosen - logsumexp)
    if ENTROPY:
        tl.store(entropies + row, tl.log(mass) - tilt / mass)


def logits_gradient_(
    logits_nV: Tensor,
    target_n: Tensor,
    logsumexp_n: Tensor,
    grad_logp_n: Tensor | None,
    temperature: float,
    *,
    entropy_n: Tensor | None = None,
    grad_entropy_n: Tensor | None = None,
) -> Tensor:
    """Logits into the gradient of ``(grad_logp * logp + grad_entropy * entropy).sum()``: a program a row's block."""
    rows, vocabulary = logits_nV.shape
    block = _block(vocabulary)
    if rows:
        # What a flag switches off is never read, so any tensor stands for it.
        _logits_gradient[(rows, triton.cdiv(vocabulary, block))](
            logits_nV, target_n, logsumexp_n, logsumexp_n if entropy_n is None else entropy_n,
            logsumexp_n if grad_logp_n is None else grad_logp_n.contiguous(),
            logsumexp_n if grad_entropy_n is None else grad_entropy_n.contiguous(), vocabulary, 1.0 / temperature,
            LOGP=grad_logp_n is not None, ENTROPY=grad_entropy_n is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return logits_nV


@triton.jit
def _logits_gradient(  # type: ignore[no-untyped-def]
    logits, targets, logsumexps, entropies, grad_logps, grad_entropies, vocabulary, inverse_temperature,
    LOGP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    place = logits + row * vocabulary + column
    logp = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
    logp -= tl.load(logsumexps + row)
    p = tl.exp(logp)
    grad = p * 0.0
    if LOGP:
        hit = column == tl.load(targets + row)
        grad += tl.load(grad_logps + row) * (tl.where(hit, 1.0, 0.0) - p)
    if ENTROPY:
        slope = tl.where(p > 0.0, p * (logp + tl.load(entropies + row)), 0.0)
        grad -= tl.load(grad_entropies + row) * slope
    tl.store(place, (grad * inverse_temperature).to(logits.dtype.element_ty), mask=inside)


def _block(vocabulary: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocabulary))
