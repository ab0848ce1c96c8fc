"""The product of a frozen linear layer with its adapter: ``y = W x + s B A x + bias`` (arXiv:2106.09685, equation 3).

What goes through a layer is far more than its weight, and reading and writing it is what an adapter costs. ``s B A x``
is added in place to what comes out. Backward, the gradient of ``x`` is one product, with ``W + s B A``: of many rows
that sum is made anew for each product, rounded to the type of ``x`` and never kept. Saved are ``x`` and ``A x``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from tandem.kernels import products, quantized
from tandem.kernels.quantized import BLOCK, Coded

WHOLE = ""
"""The kind of a weight that is not in few bits."""


def linear(
    x: Tensor, weight: Tensor | Coded, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """``x @ (weight + scale b a).T + bias``, [..., I] → [..., O], with the gradients of x, A and B alone."""
    if isinstance(weight, Tensor):
        rows, columns = weight.shape
        codes, scales, kind, block = weight, [], WHOLE, BLOCK
    else:
        codes, scales, (rows, columns), kind, block = weight.codes, [*weight.scales], *weight[2:]
    out, _ = _linear(x, codes, scales, rows, columns, kind, block, bias_O, a_RI, b_OR, scale)
    return out


# Compiled layers must not look into it: they would keep the sums from the forward for the backward.
@torch.library.custom_op("tandem::adapted_linear", mutates_args=())
def _linear(
    x: Tensor, codes: Tensor, scales: Seq[Tensor], rows: int, columns: int, kind: str, block: int,
    bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_NI = x.reshape(-1, columns)
    inner_NR = products.linear(x_NI, a_RI)
    if kind == WHOLE:
        out_NO = products.linear(x_NI, codes, bias_O)
    else:
        coded = Coded(codes, scales, (rows, columns), kind, block)  # type: ignore[arg-type]
        out_NO = quantized.linear(x_NI, coded, bias_O)
    return out_NO.addmm_(inner_NR, b_OR.T, alpha=scale).view(*x.shape[:-1], rows), inner_NR


@torch.library.custom_op("tandem::adapted_linear_backward", mutates_args=())
def _backward(
    up: Tensor, x: Tensor, inner_NR: Tensor, codes: Tensor, scales: Seq[Tensor], rows: int, columns: int, kind: str,
    block: int, a_RI: Tensor, b_OR: Tensor, scale: float, for_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    up_NO, x_NI = up.reshape(-1, rows), x.reshape(-1, columns)
    up_NR = products.product(up_NO, b_OR)
    grad_a_RI = products.transposed_product(up_NR, x_NI).mul_(scale)
    grad_b_OR = products.transposed_product(up_NO, inner_NR).mul_(scale)
    if not for_x:
        return x.new_empty(0), grad_a_RI, grad_b_OR
    if kind == WHOLE:
        weight_OI = codes
    else:
        coded = Coded(codes, scales, (rows, columns), kind, block)  # type: ignore[arg-type]
        weight_OI = quantized.dequantize(coded, x.dtype)
    # Making the sum moves the weight twice, and adding to the gradient moves that twice.
    if len(x_NI) > rows:
        grad_x_NI = products.product(up_NO, torch.addmm(weight_OI, b_OR, a_RI, alpha=scale))
    else:
        grad_x_NI = products.product(up_NO, weight_OI).addmm_(up_NR, a_RI, alpha=scale)
    return grad_x_NI.view(x.shape), grad_a_RI, grad_b_OR


@_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Seq[Tensor], rows: int, columns: int, *about: Any) -> tuple[Tensor, Tensor]:
    *_, b_OR, _ = about
    return x.new_empty(*x.shape[:-1], rows), x.new_empty(x.numel() // columns, b_OR.shape[1])


@_backward.register_fake
def _(up: Tensor, x: Tensor, *about: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, a_RI, b_OR, _, for_x = about
    return x.new_empty(x.shape if for_x else 0), torch.empty_like(a_RI), torch.empty_like(b_OR)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, scales, *ctx.about, _, a_RI, b_OR, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], codes, a_RI, b_OR, *scales)


def _gradient(ctx: Any, up: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, inner_NR, codes, a_RI, b_OR, *scales = ctx.saved_tensors
    for_x = ctx.needs_input_grad[0]
    grad_x, grad_a_RI, grad_b_OR = _backward(up, x, inner_NR, codes, scales, *ctx.about, a_RI, b_OR, ctx.scale, for_x)
    return grad_x if for_x else None, None, [None] * len(scales), *[None] * 5, grad_a_RI, grad_b_OR, None


_linear.register_autograd(_gradient, setup_context=_keep)
