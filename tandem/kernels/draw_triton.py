"""Triton kernels for one step's draws: a token and its log-prob from logits that are read once, and what follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.draw import block_size

TILE = 4096
"""Logits are read once in tiles of 4,096, which are several blocks, and again in the block that wins."""


def draw(
    logits_BV: Tensor,
    temperature_B: Tensor,
    greedy_B: Tensor,
    seed_B: Tensor,
    drawn_B: Tensor,
    *,
    any_greedy: bool = True,
) -> Tensor:
    """What the live engine's ``draw`` returns without truncation, [3, B] float64, for a row's own stream.

    ``temperature`` and ``greedy`` (0 or 1) are float64, ``seed`` and ``drawn`` int64, all [B]. The token wins the same
    race (``tandem.engines.live.draws.race``), up to the rounding of weights. Without ``any_greedy`` the largest logit
    is not looked for.
    """
    rows, vocabulary = logits_BV.shape
    size = block_size(vocabulary)
    blocks = triton.cdiv(vocabulary, size)
    device = logits_BV.device
    top, mass = torch.empty(2, rows, blocks, dtype=torch.float32, device=device)
    arg = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    out = torch.empty(3, rows, dtype=torch.float64, device=device)
    _blocks[(rows, triton.cdiv(vocabulary, TILE))](
        logits_BV, temperature_B, top, mass, arg, logits_BV.stride(0), vocabulary, blocks, GREEDY=any_greedy,
        TILE=TILE // size, BLOCK=size, num_warps=4,
    )  # fmt: skip
    _choose[(rows,)](
        logits_BV, temperature_B, greedy_B, seed_B, drawn_B, top, mass, arg, out, logits_BV.stride(0), vocabulary,
        blocks, rows, GREEDY=any_greedy, BLOCK=size, BLOCKS=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _blocks(  # type: ignore[no-untyped-def]
    logits, temperature, top, mass, arg, stride, vocabulary, blocks,
    GREEDY: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = number[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale = (1.0 / tl.load(temperature + row)).to(tl.float32)
    z = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * scale
    best = tl.max(z, axis=1)
    # A block may hold nothing but forbidden tokens (-inf).
    base = tl.where(best == float("-inf"), 0.0, best)
    there = number < blocks
    tl.store(top + row * blocks + number, best, mask=there)
    tl.store(mass + row * blocks + number, tl.sum(tl.exp(z - base[:, None]), axis=1), mask=there)
    if GREEDY:
        tl.store(arg + row * blocks + number, number * BLOCK + tl.argmax(z, axis=1), mask=there)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, temperature, greedy, seed, drawn, top, mass, arg, out, stride, vocabulary, blocks, rows,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stream = _stream(tl.load(seed + row), tl.load(drawn + row))
    number = tl.arange(0, BLOCKS)
    best_n = tl.load(top + row * blocks + number, mask=number < blocks, other=float("-inf"))
    best = tl.max(best_n, axis=0)
    sum_n = tl.load(mass + row * blocks + number, mask=number < blocks, other=0.0)
    # Of a block without tokens 0 times 0; where the largest of NaN and -inf is -inf, a product stays NaN.
    weight_n = sum_n.to(tl.float64) * tl.exp((best_n - best).to(tl.float64))
    total = tl.sum(weight_n, axis=0)
    # A row of NaN draws some token, and its log-prob says so.
    speed_n = tl.where(weight_n > 0, weight_n / _waiting(stream, number), 0.0)
    block = tl.minimum(tl.argmax(speed_n, axis=0), blocks - 1)
    base = tl.sum(tl.where(number == block, best_n, 0.0), axis=0)

    scale = (1.0 / tl.load(temperature + row)).to(tl.float32)
    inside = tl.arange(0, BLOCK)
    column = block * BLOCK + inside
    z = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * scale
    weight = tl.exp(z - base).to(tl.float64)
    speed = tl.where(weight > 0, weight / _waiting(stream, blocks + inside), 0.0)
    token = block * BLOCK + tl.argmax(speed, axis=0)

    certain = 1.0
    if GREEDY:
        is_greedy = tl.load(greedy + row) > 0
        winner = tl.min(tl.where(best_n == best, number, blocks - 1), axis=0)
        token = tl.where(is_greedy, tl.load(arg + row * blocks + winner), token)
        certain = tl.where(is_greedy, 0.0, 1.0)
    token = tl.minimum(token, vocabulary - 1)
    chosen = tl.load(logits + row * stride + token).to(tl.float32) * scale
    logp = (chosen - best).to(tl.float64) - tl.log(total)
    tl.store(out + row, token.to(tl.float64))
    # A product, so that NaN stays NaN.
    tl.store(out + rows + row, logp * certain)
    tl.store(out + 2 * rows + row, logp)


@triton.jit
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _stream(seed, counter):  # type: ignore[no-untyped-def]
    """``tandem.engines.live.draws.stream``."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, dtype=tl.uint64)
    start = _mix(seed.to(tl.uint64) + gamma)
    return _mix(start + gamma * (counter.to(tl.uint64) + 1))


@triton.jit
def _waiting(stream, number):  # type: ignore[no-untyped-def]
    """``tandem.engines.live.draws.waiting``."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, dtype=tl.uint64)
    bits = _mix(stream + gamma * (number + 1).to(tl.uint64)) >> 12
    return -tl.log((bits.to(tl.int64).to(tl.float64) + 0.5) * (1.0 / 4503599627370496.0))


def advance(state_FS: Tensor, drawn_3B: Tensor, stops_RV: Tensor, ring_K3S: Tensor, cursor: Tensor, rows: int) -> None:
    """Takes the draws of the first ``rows`` slots into their state (``tandem.kernels.draw.advance`` says how)."""
    block = 128
    _advance[(triton.cdiv(rows, block),)](
        state_FS, drawn_3B, stops_RV, ring_K3S, cursor, rows, state_FS.stride(0), ring_K3S.stride(0),
        ring_K3S.stride(1), stops_RV.stride(0), BLOCK=block, num_warps=4,
    )  # fmt: skip
    cursor += 1


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    state, drawn, stops, ring, cursor, rows, field, ring_step, ring_row, stops_row, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    at = state + row
    alive = tl.load(at + 5 * field, mask=inside, other=0)
    lives = alive > 0
    token = tl.load(drawn + row, mask=inside, other=0.0)
    result = ring + tl.load(cursor) * ring_step + row
    tl.store(result, tl.where(lives, token, -1.0), mask=inside)
    tl.store(result + ring_row, tl.load(drawn + rows + row, mask=inside, other=0.0), mask=inside)
    tl.store(result + 2 * ring_row, tl.load(drawn + 2 * rows + row, mask=inside, other=0.0), mask=inside)
    # A row of NaN draws nothing that could be looked up; the host ends the run when it reads the log-prob.
    whole = token.to(tl.int64)
    count = tl.load(at + 2 * field, mask=inside, other=0) + 1
    rule = tl.load(at + 4 * field, mask=inside, other=0)
    stopped = tl.load(stops + rule * stops_row + whole, mask=inside & lives, other=0) > 0
    stopped = stopped | (count >= tl.load(at + 3 * field, mask=inside, other=0))
    goes_on = lives & (stopped == 0)
    length = tl.load(at + field, mask=inside, other=0)
    tl.store(at, whole, mask=inside & lives)
    tl.store(at + field, tl.where(goes_on, length + 1, 0), mask=inside)
    tl.store(at + 2 * field, count, mask=inside & lives)
    tl.store(at + 5 * field, goes_on.to(tl.int64), mask=inside)
