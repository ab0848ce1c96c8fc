"""The Triton kernel of ``bits.py``: one launch a tensor, one reading of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels import bits

BLOCK = 2048
MOST_BLOCKS = 16
"""Blocks that a program adds up, where there are enough of them to keep all programs busy."""
A, B, C = tl.constexpr(bits.A), tl.constexpr(bits.B), tl.constexpr(bits.C)
SHIFT_1, SHIFT_2 = tl.constexpr(bits.SHIFT_1), tl.constexpr(bits.SHIFT_2)
TYPES = {
    torch.float32: (tl.float32, tl.int32),
    torch.bfloat16: (tl.bfloat16, tl.int16),
    torch.float16: (tl.float16, tl.int16),
    torch.int32: (tl.int32, tl.int32),
    torch.int16: (tl.int16, tl.int16),
    torch.int8: (tl.int8, tl.int8),
}


def add_sum(total_N: Tensor, slot: int, values_RC: Tensor, *, start: int, step: int, dtype: torch.dtype) -> None:
    """As ``bits.add_sum``. Sums of integers are the same in whatever order programs come to add theirs."""
    rows, width = values_RC.shape
    size = values_RC.numel()
    stride = values_RC.stride(0)
    flat = rows == 1 or (stride == width == step)
    blocks = max(1, min(MOST_BLOCKS, size // (BLOCK * 512)))
    cast, word = TYPES[dtype]
    _add_sum[(triton.cdiv(size, BLOCK * blocks),)](
        total_N, values_RC, slot, size, width, stride, start, step, blocks,
        FLAT=flat, CAST=cast, WORD=word, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slot", "size", "width", "stride", "start", "step", "blocks"])
def _add_sum(  # type: ignore[no-untyped-def]
    total, values, slot, size, width, stride, start, step, blocks,
    FLAT: tl.constexpr, CAST: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * blocks * BLOCK
    found = tl.zeros([BLOCK], dtype=tl.uint32)
    for block in range(blocks):
        at = first + block * BLOCK
        inside = lane < tl.minimum(size - at, BLOCK).to(tl.int32)
        if FLAT:
            value = tl.load(values + at + lane, mask=inside, other=0)
            position = (start + at).to(tl.uint32) + lane.to(tl.uint32)
        else:
            row = (at + lane) // width
            column = (at + lane) - row * width
            value = tl.load(values + row * stride + column, mask=inside, other=0)
            position = (start + row * step + column).to(tl.uint32)
        mixed = value.to(CAST).to(WORD, bitcast=True).to(tl.uint32) * A + position * B
        mixed ^= mixed >> SHIFT_1
        mixed *= C
        mixed ^= mixed >> SHIFT_2
        found += tl.where(inside, mixed, 0)
    tl.atomic_add(total + slot, tl.sum(found, axis=0).to(tl.int32))
