"""This process as a home for roles (``tandem.roles.Home``). The others: ``group``, ``torchrun`` and ``child``."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch

from tandem.futures import Done, Future
from tandem.parallel.world import World
from tandem.roles import Device, Seat
from tandem.workers.process import Build, Site, own_address


class Here:
    """This process: roles are the objects themselves, and a call is made at once."""

    at_once = True

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    def devices(self) -> Seq[Device]:
        device = self.site.world.device
        return [(own_address(), str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None)]

    def place(self, role: str, build: Build) -> Seat:
        self.site.roles[role] = build(self.site)
        return Seat(self, role)

    def submit(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Future[Any]:
        return Done(self.site.call(role, verb, arguments))

    def submit_each(self, role: str, verb: str, arguments: Seq[tuple[Any, ...]]) -> Future[list[Any]]:
        return Done([self.site.call(role, verb, own) for own in arguments])

    def close(self) -> None:
        with suppress(Exception):
            self.site.close()


class Aside(Here):
    """Roles of this process, called in order by a thread that is there for them alone.

    For a call that waits in here for another process (the sending end of a push): this process must be free to notice
    that the other one has died. The calls compute on the device's default stream, as if made by the main thread.
    """

    at_once = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="aside")

    def submit(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Future[Any]:
        return self.thread.submit(self._call, role, verb, arguments)

    def submit_each(self, role: str, verb: str, arguments: Seq[tuple[Any, ...]]) -> Future[list[Any]]:
        return self.thread.submit(lambda: [self._call(role, verb, own) for own in arguments])

    def _call(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Any:
        with default_stream(self.site.world.device):
            return self.site.call(role, verb, arguments)

    def close(self) -> None:
        """Ends the thread when it is done with what it does. The roles are left to their home."""
        self.thread.shutdown(wait=False)


def seat_of(role: Any) -> Seat:
    """A seat for an object of this process, a trainer or scorer of your own."""
    return Here(Site(World())).place("role", lambda site: role)


def default_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Computes on the device's default stream, whatever device and stream this thread would use of itself."""
    return torch.cuda.stream(torch.cuda.default_stream(device)) if device.type == "cuda" else nullcontext()
