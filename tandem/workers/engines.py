"""The engines of several processes as one, and the one restart of those that die."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from tandem.errors import RunFailure, WorkerDied, first_line
from tandem.futures import Done, Future
from tandem.parallel.shares import divide
from tandem.roles import Engine, Metrics, Seat
from tandem.types import Completion, Request, Watch
from tandem.workers.group import Answer, WorkerGroup

log = logging.getLogger("tandem")


class DividedEngine:
    """Engines of which each takes one call at a time: a step's requests are divided among them beforehand."""

    def __init__(self, engines: Seat) -> None:
        self.engines = engines
        self.ended = 0
        self.busy_seconds = 0.0
        self.sampled_tokens = 0

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Samples at once."""
        return [Done(completions) for completions in self.generate(requests, watch)]

    def generate(self, requests: Seq[Request], watch: Watch | None = None) -> list[list[Completion]]:
        """One list a request, in the order asked for. Until all engines are done, none has ended: nothing to watch."""
        self.ended = 0
        if not requests:
            return []
        shares = divide([_load(request) for request in requests], len(self.engines.places))
        parts = self.engines.submit_each("generate", [([requests[i] for i in share],) for share in shares]).result()
        results: list[list[Completion]] = [[] for _ in requests]
        for share, part in zip(shares, parts, strict=True):
            for i, completions in zip(share, part, strict=True):
                results[i] = completions
                self.ended += len(completions)
        return results

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """Nothing is left to sample after ``submit``."""

    def cancel(self) -> None:
        """Nothing is being sampled after ``submit``."""


class BalancedEngine:
    """Engines that take several calls at a time: whichever has room takes the next few requests.

    ``slots`` samples decode at once in one engine; it is kept supplied with up to twice as many.
    """

    def __init__(self, group: WorkerGroup, role: str, *, slots: int) -> None:
        self.group, self.role, self.slots = group, role, slots
        self.ended = 0
        self.busy_seconds = 0.0
        self.sampled_tokens = 0

    CALLS = 4
    """Calls on their way to one engine."""

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Samples at once."""
        return [Done(completions) for completions in self.generate(requests, watch)]

    def generate(self, requests: Seq[Request], watch: Watch | None = None) -> list[list[Completion]]:
        """One list a request, in the order asked for."""
        self.ended = 0
        waiting = deque(self._chunks(requests))
        results: list[list[Completion]] = [[] for _ in requests]
        under_way: dict[Answer, list[int]] = {}
        # Rank by rank, so that few requests are spread over all engines.
        free = deque([*range(self.group.size)] * self.CALLS)
        while waiting or under_way:
            while waiting and free:
                chunk = waiting.popleft()
                asked = [requests[i] for i in chunk]
                under_way[self.group.submit_one(free.popleft(), self.role, "generate", asked)] = chunk
            answer = self.group.first_of(under_way)
            part = answer.result()
            chunk = under_way.pop(answer)
            for i, completions in zip(chunk, part, strict=True):
                results[i] = completions
            self.ended += sum(map(len, part))
            if watch is not None:
                watch([(i, j, completion) for i in chunk for j, completion in enumerate(results[i])])
            free.append(answer.first_rank)
        return results

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """Nothing is left to sample after ``submit``."""

    def cancel(self) -> None:
        """Nothing is being sampled after ``submit``."""

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


class RestartingOnce:
    """An engine of which processes that die are started again, once in a run, and refilled with the current weights.

    A sample depends on its seed and the weights alone, so what was being sampled is simply sampled again.
    """

    def __init__(self, engine: Engine, group: WorkerGroup, refill: Callable[[], object]) -> None:
        self.engine, self.group, self.refill = engine, group, refill
        self.restarted = False

    @property
    def ended(self) -> int:
        return self.engine.ended

    @property
    def busy_seconds(self) -> float:
        return self.engine.busy_seconds

    @property
    def sampled_tokens(self) -> int:
        return self.engine.sampled_tokens

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        self.engine.wait(until, at_least)

    def cancel(self) -> None:
        self.engine.cancel()

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Samples at once."""
        return [Done(completions) for completions in self.generate(requests, watch)]

    def generate(self, requests: Seq[Request], watch: Watch | None = None) -> list[list[Completion]]:
        """As the engine's own. Raises RunFailure where a process dies a second time."""
        try:
            return self.engine.generate(requests, watch)
        except WorkerDied as error:
            self._restart(error)
            return self.engine.generate(requests, watch)

    def guard(self, push: Callable[[int], Metrics]) -> Callable[[int], Metrics]:
        """``push``, for engines that may have died since they sampled: most of a step goes by meanwhile."""

        def guarded(step: int) -> Metrics:
            try:
                return push(step)
            except WorkerDied as error:
                # Refilling is this push, made again.
                self._restart(error)
                return {}

        return guarded

    def _restart(self, error: WorkerDied) -> None:
        if self.restarted:
            raise RunFailure(f"{error} (it was restarted once already)") from None
        self.restarted = True
        for rank in self.group.dead():
            log.warning("%s rank %d is started again: %s", self.group.name, rank, first_line(error))
            self.group.restart(rank)
        self.refill()
