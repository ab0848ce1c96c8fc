"""Triton kernels of ``layers.py``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.layers import Rotation


def rms_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x`` (plus ``residual``), and what was normed. [T, D], rows without gaps."""
    rows, size = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    total_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    block = triton.next_power_of_2(size)
    _rms_norm[(rows,)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        total_TD,
        eps,
        size,
        ADD=residual_TD is not None,
        BLOCK=block,
        num_warps=4 if block <= 4096 else 8,
    )
    return out_TD, total_TD


@triton.jit
def _rms_norm(x, residual, weight, out, total, eps, size, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + start + column, mask=inside, other=0.0)
    if ADD:
        more = tl.load(residual + start + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(total + start + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(value.dtype)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + start + column, (normed.to(tl.float32) * factor.to(tl.float32)).to(value.dtype), mask=inside)


def gated_silu(gate_up_TI: Tensor) -> Tensor:
    """``silu(gate) * up`` of [T, 2 I] → [T, I]."""
    rows, double = gate_up_TI.shape
    out_TI = gate_up_TI.new_empty(rows, double // 2)
    block = min(1024, triton.next_power_of_2(double // 2))
    _gated_silu[(rows, triton.cdiv(double // 2, block))](gate_up_TI, out_TI, double // 2, BLOCK=block, num_warps=4)
    return out_TI


@triton.jit
def _gated_silu(gate_up, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * size + column, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


def rotate_(qkv_THD: Tensor, position_T: Tensor, rotation: Rotation, heads: int, kv_heads: int) -> None:
    """Turns the first ``heads + kv_heads`` heads in place, a program a token."""
    tokens, _, size = qkv_THD.shape
    cos_PD, sin_PD = rotation.cos_PD, rotation.sin_PD
    query_D, key_D, eps = rotation.norms or (cos_PD, cos_PD, 0.0)
    arguments: dict[str, Any] = {
        "HEADS": heads,
        "BOTH": heads + kv_heads,
        "PADDED": triton.next_power_of_2(heads + kv_heads),
        "HALF": size // 2,
        "HALF_PADDED": triton.next_power_of_2(size // 2),
        "NORM": rotation.norms is not None,
    }
    _rotate[(tokens,)](
        qkv_THD, position_T, cos_PD, sin_PD, query_D, key_D, eps, qkv_THD.stride(0), **arguments, num_warps=4
    )


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    qkv, position, cos, sin, query_weight, key_weight, eps, stride,
    HEADS: tl.constexpr, BOTH: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED)[:, None]
    half = tl.arange(0, HALF_PADDED)[None, :]
    inside = (head < BOTH) & (half < HALF)
    at = qkv + token * stride + head * (2 * HALF) + half
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    dtype = first.dtype
    if NORM:
        one, two = first.to(tl.float32), second.to(tl.float32)
        square = tl.sum(one * one + two * two, axis=1) / (2 * HALF)
        scale = (1.0 / tl.sqrt(square + eps))[:, None]
        is_query = head < HEADS
        near = half < HALF
        weight_1 = tl.where(
            is_query,
            tl.load(query_weight + half, mask=near, other=0.0),
            tl.load(key_weight + half, mask=near, other=0.0),
        )
        weight_2 = tl.where(
            is_query,
            tl.load(query_weight + HALF + half, mask=near, other=0.0),
            tl.load(key_weight + HALF + half, mask=near, other=0.0),
        )
        first = ((one * scale).to(dtype).to(tl.float32) * weight_1.to(tl.float32)).to(dtype)
        second = ((two * scale).to(dtype).to(tl.float32) * weight_2.to(tl.float32)).to(dtype)
    row = tl.load(position + token) * (2 * HALF)
    cos_1 = tl.load(cos + row + half, mask=half < HALF, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + row + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + row + half, mask=half < HALF, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + row + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    one, two = first.to(tl.float32), second.to(tl.float32)
    turned_1 = (one * cos_1).to(dtype).to(tl.float32) - (two * sin_1).to(dtype).to(tl.float32)
    turned_2 = (two * cos_2).to(dtype).to(tl.float32) + (one * sin_2).to(dtype).to(tl.float32)
    tl.store(at, turned_1.to(dtype), mask=inside)
    tl.store(at + HALF, turned_2.to(dtype), mask=inside)
