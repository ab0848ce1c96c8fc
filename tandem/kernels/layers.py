"""The small operations between a decoder's matrix products: one kernel each on a GPU, plain torch elsewhere.

All round where transformers' own modules round, so that sampler and trainer differ by no more than they must.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.available import on_triton

Curve = Literal["silu", "gelu", "gelu_tanh"]
"""What bends a gate: SiLU, GELU (arXiv:1606.08415) or its approximation by tanh."""
CURVES: dict[Curve, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
}  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / rms(x - mean) * (weight + offset) + bias`` over the last dimension.

    Without a mean it is RMSNorm (arXiv:1910.07467, eq. 4), with one LayerNorm (arXiv:1607.06450, eq. 3).
    """

    weight: Tensor | None
    """[D]"""
    bias: Tensor | None = None
    eps: float = 1e-6
    offset: bool = False
    """Whether 1 is added to the weight (Gemma)."""
    centered: bool = False
    """Whether the mean is taken off."""
    wide: bool = False
    """Whether the weight is multiplied in float32; else what is normed is rounded first, as Llama does."""
    rounds: bool = False
    """Whether a residual of more bits is rounded first, to the type of what is added to it (Mamba)."""


def norm(x_TD: Tensor, by: Norm) -> Tensor:
    """The norm of rows [T, D]."""
    if on_triton(x_TD):
        from tandem.kernels import layers_triton

        return layers_triton.add_norm(x_TD, None, by)[0]
    return plain_norm(x_TD, by)


def norm_(x_TD: Tensor, by: Norm) -> None:
    """The norm of rows [T, D], which may lie apart, in place."""
    if on_triton(x_TD):
        from tandem.kernels import layers_triton

        layers_triton.add_norm(x_TD, None, by, out_TD=x_TD)
    else:
        x_TD.copy_(plain_norm(x_TD, by))


def add_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    by: Norm | None,
    *,
    first: Norm | None = None,
    scale: float = 1.0,
    factor_1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of ``(residual + scale * first(x)) * factor``, and that product, which is the next residual. All [T, D].

    The norm is of the type of ``x``, the product of the residual's. Without ``by`` both are the product.
    """
    if on_triton(x_TD):
        from tandem.kernels import layers_triton

        return layers_triton.add_norm(x_TD, residual_TD, by, first=first, scale=scale, factor_1=factor_1)
    x_TD = x_TD if first is None else plain_norm(x_TD, first)
    total_TD = residual_TD + (x_TD if scale == 1.0 else x_TD * scale)
    if factor_1 is not None:
        total_TD = (total_TD * factor_1).to(total_TD.dtype)
    if by is None:
        return total_TD, total_TD
    return plain_norm(total_TD.to(x_TD.dtype) if by.rounds else total_TD, by).to(x_TD.dtype), total_TD


def plain_norm(x_TD: Tensor, by: Norm) -> Tensor:
    """The norm over the last dimension, in plain torch."""
    wide_TD = x_TD.float()
    if by.centered:
        wide_TD = wide_TD - wide_TD.mean(-1, keepdim=True)
    wide_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + by.eps)
    if not by.wide:
        wide_TD = wide_TD.to(x_TD.dtype)
    if by.weight is not None:
        weight_D = by.weight.to(wide_TD.dtype)
        wide_TD = wide_TD * (weight_D + 1.0 if by.offset else weight_D)
    if by.bias is not None:
        wide_TD = wide_TD + by.bias
    return wide_TD.to(x_TD.dtype)


def gated(gate_TI: Tensor, up_TI: Tensor, curve: Curve) -> Tensor:
    """``curve(gate) * up`` (arXiv:2002.05202) of rows [T, I], which may lie apart."""
    if on_triton(gate_TI):
        from tandem.kernels import layers_triton

        return layers_triton.gated(gate_TI, up_TI, curve)
    return CURVES[curve](gate_TI) * up_TI


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are turned by their positions (RoPE, arXiv:2104.09864).

    ``cos`` and ``sin`` have a row a position, and a column for each of the first R dimensions of a head: the others
    stay as they are (all, where R is 0). Products with them are rounded to their type. ``norms``, for queries and for
    keys, of one kind and without a bias, norm each head first (Qwen3).
    """

    cos_PR: Tensor
    sin_PR: Tensor
    norms: tuple[Norm, Norm] | None = None
    pairs: bool = False
    """Whether neighbours turn together (Cohere, GLM); else a dimension turns with the one R / 2 after it."""


def rotate_(qkv_THD: Tensor, position_T: Tensor, rotation: Rotation, heads: int, kv_heads: int) -> None:
    """Turns queries and keys, in place. ``qkv_THD`` [T, heads + 2 kv_heads, D] holds queries, keys and values."""
    if on_triton(qkv_THD):
        from tandem.kernels import layers_triton

        layers_triton.rotate_(qkv_THD, position_T, rotation, heads, kv_heads)
        return
    turned = qkv_THD[:, : heads + kv_heads]
    if rotation.norms is not None:
        for part, by in zip(turned.split([heads, kv_heads], dim=1), rotation.norms, strict=True):
            part.copy_(plain_norm(part, by))
    size = rotation.cos_PR.shape[-1]
    if size:
        x = turned[..., :size].clone()
        if rotation.pairs:
            other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            other = torch.cat((-second, first), dim=-1)
        cos, sin = rotation.cos_PR[position_T][:, None], rotation.sin_PR[position_T][:, None]
        turned[..., :size] = (x * cos + other * sin).to(x.dtype)
