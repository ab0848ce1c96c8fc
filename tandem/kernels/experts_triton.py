"""Triton kernels for the stacked experts of few tokens. Their plain form is ``models.moe.experts.grouped_experts``.

A pick is one of the K experts of a token, and its number is its place in the router's [T, K]. Picks are sorted into
tiles of rows of one expert; what is made of a pick is kept at its own number. Nothing is asked of the host, and a row's
sums are the same whatever rows are beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.layers import Curve
from tandem.kernels.layers_triton import bend

BLOCK, CHUNK = 16, 1024
"""Picks that a program finds the places of, and those that it compares them with at a time."""
DEPTH = 64
"""Elements of a row that are multiplied at a time."""
FULL = 132
"""Programs that keep a GPU busy: one to each of an H200's multiprocessors. Fewer have half as many columns each."""
SHARED, STAGES = 96 << 10, 4
"""Bytes of a multiprocessor's own memory that a program takes at most, and tiles of a product on their way in it."""


@dataclass(frozen=True)
class Places:
    """Where picks are, in the order of their experts."""

    order_N: Tensor
    """int32: the pick at each place."""
    tile_S3: Tensor
    """int32: of each tile its expert, its first place, and the place behind the expert's last. Where that is no place
    behind the first, the tile is empty."""
    rows: int
    """Of a tile."""


def place(index_N: Tensor, experts: int) -> Places:
    """Where the picks of these experts are; those of an expert that there is not are in no tile.

    Tile number ``first // rows + expert`` is the one from ``first`` on: more than the one before, and known without it.
    """
    picks = len(index_N)
    rows = rows_for(picks / experts)
    order_N = torch.empty(picks, dtype=torch.int32, device=index_N.device)
    tile_S3 = torch.empty(picks // rows + experts, 3, dtype=torch.int32, device=index_N.device)
    grid = (triton.cdiv(picks, BLOCK) + triton.cdiv(experts, BLOCK),)
    _place[grid](
        index_N, order_N, tile_S3, picks, experts,
        ROWS=rows, BLOCK=BLOCK, CHUNK=min(CHUNK, triton.next_power_of_2(picks)), num_warps=8,
    )  # fmt: skip
    return Places(order_N, tile_S3, rows)


def rows_for(mean: float) -> int:
    """Rows of a tile, for as many picks of an expert in the mean.

    Of those tried on an H200 the fastest with 16, 32, 64 and 128 picks, or within 4% of it
    (bench/results/experts_sweep.json); beyond, by argument.
    """
    return next((rows for rows, most in ((16, 16), (32, 80), (64, 200)) if mean <= most), 128)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    index, order, tiles, picks, experts, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    block = tl.program_id(0)
    blocks = tl.cdiv(picks, BLOCK)
    if block < blocks:
        pick = block * BLOCK + tl.arange(0, BLOCK)
        inside = pick < picks
        expert = tl.load(index + pick, mask=inside, other=0).to(tl.int32)
        tl.store(order + _before(index, expert * picks + pick, picks, BLOCK, CHUNK), pick, mask=inside)
    else:
        expert = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        begin = _before(index, expert * picks, picks, BLOCK, CHUNK)
        end = _before(index, (expert + 1) * picks, picks, BLOCK, CHUNK)
        first = begin // ROWS + expert
        # The last expert's go on to the end of the table.
        behind = tl.where(expert < experts - 1, end, picks) // ROWS + expert + 1
        count = tl.where(expert < experts, behind - first, 0)
        for number in range(0, tl.max(count, axis=0)):
            at = tiles + 3 * (first + number)
            inside = number < count
            tl.store(at, expert, mask=inside)
            tl.store(at + 1, begin + number * ROWS, mask=inside)
            tl.store(at + 2, end, mask=inside)


@triton.jit
def _before(index, key, picks, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many picks come before each key, which is an expert's number times all picks, and a pick's."""
    found = tl.zeros([BLOCK, CHUNK], dtype=tl.int32)
    for first in range(0, picks, CHUNK):
        pick = first + tl.arange(0, CHUNK)
        inside = pick < picks
        expert = tl.load(index + pick, mask=inside, other=0).to(tl.int32)
        found += (inside & (expert * picks + pick < key[:, None])).to(tl.int32)
    return tl.sum(found, axis=1)


def product(
    x_RI: Tensor, weight_XOI: Tensor, bias_XO: Tensor | None, places: Places, factor_N: Tensor | None = None
) -> Tensor:
    """Each pick's row times its expert's matrix, plus ``factor`` times its expert's bias, [N, O].

    ``x`` has a row a pick, or one for as many picks in a row as there are more of them.
    """
    picks, size, columns = len(places.order_N), x_RI.shape[1], weight_XOI.shape[1]
    dtype = x_RI.dtype
    if bias_XO is not None and factor_N is not None:
        dtype = torch.promote_types(dtype, factor_N.dtype)
    out_NO = x_RI.new_empty(picks, columns, dtype=dtype)
    tiles, rows = len(places.tile_S3), places.rows
    block, stages = columns_for(rows, tiles, columns, x_RI.element_size())
    _product[(tiles, triton.cdiv(columns, block))](
        x_RI, weight_XOI, x_RI if bias_XO is None else bias_XO, x_RI if factor_N is None else factor_N, out_NO,
        places.order_N, places.tile_S3, size, columns, x_RI.stride(0), *weight_XOI.stride(),
        PICKS=picks // len(x_RI), BIAS=bias_XO is not None, WEIGHTED=factor_N is not None, EVEN=size % DEPTH == 0,
        ROWS=rows, COLUMNS=block, DEPTH=DEPTH, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out_NO


def columns_for(rows: int, tiles: int, columns: int, item: int) -> tuple[int, int]:
    """Columns of a tile, and how many loads of ``DEPTH`` elements of ``item`` bytes are on their way at a time."""
    block = 128 if item == 2 and tiles * triton.cdiv(columns, 128) >= FULL else 64
    return block, max(2, min(STAGES, SHARED // ((block + rows) * DEPTH * item)))


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, weight, bias, factor, out, order, tiles, size, columns, x_row, expert_step, column_step, size_step,
    PICKS: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tiles + 3 * tl.program_id(0)
    begin, end = tl.load(tile + 1), tl.load(tile + 2)
    if begin < end:
        expert = tl.load(tile).to(tl.int64)
        place = begin + tl.arange(0, ROWS)
        real = place < end
        # Rows that are not there are those of the first pick, so that no load has to ask.
        pick = tl.load(order + place, mask=real, other=0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        depth = tl.arange(0, DEPTH)
        x_at = x + (pick // PICKS)[None, :] * x_row + depth[:, None]
        weight_at = weight + expert * expert_step + column[:, None].to(tl.int64) * column_step
        weight_at += depth[None, :].to(tl.int64) * size_step
        # Columns are the lines of the tile, of which there are always as many as tensor cores want.
        total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
        for first in range(0, size, DEPTH):
            if EVEN:
                some_x = tl.load(x_at)
                some_weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
            else:
                near = first + depth < size
                some_x = tl.load(x_at, mask=near[:, None], other=0.0)
                some_weight = tl.load(weight_at, mask=inside[:, None] & near[None, :], other=0.0)
            total = tl.dot(some_weight, some_x, total, input_precision="ieee")
            x_at += DEPTH
            weight_at += DEPTH * size_step
        value = total.to(x.dtype.element_ty)
        if BIAS:
            more = tl.load(bias + expert * columns + column, mask=inside, other=0.0)[:, None].to(tl.float32)
            if WEIGHTED:
                share = tl.load(factor + pick)[None, :].to(tl.float32)
                more = (more * share).to(out.dtype.element_ty).to(tl.float32)
            value = (value.to(tl.float32) + more).to(out.dtype.element_ty)
        at = out + pick[None, :] * columns + column[:, None]
        tl.store(at, value, mask=inside[:, None] & real[None, :])


def weighted(x_NI: Tensor, factor_N: Tensor, curve: Curve | None = None) -> Tensor:
    """``factor * x`` of each pick; with a curve ``factor * curve(gate) * up`` of the two halves of ``x``."""
    picks, width = x_NI.shape
    size = width if curve is None else width // 2
    out_NI = x_NI.new_empty(picks, size)
    block = min(1024, triton.next_power_of_2(size))
    _weighted[(picks, triton.cdiv(size, block))](
        x_NI, factor_N, out_NI, size, x_NI.stride(0), CURVE=curve, BLOCK=block, num_warps=4
    )
    return out_NI


@triton.jit
def _weighted(  # type: ignore[no-untyped-def]
    x, factor, out, size, x_row, CURVE: tl.constexpr, BLOCK: tl.constexpr
):
    pick = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    at = x + pick * x_row + column
    value = tl.load(at, mask=inside, other=0.0)
    if CURVE is not None:
        up = tl.load(at + size, mask=inside, other=0.0)
        value = (bend(value, CURVE).to(tl.float32) * up.to(tl.float32)).to(value.dtype)
    share = tl.load(factor + pick).to(tl.float32)
    tl.store(out + pick * size + column, (value.to(tl.float32) * share).to(value.dtype), mask=inside)


def collect(x_NE: Tensor, index_N: Tensor, experts: int, like_TE: Tensor) -> Tensor:
    """The sum of each token's picks of an expert that there is, ``like`` what the token was."""
    tokens, size = like_TE.shape
    out_TE = like_TE.new_empty(tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    _collect[(tokens, triton.cdiv(size, block))](
        x_NE, index_N, out_TE, size, experts, PICKS=len(x_NE) // tokens, BLOCK=block, num_warps=4
    )
    return out_TE


@triton.jit
def _collect(x, index, out, size, experts, PICKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for number in tl.static_range(PICKS):
        pick = token * PICKS + number
        value = tl.load(x + pick * size + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(tl.load(index + pick) < experts, value, 0.0)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)
