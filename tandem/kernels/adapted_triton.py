"""A Triton kernel that adds a product of two narrow matrices to a weight: read once, written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128
MOST = 64
"""Columns of the first factor at a time."""


def add_product(weight_OI: Tensor, left_OR: Tensor, right_RI: Tensor, scale: float) -> Tensor:
    """``weight + scale left right``, added up in float32 and rounded to the type of all three."""
    (rows, columns), rank = weight_OI.shape, left_OR.shape[1]
    out_OI = torch.empty(rows, columns, dtype=weight_OI.dtype, device=weight_OI.device)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    _add_product[grid](
        weight_OI.contiguous(), left_OR.contiguous(), right_RI.contiguous(), out_OI, scale, rows, columns, rank,
        ROWS=ROWS, COLUMNS=COLUMNS, RANK=min(MOST, max(16, triton.next_power_of_2(rank))), num_warps=4,
    )  # fmt: skip
    return out_OI


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    weight, left, right, out, scale, rows, columns, rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    added = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        inner = start + tl.arange(0, RANK)
        up = tl.load(left + row * rank + inner[None, :], mask=(row < rows) & (inner < rank)[None, :], other=0.0)
        down = tl.load(
            right + inner[:, None].to(tl.int64) * columns + column,
            mask=(inner < rank)[:, None] & (column < columns), other=0.0,
        )  # fmt: skip
        added += tl.dot(up, down, input_precision="ieee")
    place, there = row * columns + column, (row < rows) & (column < columns)
    whole = tl.load(weight + place, mask=there, other=0.0).to(tl.float32) + scale * added
    tl.store(out + place, whole.to(out.dtype.element_ty), mask=there)
