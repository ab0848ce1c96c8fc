"""A checksum of a tensor's bits that adds up, so that a fused or sharded tensor compares with its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.kernels import bits

Sums = tuple[int, int, int]
"""Sum of the 16-bit words, sum of their squares, and how many elements there are."""


@dataclass(frozen=True)
class Checked:
    """An engine's parameter: which of the pushed tensors it consists of, and its checksum."""

    parts: tuple[str, ...]
    sums: Sums


_BITS = (1 << 63) - 1


@torch.no_grad()
def moments(tensor: Tensor) -> Tensor:
    """int64 [2] on the tensor's device: sum of its 16-bit words, and of their squares, modulo 2^64."""
    return bits.moments(tensor.contiguous().view(-1).view(torch.int16))


def sums_of(tensors: list[Tensor]) -> list[Sums]:
    """The checksum of each tensor; all are under way before the first is waited for."""
    totals = [moments(tensor) for tensor in tensors]
    return [as_sums(total, tensor.numel()) for total, tensor in zip(totals, tensors, strict=True)]


def as_sums(total: Tensor, elements: int) -> Sums:
    """What ``moments`` gave, as plain numbers. Waits for the device."""
    first, second = total.tolist()
    return first & _BITS, second & _BITS, elements


def checksum(tensor: Tensor) -> Sums:
    """The first two moments of a tensor's bits, read as int16 words, modulo 2^63, and its number of elements.

    It does not see order, and for that it adds up: the checksum of a fused tensor is the sum of its parts', that of
    a sharded one of its shards', and padding with zeros counts only as elements.
    """
    return sums_of([tensor])[0]


def add(parts: list[Sums]) -> Sums:
    """The checksum of what consists of these parts."""
    columns = list(zip(*parts, strict=True))
    return sum(columns[0]) & _BITS, sum(columns[1]) & _BITS, sum(columns[2])
