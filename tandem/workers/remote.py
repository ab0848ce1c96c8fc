"""Roles that live in a worker group, with the promises of ``tandem.roles``."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tandem.batch import Batch, Outputs
from tandem.parallel.shares import divide
from tandem.roles import Metrics
from tandem.types import Completion, Request
from tandem.workers.group import WorkerGroup


class Calls(Protocol):
    """Processes that are called together."""

    def call(self, role: str, method: str, *arguments: Any, **options: Any) -> Any:
        """A role's method in every process, with the same arguments. Returns what rank 0 returned."""
        ...


class RemoteScorer:
    """A scorer whose model is in other processes (``tandem.roles.Scorer``)."""

    def __init__(self, group: Calls, role: str) -> None:
        self.group, self.role = group, role

    def score(self, batch: Batch) -> Outputs:
        return self.group.call(self.role, "score", batch)


class RemoteTrainer(RemoteScorer):
    """A trainer whose model is in other processes (``tandem.roles.Trainer``)."""

    def __init__(self, group: Calls, role: str) -> None:
        super().__init__(group, role)
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def forward_backward(self, batch: Batch) -> Metrics:
        return self.group.call(self.role, "forward_backward", batch)

    def evaluate(self, batch: Batch) -> Metrics:
        return self.group.call(self.role, "evaluate", batch)

    def optim_step(self, done: float | None = None) -> Metrics:
        # Counted before it is asked for: whoever is interrupted from here on must not be taken for untouched.
        self._version += 1
        return self.group.call(self.role, "optim_step", done)

    def state_dict(self) -> dict[str, Any]:
        return self.group.call(self.role, "state_dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.group.call(self.role, "load_state_dict", dict(state))
        self._version = state["version"]

    def export(self, folder: Path) -> None:
        """Rank 0 writes: the folder must be on a disk that it shares with the driver."""
        self.group.call(self.role, "export", folder.absolute())

    def memory_peak(self) -> float | None:
        return self.group.call(self.role, "memory_peak")

    def park(self, *, weights: bool) -> None:
        self.group.call(self.role, "park", weights=weights)

    def unpark(self) -> None:
        self.group.call(self.role, "unpark")


class DividedEngine:
    """Engines of which each takes one call at a time: a step's requests are divided among them beforehand."""

    def __init__(self, group: WorkerGroup, role: str) -> None:
        self.group, self.role = group, role
        self.ended = 0

    def generate(self, requests: Seq[Request]) -> list[list[Completion]]:
        """One list a request, in the order asked for. Until all engines are done, none has ended."""
        self.ended = 0
        if not requests:
            return []
        shares = divide([_load(request) for request in requests], self.group.size)
        parts = self.group.each(self.role, "generate", [([requests[i] for i in share],) for share in shares])
        results: list[list[Completion]] = [[] for _ in requests]
        for share, part in zip(shares, parts, strict=True):
            for i, completions in zip(share, part, strict=True):
                results[i] = completions
                self.ended += len(completions)
        return results


class BalancedEngine:
    """Engines that take several calls at a time: whichever has room takes the next few requests.

    ``slots`` samples decode at once in one engine; it is kept supplied with up to twice as many.
    """

    def __init__(self, group: WorkerGroup, role: str, *, slots: int) -> None:
        self.group, self.role, self.slots = group, role, slots
        self.ended = 0

    CALLS = 4
    """Calls on their way to one engine."""

    def generate(self, requests: Seq[Request]) -> list[list[Completion]]:
        """One list a request, in the order asked for."""
        self.ended = 0
        waiting = iter(self._chunks(requests))
        results: list[list[Completion]] = [[] for _ in requests]
        lock = threading.Lock()

        def serve(rank: int) -> None:
            while True:
                with lock:
                    chunk = next(waiting, None)
                if chunk is None:
                    return
                part = self.group.one(rank, self.role, "generate", [requests[i] for i in chunk])
                for i, completions in zip(chunk, part, strict=True):
                    results[i] = completions
                with lock:
                    self.ended += sum(map(len, part))

        pool = ThreadPoolExecutor(self.group.size * self.CALLS)
        try:
            # Rank by rank, so that few requests are spread over all engines.
            served = [pool.submit(serve, rank) for _ in range(self.CALLS) for rank in range(self.group.size)]
            for future in served:
                future.result()
        finally:
            # Whoever is interrupted does not wait for what the engines are at.
            pool.shutdown(wait=False, cancel_futures=True)
        return results

    def _chunks(self, requests: Seq[Request]) -> list[list[int]]:
        """Runs of requests, of about half an engine's slots, and so many at least that every engine gets some."""
        samples = sum(len(request.seeds) for request in requests)
        size = max(1, min(2 * self.slots // self.CALLS, -(-samples // self.group.size)))
        chunks: list[list[int]] = []
        room = 0
        for i, request in enumerate(requests):
            if room <= 0:
                chunks.append([])
                room = size
            chunks[-1].append(i)
            room -= len(request.seeds)
        return chunks


def _load(request: Request) -> int:
    """Tokens that a request may cost."""
    return len(request.prompt_ids) + len(request.seeds) * request.sampling.max_new_tokens
