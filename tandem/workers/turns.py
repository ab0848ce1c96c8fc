"""Engines on the trainer's own devices: while one side works, the other has given its memory away."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

from tandem.errors import RunFailure, WorkerDied, first_line
from tandem.roles import Engine, Metrics
from tandem.types import Completion, Request
from tandem.workers.group import WorkerGroup
from tandem.workers.homes import RoleEnd

log = logging.getLogger("tandem")


class Parked(Protocol):
    """A trainer or scorer on shared devices."""

    def park(self, *, weights: bool) -> None: ...

    def unpark(self) -> None: ...


class Link(Protocol):
    """A push, and the part of its proof for which the engine must be able to compute (``tandem.sync.push``)."""

    def connect(self) -> None: ...

    def push(self, version: int) -> Metrics: ...

    def prove(self, version: int) -> None: ...


class TakingTurns:
    """An engine that wakes to sample and sleeps while others train.

    To sample: optimizer states leave the device, the engine takes back room for its weights, they are pushed, the
    trainers' weights leave too, the engine takes back its cache. Afterwards the engine drops both (sleep level 2), and
    the trainers return. ``engines`` are ``tandem.roles.SleepingEngine``s, ``engine`` samples with all of them.
    """

    def __init__(
        self,
        engine: Engine,
        engines: RoleEnd,
        others: Seq[Parked],
        link: Link,
        *,
        version: Callable[[], int],
    ) -> None:
        self.engine, self.engines, self.others = engine, engines, others
        self.link = link
        self.version = version
        self.metrics: Metrics = {}
        engines.call("sleep")

    @property
    def ended(self) -> int:
        return self.engine.ended

    def generate(self, requests: Seq[Request]) -> list[list[Completion]]:
        """As the engine's own, with weights as they are now."""
        for other in self.others:
            other.park(weights=False)
        self.engines.call("wake", "weights")
        version = self.version()
        self.metrics = self.link.push(version)
        for other in self.others:
            other.park(weights=True)
        self.engines.call("wake", "cache")
        self.link.prove(version)
        completions = self.engine.generate(requests)
        self.metrics |= {f"engine_{name}": value for name, value in self.engines.call("memory").items()}
        self.engines.call("sleep")
        for other in self.others:
            other.unpark()
        return completions

    def recover(self) -> None:
        """After an engine was started again: trainers take their memory back, and it is linked to them and sleeps."""
        for other in self.others:
            other.unpark()
        self.link.connect()
        self.engines.call("sleep")

    def push_later(self, step: int) -> Metrics:
        """Weights are pushed when sampling starts, since the engine has none while others train."""
        return self.metrics


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

    def generate(self, requests: Seq[Request]) -> list[list[Completion]]:
        """As the engine's own. Raises RunFailure where a process dies a second time."""
        try:
            return self.engine.generate(requests)
        except WorkerDied as error:
            self._restart(error)
            return self.engine.generate(requests)

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
