"""The small operations between a decoder's matrix products: one kernel each on a GPU, plain torch elsewhere.

All round where transformers' own modules round, so that sampler and trainer differ by no more than they must.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.available import on_triton


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension [T, D], as transformers computes it (arXiv:1910.07467, eq. 4)."""
    if on_triton(x_TD):
        from tandem.kernels import layers_triton

        return layers_triton.rms_norm(x_TD, None, weight_D, eps)[0]
    wide_TD = x_TD.float()
    wide_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * wide_TD.to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``rms_norm(x + residual)``, and the sum, which is the next residual. All [T, D]."""
    if on_triton(x_TD):
        from tandem.kernels import layers_triton

        return layers_triton.rms_norm(x_TD, residual_TD, weight_D, eps)
    total_TD = residual_TD + x_TD
    return rms_norm(total_TD, weight_D, eps), total_TD


def gated_silu(gate_up_TI: Tensor) -> Tensor:
    """``silu(gate) * up`` of [T, 2 I], gate first → [T, I] (SwiGLU, arXiv:2002.05202)."""
    if on_triton(gate_up_TI):
        from tandem.kernels import layers_triton

        return layers_triton.gated_silu(gate_up_TI)
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are turned by their positions (RoPE, arXiv:2104.09864, in halves as transformers does).

    ``cos`` and ``sin`` have a row a position. ``norms`` normalises each head first (Qwen3): weights [D] for queries and
    for keys, and an epsilon.
    """

    cos_PD: Tensor
    sin_PD: Tensor
    norms: tuple[Tensor, Tensor, float] | None = None


def rotate_(qkv_THD: Tensor, position_T: Tensor, rotation: Rotation, heads: int, kv_heads: int) -> None:
    """Turns queries and keys, in place. ``qkv_THD`` [T, heads + 2 kv_heads, D] holds queries, keys and values."""
    if on_triton(qkv_THD):
        from tandem.kernels import layers_triton

        layers_triton.rotate_(qkv_THD, position_T, rotation, heads, kv_heads)
        return
    turned = qkv_THD[:, : heads + kv_heads]
    x = turned.clone()
    if rotation.norms is not None:
        query_D, key_D, eps = rotation.norms
        x = torch.cat((rms_norm(x[:, :heads], query_D, eps), rms_norm(x[:, heads:], key_D, eps)), dim=1)
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation.cos_PD[position_T][:, None], rotation.sin_PD[position_T][:, None]
    turned.copy_(x * cos + torch.cat((-second, first), dim=-1) * sin)
