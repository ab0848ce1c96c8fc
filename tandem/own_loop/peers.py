"""The processes that run one training loop together, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tandem.errors import UserError
from tandem.models.loading import pick_device
from tandem.parallel.world import gather_objects


class Peers:
    """The default process group's ranks, over a gloo group of their own; or this process alone, where there is none.

    Making it is a collective. Raises UserError where torchrun started several processes that have not met yet.
    """

    def __init__(self, deadline_s: float) -> None:
        self.group: Any = None
        self.rank, self.size = 0, 1
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"this is one of {os.environ['WORLD_SIZE']} processes and they have not met; call "
                "torch.distributed.init_process_group() before tandem.Sampler(...)"
            )

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, on every rank."""
        return gather_objects(value, self.group) if self.group is not None else [value]

    @contextmanager
    def agreeing(self, what: type[UserError] = UserError) -> Iterator[None]:
        """Around something that a rank may fail at alone: raises the first rank's error of this kind on every rank.

        None waits then for one that has given up. An error of another kind ends its rank at once.
        """
        error: UserError | None = None
        try:
            yield
        except what as failed:
            error = failed
        for rank, each in enumerate(self.gather(error and (type(error), str(error)))):
            if each is not None:
                kind, message = each
                raise kind(message if self.size == 1 else f"rank {rank}: {message}")

    def close(self) -> None:
        """Leaves the group. Not where the default group is gone already, and this one with it."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


def own_device(name: str) -> torch.device:
    """``auto`` is this rank's GPU (the current one, or LOCAL_RANK's) where there is one, else the CPU."""
    device = pick_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    # A loop that has chosen its GPU is believed; one that sees a single GPU has no choice.
    return torch.device("cuda", torch.cuda.current_device() or (local if local < torch.cuda.device_count() else 0))
