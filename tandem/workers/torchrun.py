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
from tandem.futures import Done, Future
from tandem.parallel.world import World, gather_objects, join
from tandem.roles import Device, Seat
from tandem.stages import Seconds, counting
from tandem.workers.process import Build, Failure, Site, own_address, raise_failure, to_cpu

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
    """``verb`` of a role, or its making where ``build`` is given."""

    role: str
    verb: str = ""
    arguments: tuple[Any, ...] = ()
    build: Build | None = None


class Ranks:
    """The ranks of one torchrun as a home for roles (``tandem.roles.Home``).

    A call is made at once, on this rank too, and the others see calls in the order in which it broadcasts them.
    """

    at_once = True

    def __init__(self, world: World) -> None:
        self.site = Site(world)
        self.control = dist.new_group(backend="gloo", timeout=IDLE_DEADLINE)
        self.open = True

    @property
    def leader(self) -> bool:
        """Whether this is rank 0. Any other rank calls ``follow`` and nothing else."""
        return self.site.world.rank == 0

    @property
    def devices(self) -> Seq[Device]:
        return [(own_address(), None)]

    def place(self, role: str, build: Build) -> Seat:
        """Builds a role on every rank."""
        self._run(_Call(role, build=build))
        return Seat(self, role)

    def begin(self, role: str, build: Build) -> Future[Seat]:
        """``place``, which is made at once."""
        return Done(self.place(role, build))

    def submit(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Future[Any]:
        """See ``tandem.roles.Home``."""
        return Done(self._run(_Call(role, verb, arguments)))

    def submit_each(self, role: str, verb: str, arguments: Seq[tuple[Any, ...]]) -> Future[list[Any]]:
        raise UserError("under torchrun every rank gets the same call; start without torchrun for an online run")

    def seconds(self) -> dict[str, Seconds]:
        """Those of the stages of each other rank so far, by its name."""
        self.place("seconds", OfAll)
        of_rank: list[Seconds] = self.submit("seconds", "told", ()).result()
        return {f"rank {rank}": seconds for rank, seconds in enumerate(of_rank) if rank != self.site.world.rank}

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
            return to_cpu(self.site.call(call.role, call.verb, call.arguments))
        except UserError as error:
            return Failure.of(error)
        except Exception:
            # The others wait for this rank's report: it must come, and the traceback with it.
            return Failure("UserError", traceback.format_exc())


@dataclass(frozen=True)
class OfAll:
    """The seconds of a start of every rank. A collective."""

    site: Site

    def told(self) -> list[Seconds]:
        with counting() as stages:
            return self.site.world.gather(stages.so_far())
