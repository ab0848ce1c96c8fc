"""Checksums of tensors that see every bit and where it lies, and add up over shards and parts of fused tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tandem.kernels import bits
from tandem.parallel.sharding import local, rows_of
from tandem.sync.plan import Plan

MODULUS = 1 << 32
Sums = dict[str, int]
"""The checksum of each pushed tensor, by its name."""


class Tally:
    """Checksums of a push on a device, a slot each: ``begin``, ``add`` for each bucket, ``result``; again for the next.

    ``jobs(bucket)`` says what a bucket adds. It is asked and prepared once, and only played back as long as all
    tensors stay where they are. The first ``quiet`` buckets are summed on a part of the GPU (``bits.prepare``).
    """

    def __init__(self, slots: int, device: torch.device, jobs: Callable[[int], Seq[bits.Job]], quiet: int = 0) -> None:
        self.jobs, self.quiet = jobs, quiet
        self.total_N = torch.zeros(slots, dtype=torch.int32, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.where: list[tuple[int, torch.Size]] = []
        self.memory: set[int] = set()
        """Of the tensors: where their storages begin."""
        self.prepared: dict[int, Callable[[Tensor], None]] = {}

    def begin(self, tensors: Seq[Tensor]) -> None:
        """Sets all sums to 0. ``tensors`` are those whose elements will be added."""
        where = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
        if where != self.where:
            self.where, self.prepared = where, {}
            self.memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        with self._aside():
            self.total_N.zero_()

    @torch.no_grad()
    def add(self, bucket: int) -> None:
        """Gives the device the bucket's work, which comes after all that it was given so far. Nothing waits for it."""
        with self._aside():
            add = self.prepared.get(bucket)
            if add is not None:
                add(self.total_N)
                return
            jobs = self.jobs(bucket)
            add = bits.prepare(jobs, quiet=bucket < self.quiet)
            add(self.total_N)
            # A copy that was made to be summed (from the CPU, out of a packed layer) is another one in the next push.
            if all(job.values_RC.untyped_storage().data_ptr() in self.memory for job in jobs):
                self.prepared[bucket] = add

    def join(self) -> None:
        """What the device is given from now on comes after what was added."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def result(self) -> list[int]:
        """The sums modulo 2^32. Waits for the device."""
        self.join()
        return [total % MODULUS for total in self.total_N.tolist()]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield


class ParameterSums:
    """The checksums that a push of these parameters has at both ends: of the parameters themselves, not of a buffer.

    Each rank sums the slices that it keeps, cast to the wire's dtype, at their places in the whole tensor. ``begin``
    and ``add`` only give the device work, a bucket at a time, which hides behind a bucket that is on its way.
    ``quiet`` is ``Link.quiet`` of the link that it travels over.
    """

    def __init__(self, parameters: Mapping[str, Tensor], plan: Plan, device: torch.device, quiet: int = 0) -> None:
        self.parameters, self.plan, self.device = parameters, plan, device
        self.slots = {spec.name: slot for slot, spec in enumerate(plan.tensors)}
        # A name that is not among the parameters is refused by what loads it.
        self.ordered = [parameters[name] for name in self.slots if name in parameters]
        self.sharded = [name for name in self.slots if isinstance(parameters.get(name), DTensor)]
        self.tally = Tally(len(self.slots), device, self._jobs, quiet)

    @torch.no_grad()
    def begin(self) -> None:
        """A push begins."""
        self.tally.begin([local(parameter) for parameter in self.ordered])

    def add(self, bucket: int) -> None:
        """Sums this rank's part of the plan's bucket of that number."""
        self.tally.add(bucket)

    def result(self) -> Sums:
        """The sums over all ranks. Waits for the device; a collective where parameters are sharded."""
        if self.sharded:
            self.tally.join()
            index = torch.tensor([self.slots[name] for name in self.sharded], device=self.device)
            total = self.tally.total_N[index].long()
            mesh = self.parameters[self.sharded[0]].device_mesh  # type: ignore[attr-defined]
            dist.all_reduce(total, group=mesh.get_group())
            self.tally.total_N[index] = total.int()
        return dict(zip(self.slots, self.tally.result(), strict=True))

    def now(self) -> Sums:
        """The sums of all buckets as the parameters are now."""
        self.begin()
        for bucket in range(len(self.plan.buckets)):
            self.add(bucket)
        return self.result()

    def _jobs(self, bucket: int) -> list[bits.Job]:
        jobs: list[bits.Job] = []
        for spec in self.plan.buckets[bucket]:
            parameter = self.parameters[spec.name].detach()
            start = rows_of(parameter).start * _width(parameter) if isinstance(parameter, DTensor) else 0
            # Offloaded slices lie on the CPU.
            mine_1C = local(parameter).to(self.device, non_blocking=True).reshape(1, -1)
            jobs.append(bits.Job(self.slots[spec.name], mine_1C, spec.torch_dtype, start))
        return jobs


def _width(tensor: Tensor) -> int:
    """Elements of a row."""
    return torch.Size(tensor.shape[1:]).numel()
