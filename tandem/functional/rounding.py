"""How much of a difference of numbers may be rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BFLOAT16_ROUNDOFF = 2.0**-8
"""Largest error, relative to its size, that a number has after it is rounded to bfloat16."""


def rounding_of(*terms_N: Tensor) -> float:
    """What rounding can make of sums and differences of these terms: ``2^-8`` of the root mean square of ``sum |x|``.

    Log-probs and values come from models that compute in bfloat16, or are no better known than if they did. 0 for no
    numbers.
    """
    size_N = torch.stack(terms_N).double().abs().sum(0)
    return BFLOAT16_ROUNDOFF * float(size_N.square().mean().sqrt()) if size_N.numel() else 0.0
