"""Checksums of tensors that see every bit and where it lies, and add up over shards and parts of fused tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tandem.kernels import bits
from tandem.parallel.gather import standing
from tandem.parallel.sharding import local, rows_of
from tandem.sync.plan import Plan

MODULUS = 1 << 32
Sums = dict[str, int]
"""The checksum of each pushed tensor, by its name."""
Jobs = Callable[[int], Seq[bits.Job]]
Tensors = Callable[[], Seq[Tensor]]


class RunningSums:
    """Checksums of a push on a device, a slot each: ``add`` buckets 0, 1, 2..., then ``result``; again for the next.

    ``jobs(bucket)`` says what a bucket adds. It is asked and prepared once, and only played back as long as all of
    ``tensors()``, whose elements are summed, stay where they are. With ``overlap`` the device gets a bucket's work as
    soon as it is added, else that of all buckets in one launch.
    """

    def __init__(self, slots: int, device: torch.device, jobs: Jobs, tensors: Tensors, overlap: bool) -> None:
        self.jobs, self.tensors, self.overlap = jobs, tensors, overlap
        self.total_N = torch.zeros(slots, dtype=torch.int32, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.where: list[tuple[int, torch.Size]] = []
        self.memory: set[int] = set()
        """Where the tensors' storages begin."""
        self.added: tuple[int, ...] = ()
        """Buckets that the device has yet to be given."""
        self.prepared: dict[tuple[int, ...], Callable[[Tensor], None]] = {}

    @torch.no_grad()
    def add(self, bucket: int) -> None:
        """Sums what the bucket's tensors hold now (until ``launch``, without ``overlap``). Bucket 0 begins a push."""
        if bucket == 0:
            self.added, tensors = (), self.tensors()
            where = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
            if where != self.where:
                self.where, self.prepared = where, {}
                self.memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            with self._aside():
                self.total_N.zero_()
        self.added += (bucket,)
        if self.overlap:
            self.launch()

    @torch.no_grad()
    def launch(self) -> None:
        """Gives the device the added buckets' work, after all that it was given so far. Nothing waits for it."""
        added, self.added = self.added, ()
        if added:
            with self._aside():
                (self.prepared.get(added) or self._prepare(added))(self.total_N)

    def join(self) -> None:
        """What the device is given from now on comes after what was added."""
        self.launch()
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def result(self) -> list[int]:
        """The sums modulo 2^32. Waits for the device."""
        self.join()
        return [total % MODULUS for total in self.total_N.tolist()]

    def _prepare(self, buckets: tuple[int, ...]) -> Callable[[Tensor], None]:
        """What adds the sums of the buckets, less those that had to be copied to be summed (from the CPU, out of a
        packed layer): they are added here, a bucket at a time, and their copies are others in the next push."""
        found = [jobs for bucket in buckets if (jobs := self._lasting(bucket)) is not None]
        add = bits.prepare([job for jobs in found for job in jobs])
        if len(found) == len(buckets):
            self.prepared[buckets] = add
        return add

    def _lasting(self, bucket: int) -> Seq[bits.Job] | None:
        """The bucket's jobs, where they read the tensors themselves; else adds them and forgets their copies."""
        jobs = self.jobs(bucket)
        if all(job.values_RC.untyped_storage().data_ptr() in self.memory for job in jobs):
            return jobs
        bits.prepare(jobs)(self.total_N)
        return None

    def _aside(self) -> AbstractContextManager[Any]:
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)


class ParameterSums:
    """The checksums that a push of these parameters has at both ends: of the parameters themselves, not of a buffer.

    Each rank sums the slices that it keeps, cast to the wire's dtype, at their places in the whole tensor. ``tally`` is
    told of the plan's buckets as they go. ``overlap`` is ``Link.overlaps`` of the link that they travel over.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], plan: Plan, device: torch.device, overlap: bool = True
    ) -> None:
        self.parameters, self.plan, self.device = parameters, plan, device
        self.slots = {spec.name: slot for slot, spec in enumerate(plan.tensors)}
        # A name that is not among the parameters is refused by what loads it.
        self.there = standing(parameters)
        self.ordered = [self.there[name] for name in self.slots if name in self.there]
        self.sharded = [name for name in self.slots if isinstance(self.there.get(name), DTensor)]
        self.tally = RunningSums(len(self.slots), device, self._jobs, lambda: [local(p) for p in self.ordered], overlap)

    def result(self) -> Sums:
        """The sums over all ranks. Waits for the device; a collective where parameters are sharded."""
        if self.sharded:
            self.tally.join()
            index = torch.tensor([self.slots[name] for name in self.sharded], device=self.device)
            total = self.tally.total_N[index].long()
            mesh = self.there[self.sharded[0]].device_mesh  # type: ignore[attr-defined]
            dist.all_reduce(total, group=mesh.get_group())
            self.tally.total_N[index] = total.int()
        return dict(zip(self.slots, self.tally.result(), strict=True))

    def now(self) -> Sums:
        """The sums of all buckets as the parameters are now."""
        for bucket in range(len(self.plan.buckets)):
            self.tally.add(bucket)
        return self.result()

    def _jobs(self, bucket: int) -> list[bits.Job]:
        jobs: list[bits.Job] = []
        for spec in self.plan.buckets[bucket]:
            parameter = self.parameters[spec.name].detach()
            width = parameter.shape[1:].numel()
            start = rows_of(parameter).start * width if isinstance(parameter, DTensor) else 0
            # Offloaded slices lie on the CPU.
            mine_1C = local(parameter).to(self.device, non_blocking=True).reshape(1, -1)
            jobs.append(bits.Job(self.slots[spec.name], mine_1C, spec.torch_dtype, start))
        return jobs
