"""Launched by torchrun: rank 0 drives, the other ranks follow its calls."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tandem.errors import UserError
from tandem.parallel.world import World, gather_objects, join
from tandem.workers.homes import RoleEnd
from tandem.workers.process import Build, Failure, Site, Where, here, raise_failure, to_cpu
from tandem.workers.remote import RemoteTrainer

IDLE_DEADLINE = timedelta(days=7)
"""How long ranks wait for the next call. One that is gone is noticed at once: its connections close."""


@contextmanager
def joined(device: str, deadline_s: float) -> Iterator[Ranks]:
    """Meets the other ranks. Rank 0 gets on with its program; see ``Ranks.leader``."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise UserError(
            f"torchrun: rank {local} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            f"use --nproc-per-node {torch.cuda.device_count()}"
        )
    with join(
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        device=torch.device("cuda", local) if on_gpu else torch.device("cpu"),
        host=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
        deadline_s=deadline_s,
    ) as world:
        ranks = Ranks(world)
        try:
            yield ranks
        finally:
            ranks.close()


@dataclass(frozen=True)
class _Call:
    """``method`` of a role, or its making where ``build`` is given."""

    role: str
    method: str = ""
    arguments: tuple[Any, ...] = ()
    options: Any = None
    build: Build | None = None


class Ranks:
    """The ranks of one torchrun as a home for roles (``tandem.workers.homes.Home``)."""

    def __init__(self, world: World) -> None:
        self.site = Site(world)
        self.control = dist.new_group(backend="gloo", timeout=IDLE_DEADLINE)
        self.open = True

    @property
    def leader(self) -> bool:
        """Whether this is rank 0. Any other rank calls ``follow`` and nothing else."""
        return self.site.world.rank == 0

    @property
    def wheres(self) -> list[Where]:
        return [here(self.site.world.device)]

    def place(self, role: str, build: Build) -> Any:
        """Builds a role on every rank."""
        self._run(_Call(role, build=build))
        return RemoteTrainer(self, role)

    def end(self, role: str) -> RoleEnd:
        return _RanksEnd(self, role)

    def call(self, role: str, method: str, *arguments: Any, **options: Any) -> Any:
        """A method on every rank with the same arguments. Returns what rank 0 returned."""
        return self._run(_Call(role, method, arguments, options))

    def follow(self) -> None:
        """Does what rank 0 asks for until it is done, or gone."""
        while (call := self._broadcast(None)) is not None:
            self._report(self._do(call))

    def close(self) -> None:
        if self.leader and self.open:
            self.open = False
            self._broadcast(pickle.dumps(None))

    def _run(self, call: _Call) -> Any:
        self._broadcast(pickle.dumps(call))
        result = self._do(call)
        for rank, failure in enumerate(self._report(result)):
            raise_failure(failure, f"rank {rank}")
        return result

    def _broadcast(self, message: bytes | None) -> Any:
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self.control)
        assert box[0] is not None
        return pickle.loads(box[0])

    def _report(self, result: Any) -> list[Failure | None]:
        return gather_objects(result if isinstance(result, Failure) else None, self.control)

    def _do(self, call: _Call) -> Any:
        try:
            if call.build is not None:
                self.site.roles[call.role] = call.build(self.site)
                return None
            found = getattr(self.site.roles[call.role], call.method)
            return to_cpu(found(*call.arguments, **call.options) if callable(found) else found)
        except UserError as error:
            return Failure.of(error)
        except Exception:
            # The others wait for this rank's report: it must come, and the traceback with it.
            return Failure("UserError", traceback.format_exc())


@dataclass(frozen=True)
class _RanksEnd:
    ranks: Ranks
    role: str

    @property
    def places(self) -> Seq[tuple[str, str | None]]:
        return [(where.node, None) for where in self.ranks.wheres]

    def each(self, method: str, arguments: Seq[tuple[Any, ...]]) -> list[Any]:
        raise UserError("under torchrun every rank gets the same call; start without torchrun for an online run")

    def call(self, method: str, *arguments: Any) -> Any:
        return self.ranks.call(self.role, method, *arguments)
