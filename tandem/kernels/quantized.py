"""Weights in 4 or 8 bits, and their product with what goes through a layer: made whole for each product, never kept.

NF4 (arXiv:2305.14314, section 3): each block of 64 numbers, in the order in which they lie, is divided by its largest
magnitude, and each number becomes the nearest of 16 quantiles of a normal distribution. The magnitudes, less their
mean, are kept in 8 bits, with a magnitude of their own for each 256 of them: 4 + 8/64 + 32/(64·256) = 4.127 bits a
number. All that is computed by bitsandbytes, on a GPU and on a CPU. FP8: a row is divided by a power of two that
brings its largest magnitude to between 224 and 448, and each number becomes the nearest of e4m3's (arXiv:2209.05433,
table 1): 8 bits, and 32 a row. Such a number times a power of two is one of bfloat16's, too, so that whoever multiplies
by the dequantised weight multiplies by the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tandem.kernels import products
from tandem.kernels.available import on_triton
from tandem.lazy import extra

Kind = Literal["nf4", "fp4", "fp8"]
BLOCK = 64
NESTED = 256
"""Magnitudes of blocks that share a magnitude."""
LARGEST = 448.0
"""The largest number of e4m3."""


class Coded(NamedTuple):
    """A weight [O, I] in few bits."""

    codes: Tensor
    """uint8: two numbers a byte of 4 bits, one behind the other; of 8 bits [O, I]."""
    scales: Seq[Tensor]
    """Of FP8 that of each row, [O], float32, powers of two. Of 4 bits the blocks' magnitudes: in float32; or in 8 bits,
    with the magnitudes of these, the 256 numbers that they stand for, and their mean."""
    shape: tuple[int, int]
    kind: Kind
    block: int = BLOCK


def require_bitsandbytes() -> Any:
    """Raises UserError where it is not installed."""
    return extra("bitsandbytes", "lora.quantize: weights in 4 bits are those", "quant")


@torch.no_grad()
def quantize(weight_OI: Tensor, kind: Kind) -> Coded:
    """The weight in few bits, where it lies."""
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    if kind == "fp8":
        share_O = (weight_OI.float().abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        scale_O = share_O / share_O.frexp().mantissa
        codes = (weight_OI.float() / scale_O[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        return Coded(codes, [scale_O], shape, kind)
    library = require_bitsandbytes().functional
    codes, state = library.quantize_4bit(
        weight_OI.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=kind
    )
    return Coded(codes, scales_of(state), shape, kind)


def scales_of(state: Any) -> list[Tensor]:
    """The scales in bitsandbytes' ``QuantState``."""
    if state.state2 is None:
        return [state.absmax.float()]
    # The table is one for the whole process, and who parks a model on the CPU must not take it from others.
    return [state.absmax, state.state2.absmax, state.state2.code.clone(), state.offset]


@torch.no_grad()
def dequantize(coded: Coded, dtype: torch.dtype) -> Tensor:
    """[O, I], rounded to ``dtype``."""
    if coded.kind == "fp8":
        return _whole(coded.codes, coded.scales[0], dtype)
    # As one row: on a CPU blocks that go on in the next row are taken for others (bitsandbytes 0.50).
    flat = coded._replace(shape=(1, coded.shape[0] * coded.shape[1]))
    whole: Tensor = require_bitsandbytes().functional.dequantize_4bit(flat.codes, _state(flat, dtype))
    return whole.view(coded.shape)


def linear(x: Tensor, coded: Coded, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, [..., I] → [..., O], in the type of x, with the gradient of x alone.

    Raises RuntimeError where x has whole numbers: whoever takes its type from the weight finds that of codes.
    """
    if not x.is_floating_point():
        raise RuntimeError(f"a layer in few bits is given numbers of {x.dtype}")
    product: Tensor = _linear(x, coded.codes, list(coded.scales), *coded.shape, coded.kind, coded.block)
    return product if bias_O is None else product + bias_O


# Compiled layers must not look into it: they would keep whole weights from the forward for the backward.
@torch.library.custom_op("tandem::quantized_linear", mutates_args=())
def _linear(x: Tensor, codes: Tensor, scales: Seq[Tensor], rows: int, columns: int, kind: str, block: int) -> Tensor:
    coded = Coded(codes, scales, (rows, columns), kind, block)  # type: ignore[arg-type]
    if kind != "fp8" and x.is_cuda:
        # For few rows it multiplies by the codes themselves.
        found: Tensor = require_bitsandbytes().matmul_4bit(x, codes.t(), _state(coded, x.dtype))
        return found
    return products.linear(x, dequantize(coded, x.dtype))


@torch.library.custom_op("tandem::quantized_linear_backward", mutates_args=())
def _backward(up: Tensor, codes: Tensor, scales: Seq[Tensor], rows: int, columns: int, kind: str, block: int) -> Tensor:
    weight_OI = dequantize(Coded(codes, scales, (rows, columns), kind, block), up.dtype)  # type: ignore[arg-type]
    return products.product(up.reshape(-1, rows), weight_OI).view(*up.shape[:-1], columns)


@_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Seq[Tensor], rows: int, columns: int, kind: str, block: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@_backward.register_fake
def _(up: Tensor, codes: Tensor, scales: Seq[Tensor], rows: int, columns: int, kind: str, block: int) -> Tensor:
    return up.new_empty(*up.shape[:-1], columns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, *ctx.about = inputs
    ctx.save_for_backward(codes, *scales)


def _gradient(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
    codes, *scales = ctx.saved_tensors
    return _backward(up, codes, scales, *ctx.about), None, [None] * len(scales), None, None, None, None  # type: ignore[return-value]


_linear.register_autograd(_gradient, setup_context=_keep)


def _whole(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 as a weight, exactly: a number of 4 bits times a power of two."""
    if on_triton(codes_OI) and torch.cuda.get_device_capability(codes_OI.device) >= (8, 9):
        from tandem.kernels import quantized_triton

        return quantized_triton.whole(codes_OI, scale_O, dtype)
    return codes_OI.view(torch.float8_e4m3fn).to(dtype).mul_(scale_O.to(dtype)[:, None])


def _state(coded: Coded, dtype: torch.dtype) -> Any:
    """As bitsandbytes has it."""
    state = require_bitsandbytes().functional.QuantState
    absmax, *nested = coded.scales
    about: dict[str, Any] = {}
    if nested:
        about["state2"] = state(absmax=nested[0], code=nested[1], blocksize=NESTED, dtype=torch.float32)
        about["offset"] = nested[2]
    return state(absmax=absmax, shape=coded.shape, dtype=dtype, blocksize=coded.block, quant_type=coded.kind, **about)
