"""Engines on the trainer's own devices: while one side works, the other has given its memory away."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from tandem.futures import Done, Future
from tandem.roles import Engine, Metrics, Seat
from tandem.sync.push import WeightPush
from tandem.types import Completion, Request, Watch


class TakingTurns:
    """An engine that wakes to sample and sleeps while others train.

    To sample: optimizer states leave the device, the engine takes back room for its weights, they are pushed, the
    trainers' weights leave too, the engine takes back its cache. Afterwards the engine drops both (sleep level 2), and
    the trainers return. ``engines`` are ``tandem.roles.SleepingEngine``s, ``engine`` samples with all of them;
    ``others`` are the trainers and scorers on their devices.
    """

    def __init__(
        self,
        engine: Engine,
        engines: Seat,
        others: Seq[Seat],
        link: WeightPush,
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
        """As the engine's own, with weights as they are now."""
        for other in self.others:
            other.call("park", weights=False)
        self.engines.call("wake", "weights")
        version = self.version()
        self.metrics = self.link.push(version)
        for other in self.others:
            other.call("park", weights=True)
        self.engines.call("wake", "cache")
        self.link.prove(version)
        completions = self.engine.generate(requests, watch)
        self.metrics |= {f"engine_{name}": value for name, value in self.engines.call("memory").items()}
        self.engines.call("sleep")
        for other in self.others:
            other.call("unpark")
        return completions

    def recover(self) -> None:
        """After an engine was started again: trainers take their memory back, and it is linked to them and sleeps."""
        for other in self.others:
            other.call("unpark")
        self.link.connect()
        self.engines.call("sleep")

    def push_later(self, step: int) -> Metrics:
        """Weights are pushed when sampling starts, since the engine has none while others train."""
        return self.metrics
