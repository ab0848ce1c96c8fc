"""Work on a GPU as a graph: launched once with one call, on the memory that it was captured with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tandem.stages import stage

Result = TypeVar("Result")


class Capturing:
    """Captures graphs of one device that share their memory, so that at most one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.first: torch.cuda.CUDAGraph | None = None
        """Kept, since torch gives up the memory of a pool whose last graph goes, and then refuses to capture on it."""

    @stage("graphs")
    def __call__(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """A graph of ``work`` and where it leaves its result. ``work`` is done once, before it is captured."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            # Kernels are compiled and libraries take their workspaces outside the capture.
            work()
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        here.wait_stream(self.stream)
        self.first = self.first or graph
        return graph, result
