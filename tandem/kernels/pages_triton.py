"""Triton kernels of ``pages.py``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = ((256, 1), (64, 4), (0, 16))
"""From so many sequences times key-value heads on, a sequence's pages are divided among so many programs."""


def places(table_BP: Tensor, length_B: Tensor, alive_B: Tensor, page: int) -> Tensor:
    """Where each row's next token goes; 0 for rows that have ended."""
    rows = len(length_B)
    target_B = torch.empty(rows, dtype=torch.int64, device=table_BP.device)
    grid = (triton.cdiv(rows, 128),)
    _places[grid](table_BP, length_B, alive_B, target_B, rows, table_BP.stride(0), PAGE=page, BLOCK=128)
    return target_B


@triton.jit
def _places(table, length, alive, target, rows, table_row, PAGE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    tokens = tl.load(length + row, mask=inside, other=0)
    lives = tl.load(alive + row, mask=inside, other=0) > 0
    page = tl.load(table + row * table_row + tokens // PAGE, mask=inside & lives, other=0).to(tl.int64)
    tl.store(target + row, tl.where(lives, page * PAGE + tokens % PAGE, 0), mask=inside)


def store(key_TKD: Tensor, value_TKD: Tensor, keys: Tensor, values: Tensor, target_T: Tensor) -> None:
    """Writes [T, Hkv, D] into pages, a program a token."""
    tokens, kv_heads, size = key_TKD.shape
    _store[(tokens,)](
        key_TKD,
        value_TKD,
        keys,
        values,
        target_T,
        *key_TKD.stride()[:2],
        *value_TKD.stride()[:2],
        KV_HEADS=kv_heads,
        KV_PADDED=triton.next_power_of_2(kv_heads),
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        PAGE=keys.shape[2],
        num_warps=2,
    )


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    key, value, keys, values, target, key_token, key_head, value_token, value_head,
    KV_HEADS: tl.constexpr, KV_PADDED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(target + token).to(tl.int64)
    page = place // PAGE
    offset = place % PAGE
    head = tl.arange(0, KV_PADDED)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = (head < KV_HEADS) & (column < SIZE)
    to = ((page * KV_HEADS + head) * PAGE + offset) * SIZE + column
    one = tl.load(key + token * key_token + head * key_head + column, mask=inside, other=0.0)
    tl.store(keys + to, one.to(keys.dtype.element_ty), mask=inside)
    two = tl.load(value + token * value_token + head * value_head + column, mask=inside, other=0.0)
    tl.store(values + to, two.to(values.dtype.element_ty), mask=inside)


def attend(
    query_BHD: Tensor,
    keys: Tensor,
    values: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    splits: int | None = None,
) -> Tensor:
    """One query a sequence over its pages: a program for each sequence, key-value head and split of the pages.

    Splits are joined by their log-sum-exps (flash decoding). How many there are depends on the shapes alone, so that
    a captured graph serves every length.
    """
    rows, heads, size = query_BHD.shape
    kv_heads, page = keys.shape[1:3]
    if splits is None:
        splits = next(splits for programs, splits in SPLITS if rows * kv_heads >= programs)
    out = torch.empty(rows, heads, size, dtype=query_BHD.dtype, device=query_BHD.device)
    part, top, mass = out, out, out
    if splits > 1:
        part = torch.empty(splits, rows, heads, size, dtype=torch.float32, device=query_BHD.device)
        top, mass = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=query_BHD.device)
    shape: dict[str, Any] = {"SIZE": size, "PADDED": max(16, triton.next_power_of_2(size)), "SPLITS": splits}
    group = heads // kv_heads
    _attend[(rows, kv_heads, splits)](
        query_BHD,
        keys,
        values,
        table_BP,
        length_B,
        out,
        part,
        top,
        mass,
        scaling * 1.4426950408889634,
        sliding_window or 0,
        *query_BHD.stride()[:2],
        table_BP.stride(0),
        GROUP=group,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)),
        PAGE=page,
        WINDOWED=sliding_window is not None,
        IEEE=keys.dtype == torch.float32,
        **shape,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _join[(rows, heads)](part, top, mass, out, rows * heads, **shape, num_warps=1)
    return out


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, table, length, out, part, top, mass, scale, window, query_row, query_head, table_row,
    SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    PAGE: tl.constexpr, WINDOWED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * GROUP
    tokens = (tl.load(length + row) + 1).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(tokens - window, 0)
    first_page = first // PAGE
    pages = tl.cdiv(tokens, PAGE)
    each = tl.cdiv(pages - first_page, SPLITS)
    start = first_page + split * each
    end = tl.minimum(start + each, pages)

    member = tl.arange(0, GROUP_PADDED)
    head = kv_head * GROUP + member
    column = tl.arange(0, PADDED)
    offset = tl.arange(0, PAGE)
    real_head = member < GROUP
    real_column = column < SIZE
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + column[None, :],
        mask=real_head[:, None] & real_column[None, :],
        other=0.0,
    ).to(keys.dtype.element_ty)
    best = tl.full([GROUP_PADDED], float("-inf"), dtype=tl.float32)
    total = tl.zeros([GROUP_PADDED], dtype=tl.float32)
    acc = tl.zeros([GROUP_PADDED, PADDED], dtype=tl.float32)
    for number in range(start, end):
        page = tl.load(table + row * table_row + number).to(tl.int64)
        base = (page * kv_heads + kv_head) * PAGE * SIZE
        tile = base + offset[:, None] * SIZE + column[None, :]
        k = tl.load(keys + tile, mask=real_column[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") if IEEE else tl.dot(q, tl.trans(k))
        position = number * PAGE + offset
        seen = position < tokens
        if WINDOWED:
            seen = seen & (position >= first)
        score = tl.where(seen[None, :], score * scale, float("-inf"))
        # Every page of the range has a token that is seen, so the maximum is finite.
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, axis=1)
        v = tl.load(values + tile, mask=real_column[None, :], other=0.0)
        acc = acc * fade[:, None]
        if IEEE:
            acc += tl.dot(weight, v, input_precision="ieee")
        else:
            acc += tl.dot(weight.to(v.dtype), v)
        best = higher
    flat = row * heads + head
    where = flat[:, None] * SIZE + column[None, :]
    real = real_head[:, None] & real_column[None, :]
    if SPLITS == 1:
        tl.store(out + where, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        rows_heads = tl.num_programs(0) * heads
        tl.store(part + split.to(tl.int64) * rows_heads * SIZE + where, acc, mask=real)
        tl.store(top + split * rows_heads + flat, best, mask=real_head)
        tl.store(mass + split * rows_heads + flat, total, mask=real_head)


@triton.jit
def _join(part, top, mass, out, rows_heads, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    flat = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, PADDED)
    best = tl.load(top + split * rows_heads + flat)
    # The first split is never empty; an empty one has weight 0.
    weight = tl.exp2(best - tl.max(best, axis=0))
    total = tl.sum(tl.load(mass + split * rows_heads + flat) * weight, axis=0)
    real = (column < SIZE)[None, :]
    tile = tl.load(part + (split[:, None] * rows_heads + flat) * SIZE + column[None, :], mask=real, other=0.0)
    joined = tl.sum(tile * weight[:, None], axis=0) / total
    tl.store(out + flat * SIZE + column, joined.to(out.dtype.element_ty), mask=column < SIZE)
