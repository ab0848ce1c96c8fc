"""Checksums of tensors that see every bit and where it lies, and add up over shards and parts of fused tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tandem.kernels import bits
from tandem.parallel.sharding import local, rows_of
from tandem.sync.plan import Plan, TensorSpec

MODULUS = 1 << 32
Sums = dict[str, int]
"""The checksum of each pushed tensor, by its name."""


class Tally:
    """Checksums under way on a device, a slot each. They are waited for together, by ``result``."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.total_N = torch.zeros(slots, dtype=torch.int32, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is added inside comes after all that the device has been given so far, and nothing waits for it."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    @torch.no_grad()
    def add(self, slot: int, values_RC: Tensor, dtype: torch.dtype, *, start: int = 0, step: int = 0) -> None:
        """Adds elements, cast to ``dtype``, of which (r, c) has position ``start + r * step + c`` in its tensor."""
        if values_RC.numel():
            bits.add_sum(self.total_N, slot, values_RC, start=start, step=step, dtype=dtype)

    def join(self) -> None:
        """What the device is given from now on comes after what was added aside."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def result(self) -> list[int]:
        """The sums modulo 2^32. Waits for the device."""
        self.join()
        return [total % MODULUS for total in self.total_N.tolist()]


def checksum(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """``kernels.bits`` of one whole tensor, cast to ``dtype`` (None: as it is)."""
    tally = Tally(1, tensor.device)
    tally.add(0, tensor.detach().reshape(1, -1), dtype or tensor.dtype)
    return tally.result()[0]


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> Sums:
    """Of whole tensors on one device; all are under way before the first is waited for."""
    named = [(name, tensor.detach()) for name, tensor in tensors]
    if not named:
        return {}
    tally = Tally(len(named), named[0][1].device)
    for slot, (_, tensor) in enumerate(named):
        tally.add(slot, tensor.reshape(1, -1), tensor.dtype)
    return dict(zip([name for name, _ in named], tally.result(), strict=True))


class Truth:
    """The checksums that a push of these parameters must have at its other end: of the parameters, not of a buffer.

    Each rank sums the slices that it keeps, cast to the wire's dtype, at their places in the whole tensor. ``add`` only
    gives the device work, a bucket at a time, which hides behind a bucket that is on its way.
    """

    def __init__(self, parameters: Mapping[str, Tensor], plan: Plan, device: torch.device) -> None:
        self.parameters, self.device = parameters, device
        self.slots = {spec.name: slot for slot, spec in enumerate(plan.tensors)}
        self.tally = Tally(len(self.slots), device)

    @torch.no_grad()
    def add(self, bucket: Iterable[TensorSpec]) -> None:
        """Sums this rank's part of these tensors."""
        with self.tally.aside():
            for spec in bucket:
                parameter = self.parameters[spec.name].detach()
                start = rows_of(parameter).start * _width(parameter) if isinstance(parameter, DTensor) else 0
                # Offloaded slices lie on the CPU.
                mine = local(parameter).to(self.device, non_blocking=True).reshape(1, -1)
                self.tally.add(self.slots[spec.name], mine, spec.torch_dtype, start=start)

    def result(self) -> Sums:
        """The sums over all ranks. Waits for the device; a collective where parameters are sharded."""
        sharded = [name for name in self.slots if isinstance(self.parameters[name], DTensor)]
        if sharded:
            self.tally.join()
            index = torch.tensor([self.slots[name] for name in sharded], device=self.device)
            total = self.tally.total_N[index].long()
            mesh = self.parameters[sharded[0]].device_mesh  # type: ignore[attr-defined]
            dist.all_reduce(total, group=mesh.get_group())
            self.tally.total_N[index] = total.int()
        return dict(zip(self.slots, self.tally.result(), strict=True))


def _width(tensor: Tensor) -> int:
    """Elements of a row."""
    return torch.Size(tensor.shape[1:]).numel()
