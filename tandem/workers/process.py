"""What runs in a worker process: roles built there, and calls to them. It knows nothing of Ray."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tandem.batch import Outputs
from tandem.collector import leave_out, pause
from tandem.errors import NonFiniteError, RunFailure, UserError, first_line
from tandem.parallel.world import LOOPBACK, World, join, open_store
from tandem.stages import Seconds, Stages, stage
from tandem.workers.keeper import born_at, start_keeper

TAIL_LINES = 15


@dataclass(frozen=True)
class Where:
    """Where a worker process runs."""

    node: str
    pid: int
    gpus: tuple[str, ...]
    """UUIDs of the GPUs that it sees, which are the same in every process; none on a CPU."""


KINDS: dict[str, type[UserError]] = {kind.__name__: kind for kind in (NonFiniteError, RunFailure, UserError)}
"""What a driver raises anew, by name."""


@dataclass(frozen=True)
class Failure:
    """An error meant for the user, on its way to the driver as a value, so that its words arrive as they are."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: UserError) -> Failure:
        """With the first of ``KINDS`` that the error is of."""
        return cls(next(name for name, kind in KINDS.items() if isinstance(error, kind)), str(error))


@dataclass
class Site:
    """What a role finds where it is built: the world of its process, and the roles built there before it."""

    world: World
    roles: dict[str, Any] = field(default_factory=dict)

    def call(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Any:
        """A role's method, or its attribute where that is no method."""
        found = getattr(self.roles[role], verb)
        return found(*arguments) if callable(found) else found

    def close(self) -> None:
        """Ends the roles that have something to end, the last one first."""
        with ExitStack() as ending:
            ending.callback(self.roles.clear)
            for role in self.roles.values():
                if hasattr(role, "close"):
                    ending.callback(role.close)


Build = Callable[[Site], Any]
"""Makes a role where it will live. It travels to the worker, so it holds paths and numbers, not models."""


@dataclass(frozen=True)
class Packed:
    """A ``Build`` that is pickled until it is called, so that what it imports where it has come to is counted."""

    pickled: bytes

    def __call__(self, site: Site) -> Any:
        with stage("imports"):
            build: Build = pickle.loads(self.pickled)
        return build(site)


class WorkerProcess:
    """One process of a group. Its calls run one at a time.

    It works in the driver's ``folder`` where that exists here, too: relative paths mean the same then.
    """

    def __init__(self, rank: int, size: int, device: str, folder: str | None = None) -> None:
        self.stages = Stages()
        self.stack = ExitStack()
        self.door: socket.socket | None = None
        if folder is not None and os.path.isdir(folder):
            os.chdir(folder)
        if device == "cuda":
            torch.cuda.set_device(0)
        self.device = torch.device("cuda:0" if device == "cuda" else "cpu")
        self.site = Site(World(rank, size, self.device))
        self.stages.add("processes", own_age())

    def begin(self, variables: dict[str, str], mark: str, heartbeat_s: float) -> Where:
        """Takes environment variables that nobody else may read, and gets a keeper (``tandem.workers.keeper``)."""
        os.environ.update(variables)
        # Until a role is built: libraries come first.
        pause()
        with self.stages.counted(), stage("processes"):
            start_keeper(mark, heartbeat_s)
        return self.where()

    def where(self) -> Where:
        gpus = [torch.cuda.get_device_properties(i).uuid for i in range(torch.cuda.device_count())]
        return Where(own_address(), os.getpid(), tuple(map(str, gpus)) if self.device.type == "cuda" else ())

    def listen(self, host: str) -> int:
        """Opens the door at which the other ranks of the group meet this one, on one interface. Returns its port."""
        self.door = socket.create_server((host, 0))
        return self.door.getsockname()[1]

    def join(self, host: str, port: int, deadline_s: float) -> None:
        """Meets the other ranks of the group. Returns when all have come."""
        world = self.site.world
        with self.stages.counted(), stage("meeting"):
            store = open_store(host, port, timedelta(seconds=deadline_s), self.door)
            meeting: dict[str, Any] = {"host": host, "port": port, "deadline_s": deadline_s, "store": store}
            joined = join(world.rank, world.size, device=self.device, **meeting)
            self.site.world = self.stack.enter_context(joined)

    def seconds(self) -> Seconds:
        """Those of each stage of its start, and of what the steps have compiled and captured."""
        return self.stages.so_far()

    def place(self, role: str, build: Build, after: object = None) -> Failure | None:
        """Builds a role here, once the call has ended whose result ``after`` is."""
        try:
            with self.stages.counted(), stage("set-up"):
                self.site.roles[role] = build(self.site)
        except UserError as error:
            return Failure.of(error)
        leave_out()
        return None

    def call(self, role: str, verb: str, arguments: tuple[Any, ...], quiet: bool) -> Any:
        """See ``Site.call``. ``quiet``: the result is not sent back."""
        try:
            with self.stages.counted():
                result = self.site.call(role, verb, arguments)
        except UserError as error:
            return Failure.of(error)
        except torch.OutOfMemoryError as error:
            return Failure("UserError", f"out of GPU memory: {first_line(error)}")
        return None if quiet else to_cpu(result)

    def close(self) -> None:
        """Ends the roles, and leaves the world."""
        self.site.close()
        self.stack.close()


def own_age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    born = born_at(os.getpid())
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(born) / os.sysconf("SC_CLK_TCK") if born else 0.0


def own_address() -> str:
    """The address under which other machines reach this one; the loopback where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only picks the interface.
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return LOOPBACK


def ending(what: str, lines: Iterable[str]) -> str:
    """The last 15 lines of what a process wrote, for an error message."""
    kept = [line for line in lines if line.strip()][-TAIL_LINES:]
    return f"; its {what} ends:\n  " + "\n  ".join(kept) if kept else "; it wrote nothing"


def raise_failure(result: Any, who: str) -> Any:
    """Raises the error that a worker sent, as it was raised there; passes anything else on."""
    if isinstance(result, Failure):
        kind = KINDS[result.kind]
        raise kind(result.message if kind is NonFiniteError else f"{who}: {result.message}")
    return result


def to_cpu(value: Any) -> Any:
    """Tensors of a result, on the CPU and without their graph: they leave the process."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Outputs):
        return value.map(to_cpu)
    if isinstance(value, dict):
        return {key: to_cpu(inner) for key, inner in value.items()}
    return value
