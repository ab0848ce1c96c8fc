"""One more token for parts that carry a state: short convolutions, the gated delta rule, Mamba 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.available import on_triton


def convolve(x_BC: Tensor, past_BCK: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, silu: bool) -> Tensor:
    """Causal convolution of each channel with its own W weights, of the last W - 1 inputs and ``x`` → [B, C].

    ``past_BCK`` (K >= W), the last K inputs, takes ``x`` in and is changed in place. ``silu``: bends what comes out.
    """
    if on_triton(x_BC):
        from tandem.kernels import states_triton

        return states_triton.convolve(x_BC, past_BCK, weight_CW, bias_C, silu=silu)
    past_BCK.copy_(torch.cat((past_BCK[..., 1:], x_BC[..., None]), dim=-1))
    out_BC = (past_BCK[..., -weight_CW.shape[1] :].float() * weight_CW).sum(-1)
    if bias_C is not None:
        out_BC = out_BC + bias_C
    out_BC = out_BC.to(weight_CW.dtype)
    return (F.silu(out_BC) if silu else out_BC).to(x_BC.dtype)


def delta_step(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """A step of the gated delta rule (arXiv:2412.06464, eq. 10), for states S [B, H, K, V], float32, changed in place:

    ``S = exp(decay) S + k (beta (v - k^T exp(decay) S))``, of which ``q^T S / sqrt(K)`` is given, [B, H, V]. Queries
    and keys [B, H, K], which are brought to length 1, values [B, H, V], decay and beta [B, H].
    """
    if on_triton(state):
        from tandem.kernels import states_triton

        return states_triton.delta_step(query, key, value, decay, beta, state)
    # One product with both, of the state before: q^T S is q^T exp(decay) S + (q k) (beta (v - k^T exp(decay) S)).
    both = torch.stack((query, key), dim=2).float()
    both = both * torch.rsqrt(both.square().sum(-1, keepdim=True) + LEAST_SQUARE)
    state.mul_(decay.exp()[..., None, None])
    found_BH2V = both @ state
    change = (value - found_BH2V[:, :, 1]) * beta[..., None]
    state.addcmul_(both[:, :, 1, :, None], change[:, :, None])
    out = found_BH2V[:, :, 0] + (both[:, :, 0] * both[:, :, 1]).sum(-1, keepdim=True) * change
    return (out * query.shape[-1] ** -0.5).to(query.dtype)


def select_step(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, skip: Tensor, state: Tensor
) -> Tensor:
    """A step of Mamba 2 (arXiv:2405.21060, eq. 2), for states S [B, H, P, N], changed in place:

    ``S = exp(step * rate) S + step * x into^T``, of which ``S out_of + skip * x`` is given, [B, H, P], in the type of
    ``x`` [B, H, P]. Steps [B, H], rates and skips [H]; ``into`` and ``out_of`` [B, G, N], for H / G heads each.
    """
    if on_triton(state):
        from tandem.kernels import states_triton

        return states_triton.select_step(x, step, rate, into, out_of, skip, state)
    heads = state.shape[1] // into.shape[1]
    into, out_of = (y.float().repeat_interleave(heads, dim=1) for y in (into, out_of))
    kept = state.float() * (step * rate).exp()[..., None, None]
    kept.addcmul_((step[..., None] * x)[..., None], into[:, :, None])
    state.copy_(kept)
    return ((kept @ out_of[..., None])[..., 0] + x * skip[:, None]).to(x.dtype)


LEAST_SQUARE = 1e-6
"""Added to the square of a query's or key's length, as in transformers and flash-linear-attention."""
