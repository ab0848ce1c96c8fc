"""The live engine's core: samples of one module, taken, advanced and given up between any two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from tandem.engines.live.sample import Sample
from tandem.errors import UserError
from tandem.types import Completion


class Batching(Protocol):
    """A way to decode samples side by side: from the first one that comes until none is left."""

    def enter(self, samples: Seq[Sample]) -> None:
        """Takes samples, which wait until there is room."""
        ...

    def round(self) -> list[Sample]:
        """Goes a little further with those that run, and starts others. Returns those that have ended."""
        ...

    def leave(self, samples: AbstractSet[Sample]) -> None:
        """Gives samples up, wherever they are."""
        ...

    def renew(self, *, recompute: bool) -> None:
        """The weights have changed: samples that have not started yet start with the new ones.

        Those that run go on from the keys and values that they have, or, to ``recompute``, from those that the new
        weights give their tokens. When it returns, every sample has all the tokens that the old weights drew.
        """
        ...

    def give_way(self) -> None:
        """Others are about to compute on the device while samples are here: leaves them the memory that they need.

        Until they begin the device may have work, which nobody waits for.
        """
        ...

    def go_on(self) -> None:
        """They are through, and the host has other things to do: gives the device work, and waits for none of it."""
        ...


class LiveCore:
    """``tandem.engines.stepper.Core`` for ``module``: its jobs are samples.

    ``begin`` makes the batching in which samples run. ``end`` is told when it has gone: no sample is left, or a round
    failed and what the samples held cannot be relied on. ``version`` tells which weights the module has now, and is
    asked before every step; where they have changed, ``recompute`` says what becomes of samples that run.
    """

    def __init__(
        self,
        module: Any,
        *,
        begin: Callable[[], Batching],
        end: Callable[[bool], None],
        version: Callable[[], int],
        recompute: bool = False,
    ) -> None:
        self.module, self.recompute = module, recompute
        self.begin, self.end = begin, end
        self.current_version = version
        self.version = 0
        self.batching: Batching | None = None
        self.modules: list[Any] = []
        """The module and all in it, as of the batching's start: looked through in every step."""
        self.new: deque[Sample] = deque()
        self.samples: dict[int, Sample] = {}
        self.held = False
        """Whether no samples may begin."""
        self.gone_tokens = 0
        """Drawn by samples that are not there any more."""

    @property
    def sampled_tokens(self) -> int:
        return self.gone_tokens + sum(len(sample.token_ids) for sample in list(self.samples.values()))

    def add(self, name: int, job: Sample) -> None:
        job.name = name
        self.samples[name] = job
        self.new.append(job)

    def step(self) -> dict[int, Completion | UserError]:
        """One round of the batching: where samples decode one by one, a token of each."""
        if self.batching is None:
            self.modules = list(self.module.modules())
        with self._losing_all(), evaluating(self.modules):
            self.batching = self.batching or self.begin()
            self._look()
            if self.new and not self.held:
                self.batching.enter([self.new.popleft() for _ in range(len(self.new))])
            if not self.running:
                return {}
            ended = {s.name: s.error or s.completion(self.version) for s in self.batching.round()}
            self._forget(ended)
        return ended

    def abort(self, names: Collection[int]) -> None:
        gone = {self.samples[name] for name in names if name in self.samples}
        self.new = deque(sample for sample in self.new if sample not in gone)
        with self._losing_all():
            if self.batching is not None and gone:
                self.batching.leave(gone)
            self._forget([sample.name for sample in gone])

    @property
    def running(self) -> int:
        """Samples that the batching has: those that have begun, where no others may."""
        return len(self.samples) - len(self.new)

    def hold(self, held: bool) -> None:
        """Begins no samples until it is told the opposite: those that have not begun leave the batching."""
        self.held = held
        if held and self.batching is not None:
            new = set(self.new)
            everyone = list(self.samples.values())  # another thread may add to it meanwhile
            waiting = [s for s in everyone if not (s.token_ids or s.stop) and s.row is None and s not in new]
            with self._losing_all():
                self.batching.leave(set(waiting))
            self.new.extendleft(reversed(waiting))

    def give_way(self) -> None:
        """Leaves the device to others for a while."""
        with self._losing_all(), evaluating(self.modules):
            if self.batching is not None:
                # What it enqueues comes from the weights that there are now.
                self._look()
                self.batching.give_way()

    def go_on(self) -> None:
        """The device is its own again."""
        with self._losing_all(), evaluating(self.modules):
            if self.batching is not None:
                self._look()
                self.batching.go_on()

    def _look(self) -> None:
        if (version := self.current_version()) != self.version:
            self.renew(version)

    def renew(self, version: int) -> None:
        if self.batching is not None:
            self.batching.renew(recompute=self.recompute)
        for sample in list(self.samples.values()):
            sample.stamp(self.version)
        self.version = version

    @contextmanager
    def _losing_all(self) -> Iterator[None]:
        """Where it is left by an error, no sample is as the batching says."""
        try:
            yield
        except BaseException:
            self.gone_tokens = self.sampled_tokens
            self.samples.clear()
            self.new.clear()
            self.batching = None
            self.end(True)
            raise

    def _forget(self, names: Collection[int]) -> None:
        for name in names:
            self.gone_tokens += len(self.samples.pop(name).token_ids)
        if not self.samples and self.batching is not None:
            self.batching = None
            self.end(False)


@contextmanager
def evaluating(modules: Iterable[Any]) -> Iterator[None]:
    """Without dropout or gradient; what was in training mode is put back into it."""
    training = [m for m in modules if m.training]
    for m in training:
        m.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
