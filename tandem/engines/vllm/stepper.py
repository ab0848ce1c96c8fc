"""Many threads, one vLLM engine: their samples run in one batch, and one thread at a time steps it."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One sample to draw, in vLLM's terms."""

    prompt: Any
    params: Any


@dataclass(frozen=True)
class Ended:
    """vLLM's final ``RequestOutput`` for a job; the weights' versions when it entered the batch and when it left."""

    output: Any
    version_min: int
    version_max: int


@dataclass(eq=False)
class Call:
    """One thread's jobs on their way. Guarded by the stepper's lock."""

    jobs: Seq[Job]
    wake: threading.Condition
    waiting: bool = False
    ended: list[tuple[int, Ended]] = field(default_factory=list)
    error: BaseException | None = None


@dataclass(frozen=True)
class Running:
    """A job that vLLM has."""

    call: Call
    index: int
    version: int


class Stepper:
    """Owns vLLM's ``LLMEngine``, which no two threads may touch at once.

    A thread that waits for its jobs steps the engine for everyone, unless another one is at it; it hands over what
    ends to the call that it belongs to, and stops once something of its own has ended, so that no call's callbacks
    hold up the others. At most ``slots`` jobs are in vLLM, first come first served, so that a job's ``version_min``
    is that of the weights which draw its first token.
    """

    def __init__(self, engine: Any, slots: int, version: Callable[[], int]) -> None:
        self.engine = engine
        self.slots = slots
        self.version = version
        self.unusable: Exception | None = None
        """Why nothing can be sampled now: set and cleared by whoever holds ``exclusive``."""
        self.broken: Exception | None = None
        """What a step failed with: vLLM's state is unknown since, and nothing clears it."""
        self._lock = threading.Lock()
        self._claimed = threading.Condition(self._lock)
        self._claims = 0
        self._busy = False
        self._calls: list[Call] = []
        self._queue: deque[tuple[Call, int]] = deque()
        self._running: dict[str, Running] = {}
        self._numbers = itertools.count()

    @property
    def unfinished(self) -> int:
        """Jobs that have not ended."""
        return len(self._queue) + len(self._running)

    def run(self, jobs: Seq[Job], on_end: Callable[[int, Ended], None]) -> None:
        """Runs the jobs, with whatever else runs. ``on_end(index, ended)`` is called in this thread as each ends.

        Raises what vLLM raised, in every call that it concerns.
        """
        call = Call(jobs, threading.Condition(self._lock))
        left = len(jobs)
        with self._lock:
            if error := self.broken or self.unusable:
                raise error
            self._calls.append(call)
            self._queue.extend((call, index) for index in range(left))
        try:
            while left:
                for index, ended in self._wait(call):
                    on_end(index, ended)
                    left -= 1
        except BaseException:
            self._withdraw(call)
            raise
        finally:
            with self._lock:
                self._calls.remove(call)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Between two steps, with the engine to oneself."""
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

    def fail(self, error: Exception) -> None:
        """Ends every call with ``error``, and every later one until ``unusable`` is cleared.

        For the holder of ``exclusive``; jobs that vLLM still has are aborted.
        """
        with self._lock:
            self.unusable = error
            self._end_all(error)
            running = list(self._running)
            self._running.clear()
        self.engine.abort_request(running)

    def _wait(self, call: Call) -> list[tuple[int, Ended]]:
        """What has ended since the last time, at least one job. Steps the engine if nobody else does."""
        with self._lock:
            while not call.ended:
                if call.error:
                    raise call.error
                if self._busy or self._claims:
                    call.waiting = True
                    call.wake.wait()
                    call.waiting = False
                else:
                    self._drive(call)
            ended, call.ended = call.ended, []
            return ended

    def _drive(self, call: Call) -> None:
        """Steps until something of ``call`` has ended or someone claims the engine. Holds the lock between steps."""
        self._busy = True
        try:
            while not (call.ended or call.error or self._claims):
                self._admit()
                self._lock.release()
                try:
                    outputs = self.engine.step()
                finally:
                    self._lock.acquire()
                self._deliver(outputs)
        except BaseException as error:
            # The step may have lost samples of any call.
            cut_off = RuntimeError(f"a vLLM step was cut off: {error!r}")
            self.broken = error if isinstance(error, Exception) else cut_off
            self._end_all(self.broken)
            self._running.clear()
            raise
        finally:
            self._leave()

    def _admit(self) -> None:
        while self._queue and len(self._running) < self.slots:
            call, index = self._queue.popleft()
            name = str(next(self._numbers))
            job = call.jobs[index]
            try:
                self.engine.add_request(name, job.prompt, job.params)
            except ValueError as error:
                # vLLM refuses this one; the others are none the worse.
                self._end_with(call, error)
            else:
                self._running[name] = Running(call, index, self.version())

    def _deliver(self, outputs: Seq[Any]) -> None:
        for output in outputs:
            running = self._running.pop(output.request_id, None) if output.finished else None
            if running is not None:
                ended = Ended(output, running.version, self.version())
                running.call.ended.append((running.index, ended))
                running.call.wake.notify()

    def _end_all(self, error: Exception) -> None:
        for call in self._calls:
            self._end_with(call, error)
        self._queue.clear()

    def _end_with(self, call: Call, error: Exception) -> None:
        call.error = call.error or error
        call.wake.notify()

    def _withdraw(self, call: Call) -> None:
        """Takes a failed call's jobs out of the queue and out of vLLM."""
        with self._lock:
            self._queue = deque(entry for entry in self._queue if entry[0] is not call)
        with self.exclusive():
            with self._lock:
                names = [name for name, running in self._running.items() if running.call is call]
                for name in names:
                    del self._running[name]
            self.engine.abort_request(names)

    def _leave(self) -> None:
        """Gives the engine to the next one who waits for it."""
        self._busy = False
        if self._claims:
            self._claimed.notify()
        # Whoever has something to take away wakes without stepping, and may not come back.
        elif waiting := next((call for call in self._calls if call.waiting and not (call.ended or call.error)), None):
            waiting.wake.notify()
