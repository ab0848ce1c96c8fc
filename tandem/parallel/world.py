"""Which of how many processes this is: one, or one rank of a group that works on every batch together."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

LOOPBACK = "127.0.0.1"
DEADLINE_S = 600.0
"""Longest wait for the other ranks of a group in one collective."""


@dataclass(frozen=True)
class World:
    """A process among ``size`` that train one model. Collectives of one process do nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over the ranks, in place."""
        if self.size > 1:
            here = tensor.to(self.device)
            dist.all_reduce(here, group=self.group)
            tensor.copy_(here)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, on every rank."""
        return gather_objects(value, self.group) if self.size > 1 else [value]


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's ``value`` (anything that pickles), on every rank of the group."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def open_store(host: str, port: int, timeout: timedelta, server: socket.socket | None) -> dist.TCPStore:
    """A store at ``host:port``, hosted here where the ``server`` that listens there is given.

    By itself one that is hosted would listen on every interface.
    """
    return dist.TCPStore(
        host,
        port,
        is_master=server is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if server is None else server.detach(),
    )


@contextmanager
def join(
    rank: int,
    size: int,
    *,
    device: torch.device,
    host: str,
    port: int,
    deadline_s: float = DEADLINE_S,
    store: dist.Store | None = None,
) -> Iterator[World]:
    """Joins the default process group of torch.distributed (NCCL on GPUs, gloo on CPUs), and leaves it at the end.

    Rank 0 hosts the rendezvous at ``host:port``, on every interface, unless all ranks have a ``store``. A rank that
    does not come, or does not answer in a collective within ``deadline_s`` seconds, ends the wait with an error.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A communicator that waits too long is torn down together with its process.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    timeout = timedelta(seconds=deadline_s)
    meeting: dict[str, Any] = {"init_method": f"tcp://{host}:{port}"} if store is None else {"store": store}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        **meeting,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        mesh = dist.init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        yield World(rank, size, device, mesh)
    finally:
        dist.destroy_process_group()
