"""A Triton kernel for weights in 8 bits: whole again as fast as memory is read and written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 2048


def whole(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 ``codes`` (uint8, contiguous) times the ``scale`` of their row, [O, I], rounded to ``dtype``.

    On GPUs of compute capability 8.9 and above.
    """
    rows, columns = codes_OI.shape
    out_OI = torch.empty(rows, columns, dtype=dtype, device=codes_OI.device)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    _whole[grid](codes_OI, scale_O, out_OI, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    return out_OI


@triton.jit
def _whole(  # type: ignore[no-untyped-def]
    codes, scale, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    code = tl.load(codes + place, mask=there, other=0).to(tl.float8e4nv, bitcast=True)
    of_row = tl.load(scale + row, mask=row < rows, other=0.0)
    tl.store(out + place, (code.to(tl.float32) * of_row[:, None]).to(out.dtype.element_ty), mask=there)
