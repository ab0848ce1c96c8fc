"""Matrix products in float32 on CPUs where torch's own are slow: by oneDNN, which torch brings along for other types.

torch multiplies float32 by Intel's MKL, which uses AVX-512 on Intel's processors only. oneDNN uses it on AMD's too, at
twice the speed (EPYC, one thread: 200 GFLOP/s against 90). The results differ by rounding.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_WORK = 1 << 20
"""Multiplications below which calling oneDNN costs more than it saves."""
GRAIN = 16
FEW_ROWS = 1024
"""Up to 1,024 rows are filled up to a multiple of ``GRAIN``: oneDNN compiles (about 1 ms) for every new number."""


@cache
def mkl_is_held_back() -> bool:
    """Whether torch multiplies by MKL on a processor of AMD's with AVX-512."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # An operation of torch's own compiler, not of its public interface.
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``. A module becomes one by its class: parameters, names and hooks stay."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def speed_up_linears(module: nn.Module) -> None:
    """Makes ``Linear`` of every plain ``nn.Linear`` in the module that is on a CPU, where that is faster."""
    if mkl_is_held_back():
        for part in module.modules():
            if type(part) is nn.Linear and part.weight.device.type == "cpu":
                part.__class__ = Linear


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: [..., I] → [..., O]."""
    if not _pays(x, weight_OI, x.numel() * len(weight_OI)):
        return F.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_OI, bias_O)):
        product: Tensor = _Linear.apply(x, weight_OI, bias_O)
        return product
    return _onednn(x, weight_OI, bias_O)


def product(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """``left @ right``, into ``out`` if given."""
    if not _pays(left_MK, right_KN, left_MK.numel() * right_KN.shape[1]):
        return torch.mm(left_MK, right_KN, out=out_MN)
    found_MN = _onednn(left_MK, right_KN.T, None)
    return found_MN if out_MN is None else out_MN.copy_(found_MN)


def transposed_product(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """``left.T @ right``: a weight's gradient, [M, N]."""
    if not _pays(left_TM, right_TN, left_TM.numel() * right_TN.shape[1]):
        return left_TM.T @ right_TN
    if len(left_TM) <= FEW_ROWS and (spare := -len(left_TM) % GRAIN):
        left_TM, right_TN = (F.pad(x, (0, 0, 0, spare)) for x in (left_TM, right_TN))
    # The left factor is copied row by row: the narrower one goes there.
    if left_TM.shape[1] <= right_TN.shape[1]:
        return _onednn(left_TM.T, right_TN.T, None)
    return _onednn(right_TN.T, left_TM.T, None).T


def add_transposed_product_(sum_MN: Tensor, left_TM: Tensor, right_TN: Tensor) -> None:
    """``sum += left.T @ right``, multiplied in the factors' type and added up in the sum's."""
    if sum_MN.is_cuda and sum_MN.dtype != left_TM.dtype:
        torch.addmm(sum_MN, left_TM.T, right_TN, out_dtype=sum_MN.dtype, out=sum_MN)
        return
    left_TM, right_TN = left_TM.to(sum_MN.dtype), right_TN.to(sum_MN.dtype)
    if _pays(left_TM, right_TN, left_TM.numel() * right_TN.shape[1]):
        sum_MN += transposed_product(left_TM, right_TN)
    else:
        sum_MN.addmm_(left_TM.T, right_TN)


def _pays(x: Tensor, weight: Tensor, work: int) -> bool:
    return (
        # First, so that no compiled graph depends on the size.
        not torch.compiler.is_compiling()
        and work >= LEAST_WORK
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and mkl_is_held_back()
    )


def _onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    rows = math.prod(x.shape[:-1])
    spare = -rows % GRAIN if GRAIN < rows <= FEW_ROWS else 0
    if spare:
        filled = F.pad(x.reshape(rows, -1), (0, 0, 0, spare))
        return _onednn(filled, weight_OI, bias_O)[:rows].view(*x.shape[:-1], -1)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    """``linear`` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        found = _onednn(x, weight_OI, bias_O)
        # A view made here may not be written to, as some models do with products. It shares its memory with nothing.
        return found.new_empty(0).set_(found.untyped_storage(), found.storage_offset(), found.shape, found.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        up_NO = up.reshape(-1, len(weight_OI))
        return (
            product(up_NO, weight_OI).view(x.shape) if for_x else None,
            transposed_product(up_NO, x.reshape(len(up_NO), -1)) if for_weight else None,
            up_NO.sum(0) if for_bias else None,
        )
