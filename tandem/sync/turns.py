"""Engines on the trainer's own devices: while one side works, the other has given its memory away."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass

from tandem.errors import Cancelled
from tandem.futures import Driven, Future
from tandem.roles import Engine, Metrics, OverEngine, Seat
from tandem.signals import held
from tandem.sync.push import WeightPush
from tandem.types import Completion, Request, Watch


@dataclass(eq=False)
class Promised:
    """The future of a request that begins in the engine's next turn."""

    begun: Future[list[Completion]] | None = None
    error: Exception | None = None
    """Why it never will."""

    def done(self) -> bool:
        return self.error is not None or (self.begun is not None and self.begun.done())

    def result(self) -> list[Completion]:
        if self.error is not None:
            raise self.error
        assert self.begun is not None
        return self.begun.result()


class TakingTurns(OverEngine):
    """An engine that wakes to sample and sleeps while others train.

    To sample: optimizer states leave the device, the engine takes back room for its weights, they are pushed, the
    trainers' weights leave too, the engine takes back its cache. Afterwards the engine drops both (sleep level 2), and
    the trainers return; samples that are unfinished go on in the next turn, from their own tokens. ``engines`` are
    ``tandem.roles.SleepingEngine``s, ``engine`` samples with all of them; ``others`` are the trainers and scorers on
    their devices.
    """

    def __init__(
        self, engine: Engine, engines: Seat, others: Seq[Seat], link: WeightPush, *, version: Callable[[], int]
    ) -> None:
        self.engine, self.engines, self.others = engine, engines, others
        self.link = link
        self.version = version
        self.metrics: Metrics = {}
        self._awake = False
        self._waiting: list[tuple[Seq[Request], Watch | None, list[Promised]]] = []
        """What was submitted together and has not begun."""
        self._open: list[Promised] = []
        """What has."""
        engines.call("sleep")

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Begins requests in the next turn, which is when somebody waits."""
        promised = [Promised() for _ in requests]
        self._waiting.append((requests, watch, promised))
        if self._awake:
            self._begin()
        return [Driven(one, self.wait) for one in promised]

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """A turn of the engine, with weights as they are now: until ``until()``, or until nothing is left.

        Whatever ends it, the engine sleeps then and the trainers are back: what is saved next are their weights.
        """
        self._open = [one for one in self._open if not one.done()]
        if (self._waiting or self._open) and not until():
            try:
                self._wake()
                self.engine.wait(until, at_least)
            except BaseException:
                with suppress(Exception):  # what ended the turn is what is told
                    self._rest()
                raise
            self._rest()

    def look(self) -> None:
        """Nothing ends while the engine sleeps."""

    def cancel(self) -> None:
        """Gives up all that is being sampled, and all that was to be."""
        for one in (one for _, _, promised in self._waiting for one in promised):
            one.error = Cancelled("what was to be sampled was given up")
        self._waiting.clear()
        self._open.clear()
        self.engine.cancel()

    def recover(self) -> None:
        """After an engine was started again: it is linked to the trainers, which are back, and sleeps."""
        self.link.connect()
        self.engines.call("sleep")

    def push_later(self, step: int) -> Metrics:
        """Weights are pushed when sampling starts, since the engine has none while others train."""
        return self.metrics

    def _wake(self) -> None:
        if self.link.untried:
            with self.link.check.trial():
                try:
                    self._bring()
                finally:
                    self._give_back()
        self._bring()
        self._awake = True
        self._begin()

    def _bring(self) -> None:
        """The engine's turn: weights and cache on the device, the trainers' off it."""
        for other in self.others:
            other.call("park", "optimizer")
        self.engines.call("wake", "weights")
        version = self.version()
        self.metrics = self.link.push(version)
        for other in self.others:
            other.call("park", "weights")
        self.engines.call("wake", "cache")
        self.link.check.prove(version)

    def _begin(self) -> None:
        while self._waiting:
            requests, watch, promised = self._waiting[0]
            for one, future in zip(promised, self.engine.submit(requests, watch), strict=True):
                one.begun = future
            self._open += self._waiting.pop(0)[2]

    def _rest(self) -> None:
        self._awake = False
        try:
            self.metrics |= {f"engine_{name}": value for name, value in self.engines.call("memory").items()}
        finally:
            self._give_back()

    def _give_back(self) -> None:
        """Whatever becomes of the engine the trainers are back. Signals wait until all are."""
        with held():
            try:
                self.engines.call("sleep")
            finally:
                for other in self.others:
                    other.call("unpark")
