"""Triton kernels of ``states.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.states import LEAST_SQUARE, DeltaGates

CHANNELS = 256
NUMBERS = 2048
"""Of a state that a program of Mamba has: 16 registers a thread."""
COLUMNS = 32
"""Columns or lines of a state that a program has at a time: 128 x 32 numbers are 32 registers a thread."""


def convolve(
    x_BX: Tensor,
    past_BCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    silu: bool,
    column_C: Tensor | None = None,
) -> Tensor:
    """A program for some channels of a row. Each thread has all inputs of its channels, which it moves."""
    rows, (channels, kept) = len(x_BX), past_BCK.shape[1:]
    out_BC = x_BX.new_empty(rows, channels)
    _convolve[(rows, triton.cdiv(channels, CHANNELS))](
        x_BX, past_BCK, weight_CW, weight_CW if bias_C is None else bias_C, x_BX if column_C is None else column_C,
        out_BC, channels, *x_BX.stride(), past_BCK.stride(0),
        PAST_CHANNEL=past_BCK.stride(1), WEIGHT_CHANNEL=weight_CW.stride(0), KEPT=kept,
        KEPT_PADDED=triton.next_power_of_2(kept), WEIGHTS=weight_CW.shape[1], BIAS=bias_C is not None,
        COLUMNS=column_C is not None, SILU=silu, BLOCK=CHANNELS, num_warps=4,
    )  # fmt: skip
    return out_BC


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    x, past, weight, bias, column, out, channels, x_row, x_column, past_row,
    PAST_CHANNEL: tl.constexpr, WEIGHT_CHANNEL: tl.constexpr, KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr,
    WEIGHTS: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    at = channel
    if COLUMNS:
        at = tl.load(column + channel, mask=inside, other=0)
    new = tl.load(x + row * x_row + at * x_column, mask=inside, other=0.0)
    # All that a channel keeps lies together, and is written at once.
    place = tl.arange(0, KEPT_PADDED)[None, :]
    kept = past + row * past_row + channel[:, None] * PAST_CHANNEL + place
    value = tl.load(kept + 1, mask=inside[:, None] & (place < KEPT - 1), other=0.0)
    value = tl.where(place == KEPT - 1, new[:, None].to(value.dtype), value)
    # Before they are overwritten all have been read.
    tl.debug_barrier()
    is_kept = inside[:, None] if KEPT == KEPT_PADDED else inside[:, None] & (place < KEPT)
    tl.store(kept, value, mask=is_kept)
    if WEIGHTS < KEPT:
        is_kept = is_kept & (place >= KEPT - WEIGHTS)
    at = weight + channel[:, None] * WEIGHT_CHANNEL + place - (KEPT - WEIGHTS)
    factor = tl.load(at, mask=is_kept, other=0.0)
    # What is new as it came, where what is kept is of fewer bits.
    value = tl.where(place == KEPT - 1, new[:, None].to(tl.float32), value.to(tl.float32))
    total = tl.sum(value * factor.to(tl.float32), axis=1)
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    total = total.to(weight.dtype.element_ty).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(out + row * channels + channel, total.to(out.dtype.element_ty), mask=inside)


def delta_step(
    query_BGK: Tensor,
    key_BGK: Tensor,
    value_BHV: Tensor,
    step_BGR: Tensor,
    share_BGR: Tensor,
    gate_BGRV: Tensor,
    by: DeltaGates,
    state_BHKV: Tensor,
) -> Tensor:
    """A program for a head of a row, which has some columns of its state at a time, and the next ones under way."""
    rows, heads, keys, values = state_BHKV.shape
    out_BHV = value_BHV.new_empty(rows, heads, values)
    sides = triton.next_power_of_2(keys), triton.next_power_of_2(values)
    _delta_step[(rows, heads)](
        query_BGK, key_BGK, value_BHV, step_BGR, share_BGR, gate_BGRV, by.log_rate_H, by.step_bias_H, by.norm.weight,
        state_BHKV, out_BHV, *query_BGK.stride()[:2], *key_BGK.stride()[:2], *value_BHV.stride()[:2],
        *step_BGR.stride()[:2], *share_BGR.stride()[:2], *gate_BGRV.stride()[:3], state_BHKV.stride(0),
        keys**-0.5, by.most, by.norm.eps, LEAST_SQUARE,
        SHARED=step_BGR.shape[2], KEYS=keys, KEYS_PADDED=sides[0], VALUES=values, VALUES_PADDED=sides[1],
        BLOCK=min(COLUMNS, sides[1]), num_warps=4,
    )  # fmt: skip
    return out_BHV


@triton.jit
def _delta_step(  # type: ignore[no-untyped-def]
    query, key, value, step, share, gate, log_rate, step_bias, weight, state, out,
    query_row, query_group, key_row, key_group, value_row, value_head, step_row, step_group, share_row, share_group,
    gate_row, gate_group, gate_head, state_row, scale, most, eps, least,
    SHARED: tl.constexpr, KEYS: tl.constexpr, KEYS_PADDED: tl.constexpr, VALUES: tl.constexpr,
    VALUES_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    group = head // SHARED
    part = tl.arange(0, KEYS_PADDED)
    is_key = part < KEYS
    column = tl.arange(0, BLOCK)
    # First of all, since it takes longest: all else is read and computed meanwhile.
    state += row * state_row + head * (KEYS * VALUES)
    at = part[:, None] * VALUES + column[None, :]
    inside = is_key[:, None] & (column < VALUES)[None, :]
    coming = tl.load(state + at, mask=inside, other=0.0)
    value += row * value_row + head * value_head
    coming_v = tl.load(value + column, mask=column < VALUES, other=0.0)
    q = tl.load(query + row * query_row + group * query_group + part, mask=is_key, other=0.0).to(tl.float32)
    k = tl.load(key + row * key_row + group * key_group + part, mask=is_key, other=0.0).to(tl.float32)
    every = tl.arange(0, VALUES_PADDED)
    is_value = every < VALUES
    z = tl.load(
        gate + row * gate_row + group * gate_group + (head % SHARED) * gate_head + every, mask=is_value, other=0.0
    ).to(tl.float32)
    factor = tl.load(weight + every, mask=is_value, other=0.0).to(tl.float32)
    long = tl.load(step + row * step_row + group * step_group + head % SHARED).to(tl.float32)
    part_of = tl.load(share + row * share_row + group * share_group + head % SHARED)
    long += tl.load(step_bias + head).to(tl.float32)
    rate = tl.exp(tl.load(log_rate + head).to(tl.float32))
    shrink = tl.exp(-rate * _softplus(long))
    beta = (1.0 / (1.0 + tl.exp(-part_of.to(tl.float32)))).to(part_of.dtype).to(tl.float32) * most
    q = q * (scale / tl.sqrt(tl.sum(q * q, axis=0) + least))
    k = k / tl.sqrt(tl.sum(k * k, axis=0) + least)
    alike = tl.sum(q * k, axis=0)
    out += (row * tl.num_programs(1) + head) * VALUES
    for number in tl.static_range(VALUES_PADDED // BLOCK):
        first = number * BLOCK
        kept = coming
        v = coming_v
        is_here = first + column < VALUES
        inside = is_key[:, None] & is_here[None, :]
        if (number + 1) * BLOCK < VALUES_PADDED:
            is_next = first + BLOCK + column < VALUES
            coming = tl.load(state + first + BLOCK + at, mask=is_key[:, None] & is_next[None, :], other=0.0)
            coming_v = tl.load(value + first + BLOCK + column, mask=is_next, other=0.0)
        # Both of the state before: q^T S is q^T shrink S + (q k) (beta (v - k^T shrink S)).
        kept = kept * shrink
        change = (v.to(tl.float32) - tl.sum(kept * k[:, None], axis=0)) * beta
        found = tl.sum(kept * q[:, None], axis=0) + alike * change
        tl.store(state + first + at, kept + k[:, None] * change[None, :], mask=inside)
        tl.store(out + first + column, found.to(out.dtype.element_ty), mask=is_here)
    # Each thread reads what others have written.
    tl.debug_barrier()
    found = tl.load(out + every, mask=is_value, other=0.0).to(tl.float32)
    normed = found / tl.sqrt(tl.sum(found * found, axis=0) / VALUES + eps)
    rounded = out.dtype.element_ty
    normed = (normed.to(rounded).to(tl.float32) * factor).to(rounded).to(tl.float32)
    tl.store(out + every, (normed * (z / (1.0 + tl.exp(-z)))).to(rounded), mask=is_value)


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    # Where the exponential is small the logarithm would lose its digits.
    power = tl.exp(-tl.abs(x))
    bent = tl.where(power < 0.01, power * (1.0 - power * (0.5 - power / 3.0)), tl.log(1.0 + power))
    return tl.maximum(x, 0.0) + bent


def select_step(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, skip: Tensor, state: Tensor
) -> Tensor:
    """A program for some lines of a head's state."""
    rows, heads, lines, size = state.shape
    out = x.new_empty(rows, heads, lines, dtype=torch.float32)
    _select_step[(rows, heads, triton.cdiv(lines, COLUMNS))](
        x, step, rate, into, out_of, skip, state, out,
        *x.stride()[:2], *step.stride(), *into.stride()[:2], *out_of.stride()[:2], state.stride(0),
        SHARED=heads // into.shape[1], LINES=lines, SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
        BLOCK=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _select_step(  # type: ignore[no-untyped-def]
    x, step, rate, into, out_of, skip, state, out,
    x_row, x_head, step_row, step_head, into_row, into_group, out_of_row, out_of_group, state_row,
    SHARED: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    line = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_line = line < LINES
    part = tl.arange(0, SIZE_PADDED)
    is_part = part < SIZE
    long = tl.load(step + row * step_row + head * step_head).to(tl.float32)
    shrink = tl.exp(long * tl.load(rate + head).to(tl.float32))
    value = tl.load(x + row * x_row + head * x_head + line, mask=is_line, other=0.0).to(tl.float32)
    group = head // SHARED
    more = tl.load(into + row * into_row + group * into_group + part, mask=is_part, other=0.0).to(tl.float32)
    read = tl.load(out_of + row * out_of_row + group * out_of_group + part, mask=is_part, other=0.0).to(tl.float32)
    inside = is_line[:, None] & is_part[None, :]
    at = state + row * state_row + head * (LINES * SIZE) + line[:, None] * SIZE + part[None, :]
    kept = tl.load(at, mask=inside, other=0.0).to(tl.float32) * shrink + (long * value)[:, None] * more[None, :]
    tl.store(at, kept.to(state.dtype.element_ty), mask=inside)
    found = tl.sum(kept * read[None, :], axis=1) + value * tl.load(skip + head).to(tl.float32)
    tl.store(out + (row * tl.num_programs(1) + head) * LINES + line, found, mask=is_line)


def select_channels(
    x_BD: Tensor, step_BD: Tensor, step_bias_D: Tensor, rate_DN: Tensor, into_BN: Tensor, out_of_BN: Tensor,
    skip_D: Tensor, gate_BD: Tensor, state_BDN: Tensor,
) -> Tensor:  # fmt: skip
    """A program for some channels of a row."""
    rows, channels, size = state_BDN.shape
    out_BD = x_BD.new_empty(rows, channels)
    padded = triton.next_power_of_2(size)
    block = max(1, NUMBERS // padded)
    _select_channels[(rows, triton.cdiv(channels, block))](
        x_BD, step_BD, step_bias_D, rate_DN, into_BN, out_of_BN, skip_D, gate_BD, state_BDN, out_BD, channels,
        *(y.stride(0) for y in (x_BD, step_BD, into_BN, out_of_BN, gate_BD, state_BDN)),
        SIZE=size, SIZE_PADDED=padded, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out_BD


@triton.jit
def _select_channels(  # type: ignore[no-untyped-def]
    x, step, step_bias, rate, into, out_of, skip, gate, state, out, channels,
    x_row, step_row, into_row, out_of_row, gate_row, state_row,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    part = tl.arange(0, SIZE_PADDED)
    is_part = part < SIZE
    is_kept = inside[:, None] & is_part[None, :]
    place = channel[:, None] * SIZE + part[None, :]
    at = state + row * state_row + place
    kept = tl.load(at, mask=is_kept, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + row * gate_row + channel, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(step + row * step_row + channel, mask=inside, other=0.0)
    bias = tl.load(step_bias + channel, mask=inside, other=0.0).to(own.dtype)
    long = _softplus((own.to(tl.float32) + bias.to(tl.float32)).to(own.dtype).to(tl.float32))
    long = long.to(own.dtype).to(tl.float32)
    more = tl.load(into + row * into_row + part, mask=is_part, other=0.0).to(tl.float32)
    read = tl.load(out_of + row * out_of_row + part, mask=is_part, other=0.0).to(tl.float32)
    shrink = tl.exp(long[:, None] * tl.load(rate + place, mask=is_kept, other=0.0).to(tl.float32))
    kept = kept * shrink + (long * value)[:, None] * more[None, :]
    tl.store(at, kept.to(state.dtype.element_ty), mask=is_kept)
    found = tl.sum(kept * read[None, :], axis=1)
    found += value * tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    bent = (z / (1.0 + tl.exp(-z))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + row * channels + channel, (found * bent).to(out.dtype.element_ty), mask=inside)
