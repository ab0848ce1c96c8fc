"""A checksum of a tensor's bits that adds up, so that a fused or sharded tensor compares with its parts."""

from __future__ import annotations

import torch
from torch import Tensor

Sums = tuple[int, int, int]
"""Sum of the 16-bit words, sum of their squares, and how many elements there are."""
CHUNK = 1 << 24
_BITS = (1 << 63) - 1


@torch.no_grad()
def checksum(tensor: Tensor) -> Sums:
    """The first two moments of a tensor's bits, read as int16 words, modulo 2^63, and its number of elements.

    It does not see order, and for that it adds up: the checksum of a fused tensor is the sum of its parts', that of
    a sharded one of its shards', and padding with zeros counts only as elements.
    """
    words = tensor.contiguous().view(-1).view(torch.int16)
    first = second = 0
    sums = []
    for chunk in words.split(CHUNK):
        wide = chunk.int()
        sums.append(torch.stack((chunk.sum(dtype=torch.int64), (wide * wide).sum(dtype=torch.int64))))
    if sums:
        first, second = torch.stack(sums).sum(dim=0).tolist()
    return first & _BITS, second & _BITS, tensor.numel()


def add(parts: list[Sums]) -> Sums:
    """The checksum of what consists of these parts."""
    columns = list(zip(*parts, strict=True))
    return sum(columns[0]) & _BITS, sum(columns[1]) & _BITS, sum(columns[2])
