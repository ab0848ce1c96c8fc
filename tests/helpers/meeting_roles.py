"""Roles that tests place in homes: they meet their other ranks, wait for one another, and fail."""

from __future__ import annotations

import time
from pathlib import Path

from tandem.errors import UserError
from tandem.workers.process import Site

PATIENCE_S = 60.0


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < end, f"nobody has made {path}"
        time.sleep(0.01)


class Role:
    """A role that meets its other ranks in each call and writes down what it was called for."""

    heard: list[tuple[str, int]]

    def __init__(self, site: Site, name: str) -> None:
        self.site, self.name = site, name
        self.heard = site.roles.setdefault("heard", [])

    def meet(self, number: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """What each rank is at when the ranks meet, and what this one was called for so far."""
        time.sleep(0.01 * ((self.site.world.rank + number) % 2))
        self.heard.append((self.name, number))
        return self.site.world.gather((self.name, number)), list(self.heard)

    def wait(self, path: Path, rank: int = 0) -> str:
        """That rank is held up; the others go on to meet it."""
        if self.site.world.rank == rank:
            wait_for(path)
        return self.site.world.gather(self.name)[0]

    def come(self, folder: Path, *names: str) -> str:
        """Says that it is here and waits until all of those have come."""
        (folder / self.name).touch()
        for name in names:
            wait_for(folder / name)
        return self.name

    def fail(self, after: Path | None = None, then: Path | None = None) -> None:
        if after is not None:
            wait_for(after)
        if then is not None:
            then.touch()
        raise UserError(f"{self.name} has nothing to give")
