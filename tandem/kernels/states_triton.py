"""Triton kernels of ``states.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.states import LEAST_SQUARE

CHANNELS = 256
COLUMNS = 32
"""Columns or lines of a state that a program has, so that a state of 128 x 128 is in the registers of four."""


def convolve(x_BC: Tensor, past_BCK: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, silu: bool) -> Tensor:
    """A program for some channels of a row. Each thread has all inputs of its channels, which it moves."""
    rows, channels = x_BC.shape
    out_BC = torch.empty_like(x_BC, memory_format=torch.contiguous_format)
    _convolve[(rows, triton.cdiv(channels, CHANNELS))](
        x_BC, past_BCK, weight_CW, weight_CW if bias_C is None else bias_C, out_BC, channels, *x_BC.stride(),
        *past_BCK.stride()[:2], weight_CW.stride(0),
        KEPT=past_BCK.shape[2], WEIGHTS=weight_CW.shape[1], BIAS=bias_C is not None, SILU=silu, BLOCK=CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return out_BC


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    x, past, weight, bias, out, channels, x_row, x_channel, past_row, past_channel, weight_channel,
    KEPT: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    at = past + row * past_row + channel * past_channel
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for place in tl.static_range(KEPT):
        if place < KEPT - 1:
            value = tl.load(at + place + 1, mask=inside, other=0.0)
        else:
            value = tl.load(x + row * x_row + channel * x_channel, mask=inside, other=0.0)
        tl.store(at + place, value.to(past.dtype.element_ty), mask=inside)
        if place >= KEPT - WEIGHTS:
            factor = tl.load(weight + channel * weight_channel + place - (KEPT - WEIGHTS), mask=inside, other=0.0)
            total += value.to(tl.float32) * factor.to(tl.float32)
    total = total.to(weight.dtype.element_ty).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(out + row * channels + channel, total.to(out.dtype.element_ty), mask=inside)


def delta_step(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """A program for some columns of a head's state."""
    rows, heads, keys, values = state.shape
    out = query.new_empty(rows, heads, values)
    _delta_step[(rows, heads, triton.cdiv(values, COLUMNS))](
        query, key, value, decay, beta, state, out,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *decay.stride(), *beta.stride(), state.stride(0),
        keys**-0.5, LEAST_SQUARE,
        KEYS=keys, KEYS_PADDED=triton.next_power_of_2(keys), VALUES=values, BLOCK=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _delta_step(  # type: ignore[no-untyped-def]
    query, key, value, decay, beta, state, out,
    query_row, query_head, key_row, key_head, value_row, value_head, decay_row, decay_head, beta_row, beta_head,
    state_row, scale, least,
    KEYS: tl.constexpr, KEYS_PADDED: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.arange(0, KEYS_PADDED)
    is_key = part < KEYS
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_value = column < VALUES
    q = tl.load(query + row * query_row + head * query_head + part, mask=is_key, other=0.0).to(tl.float32)
    k = tl.load(key + row * key_row + head * key_head + part, mask=is_key, other=0.0).to(tl.float32)
    q = q * (scale / tl.sqrt(tl.sum(q * q, axis=0) + least))
    k = k / tl.sqrt(tl.sum(k * k, axis=0) + least)
    v = tl.load(value + row * value_row + head * value_head + column, mask=is_value, other=0.0).to(tl.float32)
    shrink = tl.exp(tl.load(decay + row * decay_row + head * decay_head).to(tl.float32))
    share = tl.load(beta + row * beta_row + head * beta_head).to(tl.float32)
    inside = is_key[:, None] & is_value[None, :]
    at = state + row * state_row + head * (KEYS * VALUES) + part[:, None] * VALUES + column[None, :]
    kept = tl.load(at, mask=inside, other=0.0) * shrink
    change = (v - tl.sum(kept * k[:, None], axis=0)) * share
    kept += k[:, None] * change[None, :]
    tl.store(at, kept, mask=inside)
    found = tl.sum(kept * q[:, None], axis=0)
    tl.store(out + (row * tl.num_programs(1) + head) * VALUES + column, found.to(out.dtype.element_ty), mask=is_value)


def select_step(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, skip: Tensor, state: Tensor
) -> Tensor:
    """A program for some lines of a head's state."""
    rows, heads, lines, size = state.shape
    out = x.new_empty(rows, heads, lines)
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
    tl.store(out + (row * tl.num_programs(1) + head) * LINES + line, found.to(out.dtype.element_ty), mask=is_line)
