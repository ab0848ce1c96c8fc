"""Triton kernels of ``pages.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.layers import Norm, Rotation
from tandem.kernels.layers_triton import kind, normed, weighted
from tandem.kernels.pages import DecodeRows, Pages

FULL = 448
"""Programs that keep a GPU busy: between three and four to each of an H200's multiprocessors."""
LOG2_E = 1.4426950408889634
LEAST = 2
"""Fewer pages to a program are not worth joining its part with others."""
SPLITS = ((1024, 4), (256, 8), (0, 16))
"""From so many rows times key-value heads on, a row's pages are divided among so many programs at most."""
TILE = 1 << 16
"""Most bytes of keys that a program looks at at once: of wider ones (512 in float32) a page is taken in parts."""
MANY = 1024
"""Rows times key-value heads from which on a program has two warps instead of four: others hide what one waits for."""
WIDEST = 256
"""Most dimensions of a head whose sums fit into the registers of two warps."""


def decode_rows(table_BP: Tensor, length_B: Tensor, alive_B: Tensor, page: int, kv_heads: int) -> DecodeRows:
    """Where each row's next token goes; 0 for rows that have ended. What a program takes, and zeros to count in."""
    rows, device = len(length_B), table_BP.device
    target_B = torch.empty(rows, dtype=torch.int64, device=device)
    share = torch.empty(1, dtype=torch.int32, device=device)
    arrived_BK = torch.empty(rows, kv_heads, dtype=torch.int32, device=device)
    _decode_rows[(1,)](
        table_BP, length_B, alive_B, target_B, share, arrived_BK, rows, table_BP.stride(0), PAGE=page,
        KV_HEADS=kv_heads, KV_PADDED=triton.next_power_of_2(kv_heads), BLOCK=triton.next_power_of_2(rows), FULL=FULL,
        LEAST=LEAST, num_warps=8,
    )  # fmt: skip
    return DecodeRows(table_BP, length_B, target_B, share, arrived_BK)


@triton.jit
def _decode_rows(  # type: ignore[no-untyped-def]
    table, length, alive, target, share, arrived, rows, table_row,
    PAGE: tl.constexpr, KV_HEADS: tl.constexpr, KV_PADDED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    inside = row < rows
    tokens = tl.load(length + row, mask=inside, other=0)
    lives = tl.load(alive + row, mask=inside, other=0) > 0
    page = tl.load(table + row * table_row + tokens // PAGE, mask=inside & lives, other=0).to(tl.int64)
    tl.store(target + row, tl.where(lives, page * PAGE + tokens % PAGE, 0), mask=inside)
    pages = tl.sum(tl.cdiv(tokens, PAGE), axis=0)
    tl.store(share, tl.maximum(tl.cdiv(pages * KV_HEADS, FULL), LEAST).to(tl.int32))
    head = tl.arange(0, KV_PADDED)[None, :]
    zeros = tl.zeros([BLOCK, KV_PADDED], dtype=tl.int32)
    tl.store(arrived + row[:, None] * KV_HEADS + head, zeros, mask=inside[:, None] & (head < KV_HEADS))


def store(key_TKD: Tensor, value_TKD: Tensor | None, pages: Pages, target_T: Tensor) -> None:
    """Writes [T, Hkv, D] into pages, a program a token and head."""
    tokens, kv_heads, size = key_TKD.shape
    valued = value_TKD is not None
    value_TKD = key_TKD if value_TKD is None else value_TKD
    _store[(tokens, kv_heads)](
        key_TKD, value_TKD, *_tensors(pages), target_T, *key_TKD.stride()[:2], *value_TKD.stride()[:2], SIZE=size,
        PADDED=triton.next_power_of_2(size), PAGE=pages.size, SCALED=pages.key_scales is not None, VALUED=valued,
        num_warps=1,
    )  # fmt: skip


def _tensors(pages: Pages) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and their scales; without scales something in their place, which is not touched."""
    if pages.key_scales is None or pages.value_scales is None:
        return pages.keys, pages.values, pages.keys, pages.values
    return pages.keys, pages.values, pages.key_scales, pages.value_scales


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    key, value, keys, values, key_scales, value_scales, target, key_token, key_head, value_token, value_head,
    SIZE: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, VALUED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    place = tl.load(target + token).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    one = tl.load(key + token * key_token + head * key_head + column, mask=inside, other=0.0)
    _put(one, keys, key_scales, place, head, kv_heads, 1, SIZE, PADDED, PAGE, SCALED)
    if VALUED:
        two = tl.load(value + token * value_token + head * value_head + column, mask=inside, other=0.0)
        _put(two, values, value_scales, place, head, kv_heads, 1, SIZE, PADDED, PAGE, SCALED)


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    x, kept, scales, place, head, kv_heads, real,
    SIZE: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Writes ``x`` [PADDED] of one token and head to its place if ``real`` is 1. Returns what is kept, in float32."""
    column = tl.arange(0, PADDED)
    at = (place // PAGE * kv_heads + head) * PAGE + place % PAGE
    wide = x.to(tl.float32)
    if SCALED:
        scale = tl.maximum(tl.max(tl.abs(wide), axis=0), 1e-12) / 448.0
        low = (wide / scale).to(kept.dtype.element_ty)
        tl.store(scales + at, scale, mask=real > 0)
        wide = low.to(tl.float32) * scale
    else:
        low = x.to(kept.dtype.element_ty)
    tl.store(kept + at * SIZE + column, low, mask=column < SIZE * real)
    return wide


@triton.jit
def _kept(  # type: ignore[no-untyped-def]
    kept, scales, place, head, kv_heads, SIZE: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """What is in that place [PADDED], in float32."""
    column = tl.arange(0, PADDED)
    at = (place // PAGE * kv_heads + head) * PAGE + place % PAGE
    x = tl.load(kept + at * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scales + at)
    return x


def splits_of(programs: int, rows: DecodeRows, most: int | None) -> int:
    """Among how many programs a row's pages are divided at most; None: by how many ``programs`` there are without."""
    most = most or next(splits for least, splits in SPLITS if programs >= least)
    return min(most, rows.table_BP.shape[1])


def append_attend(
    query_BHD: Tensor,
    key_BKD: Tensor,
    value_BKD: Tensor,
    pages: Pages,
    rows: DecodeRows,
    *,
    scaling: float,
    sliding_window: int | None,
    rotation: Rotation | None = None,
    value_norm: Norm | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """One new token a row: a program for each row, key-value head and split of the pages, at most ``most``.

    Long rows are split among programs that take about as much as each would if all were as long (``rows.share``); the
    last of them to come joins their parts by the log-sum-exps (flash decoding), always in the same order. The first
    also stores the new key and value, which the others mask. The grid depends on shapes alone, so that a captured graph
    serves every length: programs beyond a row's splits end at once.
    """
    count, heads, size = query_BHD.shape
    kv_heads, given = pages.keys.shape[1], not key_BKD.shape[1]
    if given:
        key_BKD = value_BKD = query_BHD  # Something in their place, which is not touched.
    most = splits_of(count * kv_heads, rows, most)
    out = torch.empty(count, heads, size, dtype=query_BHD.dtype, device=query_BHD.device)
    part, top, mass = out, out, out
    if most > 1:
        part = torch.empty(most, count, heads, size, dtype=torch.float32, device=query_BHD.device)
        top, mass = torch.empty(2, most, count, heads, dtype=torch.float32, device=query_BHD.device)
    group = heads // kv_heads
    padded = max(16, triton.next_power_of_2(size))
    cos_PR, sin_PR, norms = (out, out, None) if rotation is None else (rotation.cos_PR, rotation.sin_PR, rotation.norms)
    query_norm, key_norm = norms or (Norm(out), Norm(out))
    _append_attend[(count, kv_heads, most)](
        query_BHD, key_BKD, value_BKD, *_tensors(pages), rows.table_BP, rows.length_B, rows.target_B, rows.share,
        rows.arrived_BK, cos_PR, sin_PR, query_norm.weight, key_norm.weight, query_norm.eps,
        out if value_norm is None or value_norm.weight is None else value_norm.weight,
        0.0 if value_norm is None else value_norm.eps, out if sink_H is None else sink_H, out, part, top, mass,
        scaling * LOG2_E, (softcap or 1.0) * LOG2_E, sliding_window or 0, *query_BHD.stride()[:2],
        *key_BKD.stride()[:2], *value_BKD.stride()[:2], rows.table_BP.stride(0), SIZE=size, PADDED=padded,
        PARTS=max(1, pages.size * padded * query_BHD.element_size() // TILE), GROUP=group,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)), PAGE=pages.size, WINDOWED=sliding_window is not None,
        IEEE=query_BHD.dtype == torch.float32, SCALED=pages.key_scales is not None,
        ROTATED=0 if rotation is None else cos_PR.shape[1], PAIRS=rotation is not None and rotation.pairs,
        NORM=norms is not None, OFFSET=query_norm.offset, WIDE=query_norm.wide, VALUE_NORM=kind(value_norm),
        GIVEN=given, CAPPED=softcap is not None, SINKS=sink_H is not None,
        num_warps=2 if count * kv_heads >= MANY and padded <= WIDEST else 4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _head(  # type: ignore[no-untyped-def]
    at, real, cos, sin, weight, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROTATED: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Heads [N, PADDED] of one token from ``at`` [N, 1], turned as ``layers_triton._rotate`` turns them."""
    column = tl.arange(0, PADDED)[None, :]
    real = real & (column < SIZE)
    x = tl.load(at + column, mask=real, other=0.0)
    dtype = x.dtype
    if PAIRS:
        sign = tl.where(column % 2 == 0, -1.0, 1.0)
        other = tl.where(column < ROTATED, column + tl.where(column % 2 == 0, 1, -1), column)
    else:
        sign = tl.where(column < ROTATED // 2, -1.0, 1.0)
        other = column + tl.where(column < ROTATED // 2, ROTATED // 2, -(ROTATED // 2))
        other = tl.where(column < ROTATED, other, column)
    y = x
    if ROTATED > 0:
        y = tl.load(at + other, mask=real, other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        scale = (1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / SIZE + eps))[:, None]
        near = column < SIZE
        x = weighted(x, scale, tl.load(weight + column, mask=near, other=0.0), OFFSET, WIDE)
        y = weighted(y, scale, tl.load(weight + other, mask=near, other=0.0), OFFSET, WIDE)
    if ROTATED > 0:
        turned = column < ROTATED
        # Products are rounded to the table's type.
        rounded = cos.dtype.element_ty
        by_cos = x.to(tl.float32) * tl.load(cos + column, mask=turned, other=1.0).to(tl.float32)
        by_sin = y.to(tl.float32) * tl.load(sin + column, mask=turned, other=0.0).to(tl.float32)
        x = (by_cos.to(rounded).to(tl.float32) + sign * by_sin.to(rounded).to(tl.float32)).to(dtype)
    return x


@triton.jit
def _dot(a, b, IEEE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.dot(a, b, input_precision="ieee") if IEEE else tl.dot(a, b)


@triton.jit
def _bent(score, cap):  # type: ignore[no-untyped-def]
    """``cap * tanh(score / cap)``; both in the same units."""
    return cap * (1.0 - 2.0 / (tl.exp(2.0 * score / cap) + 1.0))


@triton.jit
def _append_attend(  # type: ignore[no-untyped-def]
    query, key, value, keys, values, key_scales, value_scales, table, length, target, share, arrived, cos, sin,
    query_norm, key_norm, eps, value_norm, value_eps, sinks, out, part, top, mass, scale, cap, window, query_row,
    query_head, key_row, key_head, value_row, value_head, table_row,
    SIZE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    PAGE: tl.constexpr, WINDOWED: tl.constexpr, IEEE: tl.constexpr, SCALED: tl.constexpr, ROTATED: tl.constexpr,
    PAIRS: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr, VALUE_NORM: tl.constexpr,
    GIVEN: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * GROUP
    tokens = tl.load(length + row).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(tokens + 1 - window, 0)
    first_page = first // PAGE
    pages = tl.cdiv(tokens, PAGE)
    each = tl.maximum(tl.cdiv(pages - first_page, tl.num_programs(2)), tl.load(share))
    splits = tl.maximum(tl.cdiv(pages - first_page, each), 1)
    if split >= splits:
        return
    member = tl.arange(0, GROUP_PADDED)
    head = kv_head * GROUP + member
    column = tl.arange(0, PADDED)
    real_head = member < GROUP
    real_column = column < SIZE
    real = real_head[:, None] & real_column[None, :]
    cos += tokens * ROTATED
    sin += tokens * ROTATED
    at = query + row * query_row + head[:, None] * query_head
    q = _head(at, real_head[:, None], cos, sin, query_norm, eps, SIZE, PADDED, ROTATED, PAIRS, NORM, OFFSET, WIDE)

    # The new token, whose part in the sums is the first split's.
    place = tl.load(target + row).to(tl.int64)
    mine = (split == 0).to(tl.int32)
    if GIVEN:
        new_k = _kept(keys, key_scales, place, kv_head, kv_heads, SIZE, PADDED, PAGE, SCALED)
        new_v = _kept(values, value_scales, place, kv_head, kv_heads, SIZE, PADDED, PAGE, SCALED)
    else:
        at = key + row * key_row + kv_head * key_head + tl.zeros([1, 1], dtype=tl.int32)
        one = _head(at, real_column[None, :], cos, sin, key_norm, eps, SIZE, PADDED, ROTATED, PAIRS, NORM, OFFSET, WIDE)
        one = tl.reshape(one, [PADDED])
        two = tl.load(value + row * value_row + kv_head * value_head + column, mask=real_column, other=0.0)
        if VALUE_NORM:
            two = normed(two, value_norm, value_norm, value_eps, SIZE, column, real_column, VALUE_NORM)
        new_k = _put(one, keys, key_scales, place, kv_head, kv_heads, mine, SIZE, PADDED, PAGE, SCALED)
        new_v = _put(two, values, value_scales, place, kv_head, kv_heads, mine, SIZE, PADDED, PAGE, SCALED)
    share = mine.to(tl.float32)
    own = tl.sum(q.to(tl.float32) * new_k[None, :], axis=1) * scale
    if CAPPED:
        own = _bent(own, cap)
    best = tl.where(mine > 0, own, float("-inf"))
    total = tl.zeros([GROUP_PADDED], dtype=tl.float32) + share
    acc = tl.zeros([GROUP_PADDED, PADDED], dtype=tl.float32) + share * new_v[None, :]
    if SINKS:
        # Scores are in units of log 2. The first split's part has the sink, as the new token.
        sink = tl.load(sinks + head, mask=real_head, other=0.0).to(tl.float32) * 1.4426950408889634
        higher = tl.where(mine > 0, tl.maximum(best, sink), 0.0)
        fade = tl.exp2(best - higher)
        total = total * fade + tl.where(mine > 0, tl.exp2(sink - higher), 0.0)
        acc = acc * fade[:, None]
        best = tl.where(mine > 0, higher, best)

    start = first_page + split * each
    if SCALED:
        # From e4m3 to float16 is one instruction, and exact. Scaled, a query's range is no danger.
        low = q.to(tl.float32) * scale
        q = low if IEEE else low.to(tl.float16)
    for number in range(start * PARTS, tl.minimum(start + each, pages) * PARTS):
        page = tl.load(table + row * table_row + number // PARTS).to(tl.int64)
        offset = number % PARTS * (PAGE // PARTS) + tl.arange(0, PAGE // PARTS)
        line = (page * kv_heads + kv_head) * PAGE + offset
        tile = line[:, None] * SIZE + column[None, :]
        k = tl.load(keys + tile, mask=real_column[None, :], other=0.0).to(q.dtype)
        score = _dot(q, tl.trans(k), IEEE)
        score = score * tl.load(key_scales + line)[None, :] if SCALED else score * scale
        if CAPPED:
            score = _bent(score, cap)
        position = number // PARTS * PAGE + offset
        seen = position < tokens
        if WINDOWED:
            seen = seen & (position >= first)
        score = tl.where(seen[None, :], score, float("-inf"))
        # The first part of every page of a split but the first has a token that is seen, so the maximum is finite.
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, axis=1)
        v = tl.load(values + tile, mask=real_column[None, :], other=0.0).to(q.dtype)
        acc = acc * fade[:, None]
        if SCALED:
            # Relative to the page's largest, so that float16 holds the products.
            scales = tl.where(seen, tl.load(value_scales + line), 0.0)
            most = tl.maximum(tl.max(scales, axis=0), 1e-30)
            acc += _dot((weight * (scales / most)[None, :]).to(v.dtype), v, IEEE) * most
        else:
            acc += _dot(weight.to(v.dtype), v, IEEE)
        best = higher

    flat = row * heads + head
    where = flat[:, None] * SIZE + column[None, :]
    result = acc / total[:, None]
    last = splits == 1
    if splits > 1:
        rows_heads = tl.num_programs(0) * heads
        part_size = rows_heads.to(tl.int64) * SIZE
        tl.store(part + split * part_size + where, acc, mask=real)
        tl.store(top + split * rows_heads + flat, best, mask=real_head)
        tl.store(mass + split * rows_heads + flat, total, mask=real_head)
        # All of this program's, before it is counted.
        tl.debug_barrier()
        counter = arrived + row * kv_heads + kv_head
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
        if last:
            result = _join(part, top, mass, where, flat, real, real_head, part_size, rows_heads, splits)
            tl.store(counter, 0)
    if last:
        tl.store(out + where, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def _join(part, top, mass, where, flat, real, real_head, part_size, rows_heads, splits):  # type: ignore[no-untyped-def]
    """What the parts of all splits make together."""
    best = tl.full(flat.shape, float("-inf"), dtype=tl.float32)
    total = tl.zeros(flat.shape, dtype=tl.float32)
    acc = tl.zeros(where.shape, dtype=tl.float32)
    for split in range(splits):
        # Past the cache of this multiprocessor, which knows nothing of what others store.
        line = split * rows_heads + flat
        one_top = tl.load(top + line, mask=real_head, other=0.0, cache_modifier=".cg")
        one_mass = tl.load(mass + line, mask=real_head, other=1.0, cache_modifier=".cg")
        tile = split * part_size + where
        one_part = tl.load(part + tile, mask=real, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(best, one_top)
        fade, weight = tl.exp2(best - higher), tl.exp2(one_top - higher)
        total = total * fade + one_mass * weight
        acc = acc * fade[:, None] + one_part * weight[:, None]
        best = higher
    return acc / total[:, None]
