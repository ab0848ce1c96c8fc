"""Device memory given away while somebody else works there, and taken back as it was."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tandem.parallel.sharding import local


class Parking:
    """Tensors whose storage is on the CPU for a while. Every view of a storage, and the tensor itself, stays valid."""

    def __init__(self) -> None:
        self.parked: list[tuple[torch.UntypedStorage, Tensor]] = []

    @torch.no_grad()
    def park(self, tensors: Iterable[Tensor]) -> None:
        """Moves the tensors' storages to pinned memory and frees them on the device. CPU tensors stay."""
        seen: set[int] = set()
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            if storage.device.type == "cpu" or storage.nbytes() == 0 or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
            host.copy_(_bytes_of(storage), non_blocking=True)
            self.parked.append((storage, host))
        if self.parked:
            torch.cuda.synchronize()
            for storage, _ in self.parked:
                storage.resize_(0)
            torch.cuda.empty_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for storage, host in self.parked:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
        if self.parked:
            torch.cuda.synchronize()
        self.parked.clear()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
