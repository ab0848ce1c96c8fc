"""Parts that carry a state: short convolutions, the gated delta rule, both Mambas. Of one more token, or of many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.available import on_triton
from tandem.kernels.chunks import Chunks
from tandem.kernels.layers import Norm, plain_norm


def convolve(
    x_BX: Tensor,
    past_BCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    silu: bool,
    column_C: Tensor | None = None,
) -> Tensor:
    """Causal convolution of each channel with its own W weights, of the last W - 1 inputs and ``x`` → [B, C].

    ``past_BCK`` (K >= W), the last K inputs, takes ``x`` in and is changed in place. ``silu``: bends what comes out.
    ``column_C``, int32: where in ``x`` a channel is; None: they are the columns of ``x``.
    """
    if on_triton(x_BX):
        from tandem.kernels import states_triton

        return states_triton.convolve(x_BX, past_BCK, weight_CW, bias_C, silu=silu, column_C=column_C)
    x_BC = x_BX if column_C is None else x_BX.index_select(1, column_C)
    past_BCK.copy_(torch.cat((past_BCK[..., 1:], x_BC[..., None]), dim=-1))
    out_BC = (past_BCK[..., -weight_CW.shape[1] :].float() * weight_CW).sum(-1)
    if bias_C is not None:
        out_BC = out_BC + bias_C
    out_BC = out_BC.to(weight_CW.dtype)
    return (F.silu(out_BC) if silu else out_BC).to(x_BC.dtype)


@dataclass(frozen=True, kw_only=True)
class DeltaGates:
    """What a layer's gated delta rule has of its own. H heads, V values each."""

    log_rate_H: Tensor
    step_bias_H: Tensor
    most: float
    """Of a change: its share is ``most`` times a sigmoid."""
    norm: Norm
    """Of what each head gives: RMSNorm, its weight [V] multiplied in the type of what goes in."""


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
    """A step of the gated delta rule (arXiv:2412.06464, eq. 10), for states S, in float32 at least, changed in place:

    ``S = exp(decay) S + k (beta (v - k^T exp(decay) S))``, of which ``norm(q^T S / sqrt(K)) * silu(gate)`` is given,
    [B, H, V]. Queries and keys are brought to length 1; each of the G is for R = H / G heads. ``decay = -exp(log_rate)
    softplus(step + step_bias)``, and ``beta = most * sigmoid(share)``, the sigmoid rounded to the share's type.
    """
    if on_triton(state_BHKV):
        from tandem.kernels import states_triton

        return states_triton.delta_step(query_BGK, key_BGK, value_BHV, step_BGR, share_BGR, gate_BGRV, by, state_BHKV)
    shared, wide = step_BGR.shape[2], state_BHKV.dtype
    decay_BH = -by.log_rate_H.to(wide).exp() * F.softplus(step_BGR.flatten(1).to(wide) + by.step_bias_H)
    beta_BH = share_BGR.flatten(1).sigmoid() * by.most
    # One product with both, of the state before: q^T S is q^T exp(decay) S + (q k) (beta (v - k^T exp(decay) S)).
    both = torch.stack((query_BGK, key_BGK), dim=2).to(wide)
    both = both * torch.rsqrt(both.square().sum(-1, keepdim=True) + LEAST_SQUARE)
    both = both if shared == 1 else both.repeat_interleave(shared, dim=1)
    state_BHKV.mul_(decay_BH.exp()[..., None, None])
    found_BH2V = both @ state_BHKV
    change_BHV = (value_BHV - found_BH2V[:, :, 1]) * beta_BH[..., None]
    state_BHKV.addcmul_(both[:, :, 1, :, None], change_BHV[:, :, None])
    out_BHV = found_BH2V[:, :, 0] + (both[:, :, 0] * both[:, :, 1]).sum(-1, keepdim=True) * change_BHV
    normed_BHV = plain_norm((out_BHV * query_BGK.shape[-1] ** -0.5).to(value_BHV.dtype), by.norm)
    return (normed_BHV * F.silu(gate_BGRV.flatten(1, 2).to(wide))).to(value_BHV.dtype)


def select_step(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, skip: Tensor, state: Tensor
) -> Tensor:
    """A step of Mamba 2 (arXiv:2405.21060, eq. 2), for states S [B, H, P, N], changed in place:

    ``S = exp(step * rate) S + step * x into^T``, of which ``S out_of + skip * x`` is given, [B, H, P], in float32 at
    least, as by ``scan``. ``x`` [B, H, P], steps [B, H], rates and skips [H]; ``into`` and ``out_of`` [B, G, N], for
    H / G heads each.
    """
    if on_triton(state):
        from tandem.kernels import states_triton

        return states_triton.select_step(x, step, rate, into, out_of, skip, state)
    heads = state.shape[1] // into.shape[1]
    wide = torch.promote_types(state.dtype, torch.float32)
    into, out_of = (y.to(wide).repeat_interleave(heads, dim=1) for y in (into, out_of))
    kept = state.to(wide) * (step * rate).exp().to(wide)[..., None, None]
    kept.addcmul_((step[..., None] * x).to(wide)[..., None], into[:, :, None])
    state.copy_(kept)
    return (kept @ out_of[..., None])[..., 0] + x.to(wide) * skip[:, None].to(wide)


def select_channels(
    x_BD: Tensor, step_BD: Tensor, step_bias_D: Tensor, rate_DN: Tensor, into_BN: Tensor, out_of_BN: Tensor,
    skip_D: Tensor, gate_BD: Tensor, state_BDN: Tensor,
) -> Tensor:  # fmt: skip
    """A step of Mamba (arXiv:2312.00752, eq. 2), for states S, changed in place:

    ``S = exp(step * rate) S + step * x into^T``, of which ``(S out_of + skip * x) * silu(gate)`` is given, [B, D], in
    the type of ``x``. ``step = softplus(step + step_bias)``, rounded to its own type, as the SiLU is to the gate's.
    """
    if on_triton(state_BDN):
        from tandem.kernels import states_triton

        return states_triton.select_channels(
            x_BD, step_BD, step_bias_D, rate_DN, into_BN, out_of_BN, skip_D, gate_BD, state_BDN
        )
    wide = torch.promote_types(state_BDN.dtype, torch.float32)
    long_BD = F.softplus(step_BD + step_bias_D.to(step_BD.dtype)).to(wide)
    kept_BDN = state_BDN.to(wide) * (long_BD[..., None] * rate_DN).exp()
    kept_BDN.addcmul_((long_BD * x_BD)[..., None], into_BN.to(wide)[:, None])
    state_BDN.copy_(kept_BDN)
    out_BD = (kept_BDN @ out_of_BN.to(wide)[..., None])[..., 0] + skip_D * x_BD.to(wide)
    return (out_BD * F.silu(gate_BD)).to(x_BD.dtype)


def scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    *,
    chunks: Chunks,
) -> tuple[Tensor, Tensor]:
    """``select_step`` of T tokens, one after the other: what is given of each [B, T, H, P], and the last states.

    By chunks (arXiv:2405.21060, section 6): of a chunk's own tokens as attention without a softmax, of those before it
    by the state that they leave. All of it is matrix products in float32 at least, and what is given is as wide. ``x``
    [B, T, H, P]; steps [B, T, H]; ``into`` and ``out_of`` [B, T, G, N]; ``state`` [B, H, P, N] before the first token,
    zeros if it is None. The last states are those of the sequences with most chunks.
    """
    wide, groups = torch.promote_types(x.dtype, torch.float32), into.shape[2]
    into_MLGN, out_of_MLGN, step_MLH, x_MLHP = (chunks.cut(y).to(wide) for y in (into, out_of, step, x))
    log_MHL = (step_MLH * rate).transpose(1, 2)
    x_MLGRP = (x_MLHP * step_MLH[..., None]).unflatten(2, (groups, -1))
    kept_MHLL = _sums_between(log_MHL).exp_()
    weight_MGLL = torch.einsum("mlgn,msgn->mgls", out_of_MLGN, into_MLGN)
    weight_MGRLL = weight_MGLL[:, :, None] * kept_MHLL.unflatten(1, (groups, -1))
    own_MLGRP = torch.einsum("mgrls,msgrp->mlgrp", weight_MGRLL, x_MLGRP)
    left_MLGRP = x_MLGRP * kept_MHLL[..., -1, :].transpose(1, 2).unflatten(2, (groups, -1))[..., None]
    left_MHPN = torch.einsum("msgrp,msgn->mgrpn", left_MLGRP, into_MLGN).flatten(1, 2)
    kept_MH11 = log_MHL.sum(-1).exp()[..., None, None]
    if state is None:
        state = left_MHPN.new_zeros(chunks.counts[0], *left_MHPN.shape[1:])
    before = []
    for left_BHPN, kept_BH11 in zip(left_MHPN.split(chunks.counts), kept_MH11.split(chunks.counts), strict=True):
        before.append(_first_rows(state, len(left_BHPN)))
        state = torch.addcmul(left_BHPN, kept_BH11, before[-1])
    before_MGRPN = torch.cat(before).unflatten(1, (groups, -1))
    earlier_MLGRP = torch.einsum("mlgn,mgrpn->mlgrp", out_of_MLGN, before_MGRPN)
    faded_MLGR = log_MHL.cumsum(-1).exp_().transpose(1, 2).unflatten(2, (groups, -1))
    out_MLGRP = torch.addcmul(own_MLGRP, earlier_MLGRP, faded_MLGR[..., None])
    out_BTHP = chunks.join(out_MLGRP.flatten(2, 3), x.shape[1])
    out_BTHP = torch.addcmul(out_BTHP, x.to(wide), skip[:, None].to(wide))
    return out_BTHP.contiguous(), state


def scan_channels(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """T steps of Mamba (arXiv:2312.00752, eq. 2), for states S [B, D, N]: what is given of each token, [B, T, D].

    ``S = exp(step * rate) S + step * x into^T``, of which ``S out_of`` is given, and S after the last token, in float32
    at least. A state's rate is its own, so there is no product of tokens. One after the other are the sqrt(T) tokens of
    a chunk, for all chunks at once, and then the chunks. ``x`` and steps [B, T, D], rates [D, N], ``into`` and
    ``out_of`` [B, T, N].
    """
    tokens = x.shape[1]
    length = math.isqrt(tokens - 1) + 1
    chunks = -(-tokens // length)
    cut = partial(_cut, chunks=chunks, length=length, dtype=torch.promote_types(x.dtype, torch.float32))
    step_BCLD = cut(step)
    # Of all tokens at once: the gradient of what is taken out by its number would be as large as all of it.
    entering = (step_BCLD * cut(x)).unbind(2), cut(into).unbind(2)
    out_of_BCN1 = cut(out_of)[..., None].unbind(2)
    own_BCDN, given = torch.zeros_like(state)[:, None], []
    for step_BCD, x_BCD, into_BCN, read_BCN1 in zip(step_BCLD.unbind(2), *entering, out_of_BCN1, strict=True):
        kept_BCDN = (step_BCD[..., None] * rate).exp() * own_BCDN
        own_BCDN = torch.addcmul(kept_BCDN, x_BCD[..., None], into_BCN[:, :, None])
        given.append(own_BCDN @ read_BCN1)
    before = []
    kept_BCDN = (step_BCLD.sum(2)[..., None] * rate).exp()
    for kept_BDN, own_BDN in zip(kept_BCDN.unbind(1), own_BCDN.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(own_BDN, kept_BDN, state)
    before_BCDN = torch.stack(before, 1)
    for place, (passed_BCD, read_BCN1) in enumerate(zip(step_BCLD.cumsum(2).unbind(2), out_of_BCN1, strict=True)):
        faded_BCDN = (passed_BCD[..., None] * rate).exp() * before_BCDN
        given[place] = given[place] + faded_BCDN @ read_BCN1
    return torch.cat(given, 3).transpose(2, 3).flatten(1, 2)[:, :tokens], state


def _cut(y: Tensor, *, chunks: int, length: int, dtype: torch.dtype) -> Tensor:
    """[B, T, ...] → [B, C, L, ...]. The tokens that fill up the last chunk have steps of 0, and change nothing."""
    more = chunks * length - y.shape[1]
    return F.pad(y.to(dtype), (0, 0) * (y.ndim - 2) + (0, more)).unflatten(1, (chunks, length))


def scan_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    chunks: Chunks,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule of T tokens, one after the other: ``q^T S / sqrt(K)`` of each [B, T, H, V], and the last S.

    ``S = exp(decay) S + k (beta (v - k^T exp(decay) S))`` (arXiv:2412.06464, eq. 10), queries and keys [B, T, H, K]
    brought to length 1; values [B, T, H, V], decay and beta [B, T, H], ``state`` [B, H, K, V] before the first token,
    zeros if it is None. By chunks (section 3.3): what a chunk's tokens write if they find nothing, and what they read
    of the state before, are solved for all chunks at once, and from chunk to chunk goes the state alone. A product of
    the inverse's powers would lose its digits where keys are alike. The last states are those of the sequences with
    most chunks.
    """
    keys, heads = key.shape[3], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)

    def cut(y: Tensor) -> Tensor:
        """[B, T, H, ...] → [M, H, L, ...]. What fills up a chunk changes nothing: its beta is 0."""
        return chunks.cut(y).transpose(1, 2).to(wide, memory_format=torch.contiguous_format).contiguous()

    query_MHLK, key_MHLK = (
        y * (torch.rsqrt(y.square().sum(-1, keepdim=True) + LEAST_SQUARE) * scale)
        for y, scale in ((cut(query), keys**-0.5), (cut(key), 1.0))
    )
    log_MHL, beta_MHL1 = cut(decay), cut(beta)[..., None]
    kept_MHLL = _sums_between(log_MHL).exp_()
    faded_MHL1 = log_MHL.cumsum(-1).exp_()[..., None]
    back_MHKL = key_MHLK.transpose(2, 3)
    found_MHLX = torch.linalg.solve_triangular(
        (key_MHLK @ back_MHKL) * (kept_MHLL * beta_MHL1),
        torch.cat((cut(value) * beta_MHL1, key_MHLK * (faded_MHL1 * beta_MHL1)), dim=-1),
        upper=False,
        unitriangular=True,
    )
    if state is None:
        state = key.new_zeros(chunks.counts[0], heads, keys, value.shape[3])
    state_NKV, writes, states = state.to(wide).flatten(0, 1), [], []
    by_chunk = (
        *found_MHLX.split([value.shape[3], keys], dim=-1), back_MHKL * kept_MHLL[..., -1:, :],
        faded_MHL1[..., -1:, :],
    )  # fmt: skip
    sizes = [count * heads for count in chunks.counts]
    for write_NLV, read_NLK, back_NKL, faded_N11 in zip(*(y.flatten(0, 1).split(sizes) for y in by_chunk), strict=True):
        states.append(_first_rows(state_NKV, len(write_NLV)))
        writes.append(torch.baddbmm(write_NLV, read_NLK, states[-1], alpha=-1))
        state_NKV = torch.baddbmm(states[-1] * faded_N11, back_NKL, writes[-1])
    before_MHKV, write_MHLV = (torch.cat(y).unflatten(0, (-1, heads)) for y in (states, writes))
    out_MHLV = (query_MHLK * faded_MHL1) @ before_MHKV + ((query_MHLK @ back_MHKL) * kept_MHLL) @ write_MHLV
    out_BTHV = chunks.join(out_MHLV.transpose(1, 2), key.shape[1])
    return out_BTHV.to(query.dtype, memory_format=torch.contiguous_format), state_NKV.unflatten(0, (-1, heads))


def _first_rows(x: Tensor, rows: int) -> Tensor:
    """Itself where it has no others: the gradient of a slice is a copy."""
    return x if len(x) == rows else x[:rows]


def _sums_between(log: Tensor) -> Tensor:
    """[..., L] → [..., L, L]: at [i, j] the sum of those after j up to i, -inf where j is after i.

    They are added up one by one: a difference of two sums from the start would lose what is small beside those sums.
    """
    length = log.shape[-1]
    after = torch.ones(length, length, dtype=torch.bool, device=log.device).tril(-1)
    sums = log[..., None].expand(*log.shape, length).masked_fill(~after, 0).cumsum(-2)
    return sums.masked_fill_(after.T, -torch.inf)


LEAST_SQUARE = 1e-6
"""Added to the square of a query's or key's length, as in transformers and flash-linear-attention."""
