"""Triton kernel of ``pages.append_attend`` where all heads share a key, whose last dimensions are its value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.pages import LATENT_HEADS, DecodeRows, Pages
from tandem.kernels.pages_triton import LOG2_E, _dot, _join, splits_of

TILE = 1 << 15
"""Most bytes of values that a program looks at at once."""


def append_attend(
    query_BHD: Tensor, key_B1D: Tensor, pages: Pages, rows: DecodeRows, *, scaling: float, most: int | None = None
) -> Tensor:
    """Attention [B, H, V] of one new token a row. A program for each row, ``LATENT_HEADS`` heads and split of pages.

    As ``pages_triton.append_attend``. Programs of one row read the same pages, mostly from the cache of the device.
    """
    count, heads, size = query_BHD.shape
    width = pages.values.shape[-1]
    blocks = triton.cdiv(heads, LATENT_HEADS)
    most = splits_of(count * blocks, rows, most)
    out = torch.empty(count, heads, width, dtype=query_BHD.dtype, device=query_BHD.device)
    part, top, mass = out, out, out
    if most > 1:
        part = torch.empty(most, count, heads, width, dtype=torch.float32, device=query_BHD.device)
        top, mass = torch.empty(2, most, count, heads, dtype=torch.float32, device=query_BHD.device)
    padded = max(16, triton.next_power_of_2(width))
    _append_attend_latent[(count, blocks, most)](
        query_BHD, key_B1D, pages.keys, pages.keys if pages.key_scales is None else pages.key_scales, rows.table_BP,
        rows.length_B, rows.target_B, rows.share, rows.arrived_BK, out, part, top, mass, scaling * LOG2_E, heads,
        *query_BHD.stride()[:2], key_B1D.stride(0), rows.table_BP.stride(0),
        rows.arrived_BK.stride(0) if rows.arrived_BK is not None else 0, SHARED=size - width,
        SHARED_PADDED=max(16, triton.next_power_of_2(size - width)), WIDTH=width, PADDED=padded, BLOCK=LATENT_HEADS,
        PARTS=min(pages.size // 16, max(1, pages.size * padded * query_BHD.element_size() // TILE)), PAGE=pages.size,
        IEEE=query_BHD.dtype == torch.float32, SCALED=pages.key_scales is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _append_attend_latent(  # type: ignore[no-untyped-def]
    query, key, keys, scales, table, length, target, share, arrived, out, part, top, mass, scale, heads, query_row,
    query_head, key_row, table_row, arrived_row,
    SHARED: tl.constexpr, SHARED_PADDED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, PAGE: tl.constexpr, IEEE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = SHARED + WIDTH
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    split = tl.program_id(2)
    tokens = tl.load(length + row).to(tl.int32)
    pages = tl.cdiv(tokens, PAGE)
    each = tl.maximum(tl.cdiv(pages, tl.num_programs(2)), tl.load(share))
    splits = tl.maximum(tl.cdiv(pages, each), 1)
    if split >= splits:
        return
    head = block * BLOCK + tl.arange(0, BLOCK)
    real_head = head < heads
    one = tl.arange(0, SHARED_PADDED)
    two = tl.arange(0, PADDED)
    real_one = one < SHARED
    real_two = two < WIDTH
    at = query + row * query_row + head[:, None] * query_head
    q_one = tl.load(at + one[None, :], mask=real_head[:, None] & real_one[None, :], other=0.0)
    q_two = tl.load(at + SHARED + two[None, :], mask=real_head[:, None] & real_two[None, :], other=0.0)

    # The new token, whose part in the sums is the first split's, and which the first block stores.
    at = key + row * key_row
    new_one = tl.load(at + one, mask=real_one, other=0.0)
    new_two = tl.load(at + SHARED + two, mask=real_two, other=0.0)
    place = tl.load(target + row).to(tl.int64)
    mine = (split == 0).to(tl.int32) * (block == 0).to(tl.int32)
    if SCALED:
        wide_one = new_one.to(tl.float32)
        wide_two = new_two.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide_one), axis=0), tl.max(tl.abs(wide_two), axis=0))
        new_scale = tl.maximum(largest, 1e-12) / 448.0
        low_one = (wide_one / new_scale).to(keys.dtype.element_ty)
        low_two = (wide_two / new_scale).to(keys.dtype.element_ty)
        tl.store(scales + place, new_scale, mask=mine > 0)
        own_one = low_one.to(tl.float32) * new_scale
        own_two = low_two.to(tl.float32) * new_scale
    else:
        low_one = new_one.to(keys.dtype.element_ty)
        low_two = new_two.to(keys.dtype.element_ty)
        own_one = new_one.to(tl.float32)
        own_two = new_two.to(tl.float32)
    tl.store(keys + place * SIZE + one, low_one, mask=one < SHARED * mine)
    tl.store(keys + place * SIZE + SHARED + two, low_two, mask=two < WIDTH * mine)
    own = tl.sum(q_one.to(tl.float32) * own_one[None, :], axis=1)
    own = (own + tl.sum(q_two.to(tl.float32) * own_two[None, :], axis=1)) * scale
    first = (split == 0).to(tl.float32)
    best = tl.where(split == 0, own, float("-inf"))
    total = tl.zeros([BLOCK], dtype=tl.float32) + first
    acc = tl.zeros([BLOCK, PADDED], dtype=tl.float32) + first * own_two[None, :]

    start = split * each
    if SCALED:
        # From e4m3 to float16 is one instruction, and exact. Scaled, a query's range is no danger.
        q_one = (q_one.to(tl.float32) * scale).to(tl.float32 if IEEE else tl.float16)
        q_two = (q_two.to(tl.float32) * scale).to(tl.float32 if IEEE else tl.float16)
    for number in range(start * PARTS, tl.minimum(start + each, pages) * PARTS):
        page = tl.load(table + row * table_row + number // PARTS).to(tl.int64)
        offset = number % PARTS * (PAGE // PARTS) + tl.arange(0, PAGE // PARTS)
        line = page * PAGE + offset
        start_of = keys + line[:, None] * SIZE
        k_one = tl.load(start_of + one[None, :], mask=real_one[None, :], other=0.0).to(q_one.dtype)
        k_two = tl.load(start_of + SHARED + two[None, :], mask=real_two[None, :], other=0.0).to(q_two.dtype)
        score = _dot(q_one, tl.trans(k_one), IEEE) + _dot(q_two, tl.trans(k_two), IEEE)
        seen = number // PARTS * PAGE + offset < tokens
        score = score * tl.load(scales + line)[None, :] if SCALED else score * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        # The first part of every page of a split but the first has a token that is seen, so the maximum is finite.
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, axis=1)
        acc = acc * fade[:, None]
        if SCALED:
            # Relative to the page's largest, so that float16 holds the products.
            its_scale = tl.where(seen, tl.load(scales + line), 0.0)
            most = tl.maximum(tl.max(its_scale, axis=0), 1e-30)
            acc += _dot((weight * (its_scale / most)[None, :]).to(k_two.dtype), k_two, IEEE) * most
        else:
            acc += _dot(weight.to(k_two.dtype), k_two, IEEE)
        best = higher

    real = real_head[:, None] & real_two[None, :]
    flat = row * heads + head
    where = flat[:, None] * WIDTH + two[None, :]
    result = acc / total[:, None]
    last = splits == 1
    if splits > 1:
        rows_heads = tl.num_programs(0) * heads
        part_size = rows_heads.to(tl.int64) * WIDTH
        tl.store(part + split * part_size + where, acc, mask=real)
        tl.store(top + split * rows_heads + flat, best, mask=real_head)
        tl.store(mass + split * rows_heads + flat, total, mask=real_head)
        # All of this program's, before it is counted.
        tl.debug_barrier()
        counter = arrived + row * arrived_row + block
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
        if last:
            result = _join(part, top, mass, where, flat, real, real_head, part_size, rows_heads, splits)
            tl.store(counter, 0)
    if last:
        tl.store(out + where, result.to(out.dtype.element_ty), mask=real)
