"""Where roles live: in this process, or in worker groups. The rest of a run sees trainers, scorers and engines."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tandem.workers.group import WorkerGroup
from tandem.workers.process import Build, Site, Where, here
from tandem.workers.remote import RemoteTrainer


class Home(Protocol):
    """Processes in which roles can be built and called."""

    @property
    def wheres(self) -> list[Where]: ...

    def place(self, role: str, build: Build) -> Any:
        """Builds a role. Returns it, or what stands for it here, with the same promises."""
        ...

    def end(self, role: str) -> RoleEnd:
        """A role's every rank, to call."""
        ...

    def close(self) -> None: ...


class RoleEnd(Protocol):
    """All ranks of a role (``tandem.sync.push.End``)."""

    @property
    def places(self) -> Seq[tuple[str, str | None]]: ...

    def each(self, method: str, arguments: Seq[tuple[Any, ...]]) -> list[Any]: ...

    def call(self, method: str, *arguments: Any) -> Any: ...


class Here:
    """This process: roles are the objects themselves, and a call is a call."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    def wheres(self) -> list[Where]:
        where = here(self.site.world.device)
        if where.gpus:
            where = Where(where.node, where.pid, (where.gpus[torch.cuda.current_device()],))
        return [where]

    def place(self, role: str, build: Build) -> Any:
        self.site.roles[role] = build(self.site)
        return self.site.roles[role]

    def end(self, role: str) -> RoleEnd:
        return HereEnd(self, role)

    def close(self) -> None:
        for role in reversed(list(self.site.roles.values())):
            if hasattr(role, "close"):
                with suppress(Exception):
                    role.close()


@dataclass(frozen=True)
class HereEnd:
    """A role of this process as the only rank there is."""

    home: Here
    role: str

    @property
    def places(self) -> Seq[tuple[str, str | None]]:
        return _places(self.home.wheres)

    def each(self, method: str, arguments: Seq[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self.home.site.roles[self.role], method)(*own) for own in arguments]

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.home.site.roles[self.role], method)(*arguments)


class Workers:
    """A worker group."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group

    @property
    def wheres(self) -> list[Where]:
        return self.group.wheres

    def place(self, role: str, build: Build) -> Any:
        self.group.place(role, build)
        return RemoteTrainer(self.group, role)

    def end(self, role: str) -> RoleEnd:
        return WorkersEnd(self.group, role)

    def close(self) -> None:
        self.group.close()


@dataclass(frozen=True)
class WorkersEnd:
    """A role of a worker group."""

    group: WorkerGroup
    role: str
    ranks_per_process: int = 1
    """Where a process runs several ranks of its own (a tensor-parallel engine on a CPU)."""

    @property
    def places(self) -> Seq[tuple[str, str | None]]:
        return [place for place in _places(self.group.wheres) for _ in range(self.ranks_per_process)]

    def each(self, method: str, arguments: Seq[tuple[Any, ...]]) -> list[Any]:
        return self.group.each(self.role, method, arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return self.group.call(self.role, method, *arguments)


def _places(wheres: list[Where]) -> list[tuple[str, str | None]]:
    return [(where.node, gpu) for where in wheres for gpu in (where.gpus or (None,))]
