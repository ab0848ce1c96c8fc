"""What one push of weights consists of: every tensor in order, cut into buckets of whole layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from tandem.types import CORRECTION_BIAS

ALIGNMENT = 256
"""Bytes: every tensor of a bucket starts at a multiple of it."""
BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class TensorSpec:
    """One parameter on the wire: its name in the Hugging Face module, full shape, and dtype (``bfloat16``...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes it takes in a bucket."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


Bucket = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Plan:
    """The tensors of a push in the order in which they travel. Sender and receivers hold equal plans."""

    tensors: tuple[TensorSpec, ...]
    bucket_bytes: int = BUCKET_BYTES

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Buckets of at most ``bucket_bytes``, but never less than a layer: engines that fuse tensors need it whole."""
        buckets: list[list[TensorSpec]] = []
        size = 0
        for group in _by_layer(self.tensors):
            room = sum(spec.room for spec in group)
            if not buckets or size + room > self.bucket_bytes:
                buckets.append([])
                size = 0
            buckets[-1] += group
            size += room
        return tuple(map(tuple, buckets))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def buffer_bytes(self) -> int:
        """Bytes that hold any one bucket."""
        return max(sum(spec.room for spec in bucket) for bucket in self.buckets)


def plan_of(parameters: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None, **options: int) -> Plan:
    """The plan of a module's ``named_parameters()``, floating ones as ``dtype`` (None: each as it is).

    Biases by which routers pick experts stay in their own precision: they move by steps of 0.001. Tied parameters
    appear once, as ``named_parameters`` gives them. A DTensor counts with its full shape.
    """
    specs = []
    for name, tensor in parameters:
        rounded = dtype is not None and tensor.is_floating_point() and not name.endswith(CORRECTION_BIAS)
        specs.append(
            TensorSpec(name, tuple(tensor.shape), str(dtype if rounded else tensor.dtype).removeprefix("torch."))
        )
    return Plan(tuple(specs), **options)


def views(bucket: Bucket, buffer: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket inside its flat uint8 ``buffer``."""
    found: list[tuple[str, Tensor]] = []
    offset = 0
    for spec in bucket:
        flat = buffer[offset : offset + spec.nbytes].view(spec.torch_dtype)
        found.append((spec.name, flat.view(spec.shape)))
        offset += spec.room
    return found


def used(bucket: Bucket, buffer: Tensor) -> Tensor:
    """The part of the buffer that the bucket fills."""
    return buffer[: sum(spec.room for spec in bucket)]


def _by_layer(tensors: Seq[TensorSpec]) -> list[list[TensorSpec]]:
    """Neighbours that belong to the same numbered layer together, the others alone."""
    groups: list[list[TensorSpec]] = []
    for layer, run in groupby(tensors, lambda spec: re.findall(r"^.*?\.\d+\.", spec.name)):
        specs = list(run)
        groups += [specs] if layer else [[spec] for spec in specs]
    return groups
