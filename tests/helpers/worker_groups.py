"""Worker groups on the Ray of a module's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.workers.cluster import Cluster
from tandem.workers.group import WorkerGroup


@contextmanager
def groups(*sizes: int, name: str = "home", **options: Any) -> Iterator[list[WorkerGroup]]:
    """Worker groups named ``home0``, ``home1``, ... on the Ray of this process."""
    cluster = Cluster(device="cpu", needed={f"{name}{i}": (size, 1) for i, size in enumerate(sizes)})
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    made: list[WorkerGroup] = []
    try:
        for i, size in enumerate(sizes):
            made.append(WorkerGroup(f"{name}{i}", size, cluster, environment={"PYTHONPATH": path}, **options))
        for group in made:
            group.ready()
        yield made
    finally:
        for group in made:
            group.close()
        cluster.close()
