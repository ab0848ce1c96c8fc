"""Triton kernels of ``layers.py``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.layers import Curve, Norm, Rotation


def add_norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    by: Norm | None,
    *,
    first: Norm | None = None,
    scale: float = 1.0,
    factor_1: Tensor | None = None,
    out_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of ``(residual + scale * first(x)) * factor``, or of ``x`` alone, and that product: a program a row.

    The product is of the residual's type. Rows of ``x`` and ``out`` may lie apart, a residual's have no gaps.
    """
    rows, size = x_TD.shape
    total_TD = x_TD if residual_TD is None else torch.empty_like(residual_TD)
    if by is None:
        out_TD = total_TD
    elif out_TD is None:
        out_TD = x_TD.new_empty(rows, size)
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](
        x_TD,
        total_TD if residual_TD is None else residual_TD,
        *_tensors(first, x_TD),
        *_tensors(by, x_TD),
        x_TD if factor_1 is None else factor_1,
        out_TD,
        total_TD,
        scale,
        0.0 if first is None else first.eps,
        0.0 if by is None else by.eps,
        x_TD.stride(0),
        out_TD.stride(0),
        size,
        FIRST=kind(first),
        NORM=kind(by),
        ADD=residual_TD is not None,
        SCALED=scale != 1.0,
        MULTIPLIED=factor_1 is not None,
        BLOCK=block,
        num_warps=4 if block <= 4096 else 8,
    )
    return out_TD, total_TD


def _tensors(by: Norm | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias; where there is none something in its place, which is not touched."""
    weight, bias = (None, None) if by is None else (by.weight, by.bias)
    return other if weight is None else weight, other if bias is None else bias


def kind(by: Norm | None) -> int:
    """As bits of one constant: whether there is a norm at all, and whatever else ``Norm`` says of it."""
    if by is None:
        return 0
    bits = (True, by.weight is not None, by.bias is not None, by.offset, by.centered, by.wide, by.rounds)
    return sum(1 << place for place, bit in enumerate(bits) if bit)


@triton.jit
def weighted(x, scale, weight, OFFSET: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x * scale * weight``, in the type of ``x``, with its rounding on the way."""
    normed = x.to(tl.float32) * scale
    factor = weight.to(tl.float32)
    if OFFSET:
        factor += 1.0
    if not WIDE:
        normed = normed.to(x.dtype).to(tl.float32)
    return (normed * factor).to(x.dtype)


@triton.jit
def normed(value, weight, bias, eps, size, column, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The norm of a row, of that ``kind``."""
    wide = value.to(tl.float32)
    if KIND & 16:
        wide = tl.where(inside, wide - tl.sum(wide, axis=0) / size, 0.0)
    wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps))
    if (KIND & 32) == 0:
        wide = wide.to(value.dtype).to(tl.float32)
    if KIND & 2:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if KIND & 8:
            factor += 1.0
        wide = wide * factor
    if KIND & 4:
        wide += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return wide.to(value.dtype)


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x, residual, first_weight, first_bias, weight, bias, factor, out, total, scale, first_eps, eps, x_row, out_row,
    size, FIRST: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, MULTIPLIED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    if FIRST:
        value = normed(value, first_weight, first_bias, first_eps, size, column, inside, FIRST)
    if ADD:
        if SCALED:
            value = (value.to(tl.float32) * scale).to(value.dtype)
        more = tl.load(residual + row * size + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(more.dtype)
        if MULTIPLIED:
            value = (value.to(tl.float32) * tl.load(factor).to(tl.float32)).to(value.dtype)
        tl.store(total + row * size + column, value, mask=inside)
    if NORM:
        if NORM & 64:
            value = value.to(out.dtype.element_ty)
        value = normed(value, weight, bias, eps, size, column, inside, NORM)
        tl.store(out + row * out_row + column, value.to(out.dtype.element_ty), mask=inside)


def gated(gate_TI: Tensor, up_TI: Tensor, curve: Curve) -> Tensor:
    """``curve(gate) * up`` of rows [T, I], which may lie apart."""
    rows, size = gate_TI.shape
    out_TI = gate_TI.new_empty(rows, size)
    block = min(1024, triton.next_power_of_2(size))
    grid = (rows, triton.cdiv(size, block))
    _gated[grid](
        gate_TI, up_TI, out_TI, size, gate_TI.stride(0), up_TI.stride(0), CURVE=curve, BLOCK=block, num_warps=4
    )
    return out_TI


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    gates, ups, out, size, gate_row, up_row, CURVE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gates + row * gate_row + column, mask=inside, other=0.0)
    up = tl.load(ups + row * up_row + column, mask=inside, other=0.0)
    bent = bend(gate, CURVE)
    tl.store(out + row * size + column, (bent.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def bend(gate, CURVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The curve of a gate, in its type."""
    wide = gate.to(tl.float32)
    if CURVE == "silu":
        bent = wide / (1.0 + tl.exp(-wide))
    elif CURVE == "gelu":
        bent = 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))
    else:
        # x * sigmoid(2 y) is x * (1 + tanh(y)) / 2.
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        bent = wide / (1.0 + tl.exp(-2.0 * inner))
    return bent.to(gate.dtype)


def rotate_(qkv_THD: Tensor, position_T: Tensor, rotation: Rotation, heads: int, kv_heads: int) -> None:
    """Turns the first ``heads + kv_heads`` heads in place, a program a token."""
    tokens, _, size = qkv_THD.shape
    cos_PR, sin_PR = rotation.cos_PR, rotation.sin_PR
    query_norm, key_norm = rotation.norms or (Norm(cos_PR), Norm(cos_PR))
    turned = cos_PR.shape[1]
    arguments: dict[str, Any] = {
        "HEADS": heads,
        "BOTH": heads + kv_heads,
        "PADDED": triton.next_power_of_2(heads + kv_heads),
        "SIZE": size,
        "HALF": turned // 2,
        "HALF_PADDED": triton.next_power_of_2(max(1, turned // 2)),
        "REST_PADDED": triton.next_power_of_2(max(1, size - turned)),
        "PAIRS": rotation.pairs,
        "NORM": rotation.norms is not None,
        "OFFSET": query_norm.offset,
        "WIDE": query_norm.wide,
    }
    _rotate[(tokens,)](
        qkv_THD, position_T, cos_PR, sin_PR, query_norm.weight, key_norm.weight, query_norm.eps, qkv_THD.stride(0),
        **arguments, num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    qkv, position, cos, sin, query_weight, key_weight, eps, stride,
    HEADS: tl.constexpr, BOTH: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED)[:, None]
    half = tl.arange(0, HALF_PADDED)[None, :]
    near = half < HALF
    inside = (head < BOTH) & near
    # The two dimensions that turn together, of which one program's thread has both.
    one_column = half
    two_column = half + HALF
    if PAIRS:
        one_column = 2 * half
        two_column = 2 * half + 1
    at = qkv + token * stride + head * SIZE
    first = tl.load(at + one_column, mask=inside, other=0.0)
    second = tl.load(at + two_column, mask=inside, other=0.0)
    dtype = first.dtype
    if NORM:
        one, two = first.to(tl.float32), second.to(tl.float32)
        square = tl.sum(one * one + two * two, axis=1)
        rest_column = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        is_rest = (head < BOTH) & (rest_column < SIZE)
        rest = tl.load(at + rest_column, mask=is_rest, other=0.0)
        square += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), axis=1)
        scale = (1.0 / tl.sqrt(square / SIZE + eps))[:, None]
        is_query = head < HEADS
        first = weighted(first, scale, _either(is_query, query_weight, key_weight, one_column, near), OFFSET, WIDE)
        second = weighted(second, scale, _either(is_query, query_weight, key_weight, two_column, near), OFFSET, WIDE)
        factor = _either(is_query, query_weight, key_weight, rest_column, rest_column < SIZE)
        tl.store(at + rest_column, weighted(rest, scale, factor, OFFSET, WIDE), mask=is_rest)
    if HALF > 0:
        row = tl.load(position + token) * (2 * HALF)
        rounded = cos.dtype.element_ty
        cos_1 = tl.load(cos + row + one_column, mask=near, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos + row + two_column, mask=near, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin + row + one_column, mask=near, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin + row + two_column, mask=near, other=0.0).to(tl.float32)
        one, two = first.to(tl.float32), second.to(tl.float32)
        turned_1 = (one * cos_1).to(rounded).to(tl.float32) - (two * sin_1).to(rounded).to(tl.float32)
        turned_2 = (two * cos_2).to(rounded).to(tl.float32) + (one * sin_2).to(rounded).to(tl.float32)
        tl.store(at + one_column, turned_1.to(dtype), mask=inside)
        tl.store(at + two_column, turned_2.to(dtype), mask=inside)


@triton.jit
def _either(is_query, query_weight, key_weight, column, inside):  # type: ignore[no-untyped-def]
    """A query norm's weights for queries, a key norm's for keys."""
    one = tl.load(query_weight + column, mask=inside, other=0.0)
    two = tl.load(key_weight + column, mask=inside, other=0.0)
    return tl.where(is_query, one, two)
