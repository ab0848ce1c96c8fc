"""Whether tensors are the same memory or differ by rounding, and what a module computes, by computing it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from tandem.engines.live.layers import Unlike
from tandem.engines.live.reading.calls import Call
from tandem.engines.live.stacked import is_linear
from tandem.kernels import layers as kernels
from tandem.kernels.layers import CURVES, Curve, Norm

LEAST, LEAST_LOW = 1e-3, 0.03
"""A difference of norms, over the truth's, that is more than rounding: in float32, and in 16 bits."""
Name = TypeVar("Name")


def same(one: Tensor, two: Tensor) -> bool:
    """Whether they are the same numbers in memory."""
    return one.data_ptr() == two.data_ptr() and one.numel() == two.numel()


def rounded(one: Tensor, two: Tensor) -> bool:
    """Whether one is the other, or that rounded to another type."""
    return same(one, two) or (one.dtype != two.dtype and torch.equal(one, two.to(one.dtype)))


def near(found: Tensor, truth: Tensor) -> bool:
    """Whether they differ by rounding."""
    return found.shape == truth.shape and gap(found, truth) <= (LEAST if truth.dtype.itemsize >= 4 else LEAST_LOW)


def gap(found: Tensor, truth: Tensor) -> float:
    """The norm of their difference over the truth's."""
    truth = truth.float()
    return float((found.float() - truth).norm() / truth.norm().clamp(min=1e-12))


def nearest(found: dict[Name, Tensor], truth: Tensor, otherwise: str) -> Name:
    """The one that is nearest to the truth. Raises Unlike where none is near."""
    fitting = [name for name in found if found[name].shape == truth.shape]
    name = min(fitting, key=lambda n: gap(found[n], truth), default=None)
    if name is None or not near(found[name], truth):
        raise Unlike(otherwise)
    return name


def times(found: Tensor, truth: Tensor) -> float:
    """The number that makes one of the other; 0 where none does."""
    if found.numel() != truth.numel():
        return 0.0
    one, other = (x.flatten().double() for x in (found, truth))
    times = float(one @ other / (one @ one).clamp(min=1e-12))
    return times if near((times * one).to(truth.dtype), truth.flatten()) else 0.0


def by_token(x: Tensor) -> Tensor:
    """[S, 1, T, E] → [T, S, E]."""
    return x[:, 0].transpose(0, 1).contiguous()


def read_norm(call: Call, residual: torch.dtype | None = None) -> Norm | None:
    """The norm that a called module is, of a residual of that type; None where it is none of those known."""
    module, size = call.module, call.input.shape[-1]
    parameters = dict(module.named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    own = [e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(module, name, None), float)]
    odd = set(parameters) - {"weight", "bias"} or {p.shape for p in parameters.values()} - {(size,)}
    if odd or call.input.shape != call.output.shape or is_linear(module) or any(True for _ in module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, size, generator=generator) + 0.5
    # From magnitudes at which the epsilon counts.
    x = (x * torch.logspace(-4, 1, 6)[:, None]).to(call.input.device, call.input.dtype)
    kinds = [
        Norm(weight, bias, eps, offset, centered, wide)
        for eps in own[:1] or (1e-5, 1e-6)
        for centered in (False, True)
        for offset in ((False, True) if weight is not None else (False,))
        # In float32 both are the same, and the first is taken: 1 + w would lose its digits in 16 bits.
        for wide in ((True, False) if offset else (False, True))
    ]
    found = {number: kernels.norm(x, kind) for number, kind in enumerate(kinds)}
    try:
        return replace(kinds[nearest(found, module(x), "")], rounds=residual not in (None, call.input.dtype))
    except Unlike:
        return None


def read_curve(call: Call) -> Curve | None:
    """The curve that a called module without parameters computes; None where it is none of those known."""
    x = torch.linspace(-12, 12, 401).to(call.input.device, call.input.dtype)
    try:
        return nearest({name: curve(x) for name, curve in CURVES.items()}, call.module(x), "")
    except Unlike:
        return None
