"""Callers that share one engine: their jobs run side by side, and whoever waits for a result steps it for all.

From inside out: a ``Core`` runs jobs, a ``Stepper`` lets callers share it, a ``SteppedEngine`` is one for requests.
"""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from tandem.errors import Cancelled
from tandem.futures import Future, wait_all
from tandem.types import Completion, Request, Watch

ASKED_S = 0.05
"""Whoever waits while another thread steps asks every 0.05 s whether that is enough."""
Told = Callable[[Seq[tuple[int, int, Any]]], None]
"""Told of jobs that have ended: of each its part's place in the call, its own place there, its result."""


class Core(Protocol):
    """Runs jobs side by side, one round at a time. No two threads may be in it at once, but for ``add``."""

    @property
    def sampled_tokens(self) -> int:
        """Tokens drawn since it was made, those of jobs that were given up included."""
        ...

    @property
    def running(self) -> int:
        """Jobs that have begun and not ended, while no others may begin."""
        ...

    def add(self, name: int, job: Any) -> None:
        """Takes a job, which runs from the next step on. Raises the error why nothing can be run now."""
        ...

    def step(self) -> Mapping[int, Any]:
        """One round. The jobs that ended in it: what each has come to, or the error that is its own.

        Whatever it raises has cost all jobs: none of them is there any more.
        """
        ...

    def abort(self, names: Collection[int]) -> None:
        """Takes jobs out, wherever they are; not those that it does not have. An error costs as much as in a step."""
        ...

    def renew(self, version: int) -> None:
        """The weights are now those after ``version`` optimizer steps. What runs goes on with them."""
        ...

    def hold(self, held: bool) -> None:
        """Begins no jobs until it is told the opposite. Those that have begun go on."""
        ...


Cored = TypeVar("Cored", bound=Core)


@dataclass(eq=False)
class Call:
    """Jobs that were submitted together: an error of one ends all."""

    error: Exception | None = None
    watch: Told | None = None
    left: int = 0
    """Jobs that have not ended."""


@dataclass(eq=False)
class Part:
    """The future of some jobs of a call: their results, in order. Guarded by the stepper's lock."""

    stepper: Stepper
    call: Call
    number: int
    """Its place in the call."""
    left: int
    """Jobs that have not ended."""
    wake: threading.Condition
    results: dict[int, Any] = field(default_factory=dict)

    def done(self) -> bool:
        return not self.left or self.call.error is not None

    def result(self) -> list[Any]:
        """Steps the engine, unless another thread is at it, until all have ended. Raises the call's error."""
        self.stepper.finish(self)
        return [self.results[index] for index in range(len(self.results))]


class Stepper:
    """Owns a core.

    A thread that waits steps the core for everyone, unless another one is at it, until its own jobs have ended, or as
    long as it likes; then the next one that waits goes on. Where there is one thread, nothing happens but in its calls.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.ended = 0
        """Jobs that have ended, those that failed or were given up included, since there were none."""
        self.busy_seconds = 0.0
        """In steps of the core, since this was made."""
        self._lock = threading.Lock()
        self._claimed = threading.Condition(self._lock)
        self._claims = 0
        self._busy = False
        self.paused = False
        """Whether nobody may step, whoever waits: for the holder of ``exclusive`` to change."""
        self._waiting: list[tuple[threading.Condition, Callable[[], bool]]] = []
        """What wakes each thread that waits, and whether it has what it waits for, as far as can be told here."""
        self._jobs: dict[int, tuple[Part, int]] = {}
        """Where the result of each job in the core goes: its part, and its place there."""
        self._watched: list[Call] = []
        self._gone: list[int] = []
        """Jobs of calls that have failed, which the core may still have."""
        self._names = itertools.count()

    @property
    def unfinished(self) -> int:
        """Jobs that have not ended."""
        return len(self._jobs)

    def submit(self, parts: Seq[Seq[Any]], watch: Told | None = None) -> list[Future[list[Any]]]:
        """Begins a call: one future a part. Raises what ``Core.add`` raises, and has begun nothing then.

        ``watch`` is told between any two steps of what has ended in the last one, by the thread that steps; what it
        raises is the call's error.
        """
        call = Call(watch=watch, left=sum(map(len, parts)))
        with self._lock:
            if not self._jobs:
                self.ended = 0
            begun = [Part(self, call, i, len(jobs), threading.Condition(self._lock)) for i, jobs in enumerate(parts)]
            try:
                for part, jobs in zip(begun, parts, strict=True):
                    for index, job in enumerate(jobs):
                        name = next(self._names)
                        self._jobs[name] = part, index
                        self.core.add(name, job)
            except BaseException as error:
                self._end(call, error)
                raise
            if watch is not None and call.left:
                self._watched.append(call)
        return list(begun)

    def finish(self, part: Part) -> None:
        """Returns once all jobs of the part have ended. Steps the core if nobody else does."""
        with self._lock:
            try:
                while part.left:
                    if part.call.error:
                        raise part.call.error
                    if self._taken:
                        self._stand_by(part.wake, part.done)
                    else:
                        self._drive(part.done)
            except BaseException as error:
                # Whoever is interrupted here wants none of it any more.
                self._end(part.call, error)
                raise

    def wait(self, until: Callable[[], bool]) -> None:
        """Returns once ``until()`` is true, or no job is left. Steps the core for everyone if nobody else does.

        ``until`` is asked between any two steps, without the lock: it may submit. Where another thread steps, or all
        are paused, it is asked every 0.05 s. What it raises costs no job; an error of a step costs all, and is raised
        here, too.
        """
        wake = threading.Condition(self._lock)

        def enough() -> bool:
            if not self._jobs:
                return True
            with self._unlocked():
                return until()

        with self._lock:
            try:
                while not (enough() if self._taken else self._drive(enough)):
                    if self._taken:
                        self._stand_by(wake, lambda: False, ASKED_S)
            finally:
                # It may have been this thread's turn.
                if not self._taken:
                    self._pass_on()

    def cancel(self) -> None:
        """Gives up every job: their futures raise Cancelled. A step that is under way ends, and hands out nothing."""
        with self._lock:
            self._end_all(Cancelled("what was being sampled was given up"))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Between two steps, with the core to oneself."""
        with self._lock:
            self._claims += 1
            try:
                while self._busy:
                    self._claimed.wait()
            finally:
                self._claims -= 1
            self._busy = True
        try:
            yield
        finally:
            with self._lock:
                self._leave()

    def fail(self, error: BaseException) -> None:
        """Ends every call with ``error``, for the holder of ``exclusive``."""
        with self._lock:
            self._end_all(error)
            self._abort()

    @property
    def _taken(self) -> bool:
        """Whether whoever waits may not step now."""
        return self._busy or self.paused or self._claims > 0

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def _stand_by(self, wake: threading.Condition, done: Callable[[], bool], timeout: float | None = None) -> None:
        """Waits to be woken: by results, or to step."""
        self._waiting.append(waiter := (wake, done))
        try:
            wake.wait(timeout)
        finally:
            self._waiting.remove(waiter)

    def _drive(self, done: Callable[[], bool]) -> bool:
        """Steps until that is done, which it returns, or until others claim the core. Has the lock between steps."""
        self._busy = True
        try:
            while not (ended := done()) and not self._claims:
                self._round()
            return ended
        finally:
            self._leave()

    def _round(self) -> None:
        try:
            with self._unlocked():
                start = time.perf_counter()
                try:
                    ended = self.core.step()
                finally:
                    self.busy_seconds += time.perf_counter() - start
            self._tell(ended)
            self._deliver(ended)
            self._watched = [call for call in self._watched if call.left and call.error is None]
            self._abort()
        except BaseException as error:
            self._end_all(error)
            raise

    def _deliver(self, ended: Mapping[int, Any]) -> None:
        for name, result in ended.items():
            if name not in self._jobs:
                continue
            part, index = self._jobs.pop(name)
            self.ended += 1
            if isinstance(result, Exception):
                self._end(part.call, result)
                continue
            part.results[index] = result
            part.left -= 1
            part.call.left -= 1
            if not part.left:
                part.wake.notify_all()

    def _tell(self, ended: Mapping[int, Any]) -> None:
        """Tells every watched call of what is about to be delivered to it, without the lock: others may submit."""
        for call in list(self._watched):
            mine = [(*self._jobs[name], result) for name, result in ended.items() if name in self._jobs]
            heard = [
                (part.number, index, result)
                for part, index, result in mine
                if part.call is call and not isinstance(result, Exception)
            ]
            failed: Exception | None = None
            with self._unlocked():
                try:
                    call.watch(heard)  # type: ignore[misc]
                except Exception as error:
                    failed = error
            if failed is not None:
                self._end(call, failed)

    def _end_all(self, error: BaseException) -> None:
        for call in {part.call for part, _ in self._jobs.values()}:
            self._end(call, error)

    def _end(self, call: Call, error: BaseException) -> None:
        """Ends a call with its first error, or this one. Its jobs leave the core as soon as nobody is in it."""
        cut_off = RuntimeError(f"the engine was interrupted: {error!r}")
        call.error = call.error or (error if isinstance(error, Exception) else cut_off)
        names = [name for name, (part, _) in self._jobs.items() if part.call is call]
        for part, _ in (self._jobs.pop(name) for name in names):
            part.wake.notify_all()
        self.ended += len(names)
        self._gone += names
        if not self._busy:
            self._abort()

    def _abort(self) -> None:
        gone, self._gone = self._gone, []
        if gone:
            try:
                self.core.abort(gone)
            except BaseException as error:
                self._end_all(error)
                raise

    def _leave(self) -> None:
        """Gives the core to the next one who waits for it."""
        try:
            self._abort()
        finally:
            self._busy = False
            self._pass_on()

    def _pass_on(self) -> None:
        if self._claims:
            self._claimed.notify()
        # Whoever is done wakes without stepping.
        elif waiting := next((wake for wake, done in self._waiting if not done()), None):
            waiting.notify()


class SteppedEngine(ABC, Generic[Cored]):
    """What engines of this process have in common (``tandem.roles.Engine``): a core, and a stepper that owns it."""

    def __init__(self, core: Cored) -> None:
        self.core = core
        self.stepper = Stepper(core)

    @property
    def ended(self) -> int:
        """Samples that have ended since nothing was being sampled."""
        return self.stepper.ended

    @property
    def busy_seconds(self) -> float:
        """Seconds in steps of the model, since this was made."""
        return self.stepper.busy_seconds

    @property
    def sampled_tokens(self) -> int:
        """Tokens drawn since this was made."""
        return self.core.sampled_tokens

    @property
    def running(self) -> int:
        """Samples that have begun and not ended, while no others may begin."""
        return self.core.running

    @abstractmethod
    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        """Begins requests, one future each: one completion a seed, in the order asked for."""

    def generate(self, requests: Seq[Request], watch: Watch | None = None) -> list[list[Completion]]:
        """``submit``, and waits for all: one list a request."""
        return wait_all(self.submit(requests, watch))

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        """Goes on sampling until ``until()``, which is asked between any two steps, or until nothing is left."""
        self.stepper.wait(until)

    def look(self) -> None:
        """Nothing ends but in ``wait``."""

    def cancel(self) -> None:
        """Gives up all that is being sampled: the futures raise Cancelled. A step that is under way ends first."""
        self.stepper.cancel()

    def hold(self, held: bool) -> None:
        """Begins no samples until it is told the opposite. Those that have begun go on."""
        with self.stepper.exclusive():
            self.core.hold(held)
