"""Inside a vLLM worker: which elements of which pushed tensor a parameter consists of, seen while they are loaded."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Region(NamedTuple):
    """Elements of a pushed tensor: ``rows`` times ``width`` neighbours, the first at ``start``, rows ``step`` apart."""

    rows: int
    width: int
    start: int
    step: int

    @property
    def numel(self) -> int:
        return self.rows * self.width


class Piece(NamedTuple):
    """A region of pushed tensor ``part``, and where it lies in a parameter: its first element, and between rows."""

    part: str
    region: Region
    offset: int
    stride: int

    def of(self, content: Tensor) -> Tensor:
        """The piece [rows, width] of a parameter's whole, contiguous content."""
        size = (self.region.rows, self.region.width)
        return content.view(-1).as_strided(size, (self.stride, 1), content.storage_offset() + self.offset)


def piece_of(part: str, tensor: Tensor, parameter: Tensor, target: Tensor, source: Tensor) -> Piece | None:
    """The piece that a copy from ``source`` into ``target``, a view of ``parameter``, makes of pushed ``tensor``.

    None where it is something else.
    """
    if memory_of(source) != memory_of(tensor) or source.shape != target.shape:
        return None
    merged = _merged(tuple(target.shape), target.stride(), source.stride())
    if merged is None:
        return None
    rows, width, stride, step = merged
    region = Region(rows, width, int(source.storage_offset() - tensor.storage_offset()), step)
    return Piece(part, region, int(target.storage_offset() - parameter.storage_offset()), stride)


def memory_of(tensor: Tensor) -> int:
    """What tells the memory that a tensor lies in from others."""
    # Not its address: tensors without data have none.
    return tensor.untyped_storage()._cdata


def _merged(
    shape: tuple[int, ...], target: tuple[int, ...], source: tuple[int, ...]
) -> tuple[int, int, int, int] | None:
    """Rows, their width, and how far apart they are in target and source; None where it takes more dimensions."""
    dims: list[tuple[int, int, int]] = []
    for size, *strides in zip(shape, target, source, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * strides[0], size * strides[1]):
            dims[-1] = (dims[-1][0] * size, strides[0], strides[1])
        else:
            dims.append((size, strides[0], strides[1]))
    if not dims or dims[-1][1:] != (1, 1):
        dims.append((1, 1, 1))
    if len(dims) == 1:
        return 1, dims[0][0], dims[0][0], dims[0][0]
    return (dims[0][0], dims[1][0], dims[0][1], dims[0][2]) if len(dims) == 2 else None
