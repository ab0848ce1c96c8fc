"""How a bucket travels from one sender to its receivers: broadcast (NCCL, gloo), or memory of a GPU that both map."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from tandem.errors import UserError
from tandem.parallel.world import LOOPBACK
from tandem.sync.plan import Plan

Transport = Literal["nccl", "gloo", "ipc"]
BUFFERS = 2
"""One fills while the other is on its way."""


@dataclass(frozen=True)
class Link:
    """One end of a connection. Rank 0 sends, ranks 1 to ``size - 1`` receive; they meet at ``host:port``, the sender's.

    ``host`` is the loopback where all of them are on one machine. Elsewhere whoever comes has to know the ``secret``.
    """

    transport: Transport
    host: str
    port: int
    rank: int
    size: int
    plan: Plan
    timeout_s: float = 300.0
    secret: str = ""

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self.timeout_s)

    @property
    def overlaps(self) -> bool:
        """Whether sums of a bucket hide behind the next one on its way. IPC's way is the memory that sums read, too:
        there they hide behind what an engine does after the last bucket."""
        return self.transport != "ipc"


class Pending(Protocol):
    """A transfer on its way."""

    def wait(self) -> object:
        """Returns, or orders the current stream behind it, once it is done."""
        ...


class Channel(Protocol):
    """A connected end. Calls are made for bucket 0, 1, 2... of a push, by all ends alike."""

    buffers: list[Tensor]
    """uint8, each with room for any bucket."""

    def send(self, push: int, bucket: int, filled: Tensor) -> Pending:
        """Sender: gives the bucket away. Its buffer may be overwritten once what is returned has been waited for."""
        ...

    def receive(self, push: int, bucket: int, wanted: Tensor) -> Pending:
        """Receiver: ``wanted`` is filled once what is returned has been waited for."""
        ...

    def taken(self, push: int, bucket: int) -> None:
        """Receiver: the bucket is loaded and its buffer may be overwritten."""
        ...

    def close(self) -> None: ...


def open_channel(link: Link, store: dist.TCPStore, device: torch.device) -> Channel:
    """Connects one end; returns when gloo's ends all have."""
    if link.transport == "ipc":
        return SharedMemory(link, store, device)
    return Broadcast(link, store, device)


class Broadcast:
    """Rank 0 broadcasts over a process group of its own, apart from any default group of the process."""

    def __init__(self, link: Link, store: dist.TCPStore, device: torch.device) -> None:
        self.link = link
        if link.transport == "gloo":
            device = torch.device("cpu")
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = link.timeout
            # Of itself it listens at the address that the machine's name has.
            alone = link.host == LOOPBACK
            make = dist.ProcessGroupGloo
            gloo._devices = [make.create_device(hostname=LOOPBACK) if alone else make.create_default_device()]
            self.group: Any = dist.ProcessGroupGloo(store, link.rank, link.size, gloo)
        else:
            # Its few blocks are not to wait for those of copies and sums.
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = link.timeout
            self.group = dist.ProcessGroupNCCL(store, link.rank, link.size, options)
        self.options = dist.BroadcastOptions()
        self.options.rootRank = 0
        self.options.rootTensor = 0
        self.buffers = [torch.empty(link.plan.buffer_bytes, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]

    def send(self, push: int, bucket: int, filled: Tensor) -> Pending:
        return self.group.broadcast([filled], self.options)

    def receive(self, push: int, bucket: int, wanted: Tensor) -> Pending:
        return self.group.broadcast([wanted], self.options)

    def taken(self, push: int, bucket: int) -> None:
        # NCCL orders a later broadcast into the buffer behind its use; with gloo it has been copied out of already.
        return

    def close(self) -> None:
        self.group = None


class SharedMemory:
    """CUDA IPC: receivers on the sender's own GPU map its buffers. The store carries the signals, no weights."""

    def __init__(self, link: Link, store: dist.TCPStore, device: torch.device) -> None:
        self.link, self.store, self.device = link, store, device
        size = link.plan.buffer_bytes
        if link.rank == 0:
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
            store.set("buffers", json.dumps([_handle(buffer) for buffer in self.buffers]))
        else:
            self.buffers = [_rebuild(handle, size, device) for handle in json.loads(store.get("buffers"))]

    def send(self, push: int, bucket: int, filled: Tensor) -> Pending:
        torch.cuda.current_stream(self.device).synchronize()
        self.store.set(f"sent/{push}/{bucket}", "1")
        return Signal(self, [f"taken/{push}/{bucket}/{rank}" for rank in range(1, self.link.size)])

    def receive(self, push: int, bucket: int, wanted: Tensor) -> Pending:
        return Signal(self, [f"sent/{push}/{bucket}"])

    def taken(self, push: int, bucket: int) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        self.store.set(f"taken/{push}/{bucket}/{self.link.rank}", "1")

    def close(self) -> None:
        self.buffers = []


class Signal:
    """Keys that the other end sets in the store."""

    def __init__(self, channel: SharedMemory, keys: list[str]) -> None:
        self.channel, self.keys = channel, keys

    def wait(self) -> None:
        """Raises UserError where they are not set within the link's deadline."""
        link = self.channel.link
        try:
            self.channel.store.wait(self.keys, link.timeout)
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"weight sync: no word from the other end within {link.timeout_s:.0f} s") from error


HANDLES = slice(7, 10), slice(11, 15)
"""Of ``reduce_tensor``'s arguments, what the other process cannot know: memory, reference counter and event."""


def _handle(buffer: Tensor) -> list[int | bool | str]:
    """What CUDA IPC needs to map the buffer, bytes in hexadecimal."""
    _, arguments = reduce_tensor(buffer)
    found = [value for part in HANDLES for value in arguments[part]]
    return [value.hex() if isinstance(value, bytes) else value for value in found]


def _rebuild(handle: list[Any], size: int, device: torch.device) -> Tensor:
    """The sender's uint8 buffer in this process, in which the GPU may have another number."""
    number = device.index if device.index is not None else torch.cuda.current_device()
    known = (torch.Tensor, (size,), (1,), 0, torch.storage.TypedStorage, torch.uint8, number)
    unhexed = [bytes.fromhex(value) if isinstance(value, str) else value for value in handle]
    return rebuild_cuda_tensor(*known, *unhexed[:3], False, *unhexed[3:])  # type: ignore[call-arg]
