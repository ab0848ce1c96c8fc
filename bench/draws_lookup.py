"""The kernels of a draw by lookup among cumulative sums, against which ``bench/draws.py`` measures the engine's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def lookup_triton(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Tokens and their log-probs, [2, B] float64, of uniform numbers in [0, 1), float64 [B]."""
    rows, vocabulary = logits_BV.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    top, mass = torch.empty(2, rows, blocks, dtype=torch.float32, device=logits_BV.device)
    out = torch.empty(2, rows, dtype=torch.float64, device=logits_BV.device)
    _blocks[(rows, blocks)](
        logits_BV, top, mass, logits_BV.stride(0), vocabulary, blocks, BLOCK=BLOCK, num_warps=4
    )  # fmt: skip
    _choose[(rows,)](
        logits_BV, uniform_B, top, mass, out, logits_BV.stride(0), vocabulary, blocks, rows,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _blocks(logits, top, mass, stride, vocabulary, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    best = tl.max(z, axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    tl.store(top + row * blocks + block, best)
    tl.store(mass + row * blocks + block, tl.sum(tl.exp(z - base), axis=0))


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, uniform, top, mass, out, stride, vocabulary, blocks, rows, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCKS)
    best_n = tl.load(top + row * blocks + number, mask=number < blocks, other=float("-inf"))
    best = tl.max(best_n, axis=0)
    sum_n = tl.load(mass + row * blocks + number, mask=number < blocks, other=0.0)
    weight_n = tl.where(best_n == float("-inf"), 0.0, sum_n.to(tl.float64) * tl.exp((best_n - best).to(tl.float64)))
    cdf_n = tl.cumsum(weight_n, axis=0)
    total = tl.sum(weight_n, axis=0)
    target = tl.load(uniform + row) * total
    first = tl.min(tl.where((cdf_n > target) & (weight_n > 0), number, BLOCKS), axis=0)
    block = tl.minimum(first, tl.max(tl.where(weight_n > 0, number, 0), axis=0))
    before = tl.sum(tl.where(number < block, weight_n, 0.0), axis=0)
    base = tl.sum(tl.where(number == block, best_n, 0.0), axis=0)
    inner = (target - before) * tl.exp((best - base).to(tl.float64))
    inside = tl.arange(0, BLOCK)
    column = block * BLOCK + inside
    z = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    weight = tl.exp(z - base)
    cdf = tl.cumsum(weight.to(tl.float64), axis=0)
    first = tl.min(tl.where((cdf > inner) & (weight > 0), inside, BLOCK), axis=0)
    token = block * BLOCK + tl.minimum(first, tl.max(tl.where(weight > 0, inside, 0), axis=0))
    chosen = tl.load(logits + row * stride + token).to(tl.float32)
    tl.store(out + row, token.to(tl.float64))
    tl.store(out + rows + row, (chosen - best).to(tl.float64) - tl.log(total))
