"""The Triton kernel of ``bits.py``: both sums in one reading."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
MOST_BLOCKS = 32
"""Blocks that a program adds up, where there are enough of them to keep all programs busy."""


def moments(words_N: Tensor) -> Tensor:
    """int64 [2]: sum of int16 words, and of their squares, modulo 2^64."""
    size = words_N.numel()
    blocks = max(1, min(MOST_BLOCKS, size // (BLOCK * 512)))
    programs = max(1, triton.cdiv(size, BLOCK * blocks))
    part_2P = torch.empty(2, programs, dtype=torch.int64, device=words_N.device)
    _moments[(programs,)](words_N, part_2P, size, programs, BLOCK=BLOCK, BLOCKS=blocks, num_warps=4)
    return part_2P.sum(dim=1)


@triton.jit
def _moments(words, part, size, programs, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0)
    start = number.to(tl.int64) * BLOCK * BLOCKS
    first = tl.zeros([BLOCK], dtype=tl.int64)
    second = tl.zeros([BLOCK], dtype=tl.int64)
    for block in range(BLOCKS):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        wide = tl.load(words + at, mask=at < size, other=0).to(tl.int32)
        first += wide
        second += wide * wide
    tl.store(part + number, tl.sum(first, axis=0))
    tl.store(part + programs + number, tl.sum(second, axis=0))
