"""An engine as its process has it: begun with a call, told of with another, so that nobody waits in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Seq
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

from tandem.errors import Cancelled, UserError
from tandem.futures import Future
from tandem.roles import Engine, FedEngine, SharingEngine
from tandem.types import Completion, Ended, Request
from tandem.workers.process import Failure, Site

LINGER_S = 0.1
"""Samples that have ended are told of together, those of 0.1 s, unless as many requests ended as are waited for."""
Named = tuple[int, int, Completion]
"""A sample that has ended: the name of its request, its place there, the sample."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What has become of requests since this was last asked."""

    ended: list[Named]
    failed: list[tuple[int, Failure]]
    """Requests of calls that have failed."""
    running: int
    """Samples that it has begun, where it may not begin others (``ServedEngine.hold``)."""
    busy_seconds: float
    sampled_tokens: int


class ServedEngine:
    """``engine`` for a driver in another process (``tandem.workers.engines``), which has a name for each request.

    ``alone``: the process is there for the engine, and takes several calls at a time. A thread samples whenever there
    is anything to sample, whoever asks. Otherwise others have the process too, with one call at a time: it samples in
    ``take``, for as long as that may last, and what is unfinished stays.
    """

    def __init__(self, engine: Engine, *, alone: bool) -> None:
        self.engine, self.alone = engine, alone
        self._changed = threading.Condition()
        self._ended: list[Named] = []
        self._open: dict[int, Future[list[Completion]]] = {}
        self._left: dict[int, int] = {}
        """Samples of each request that have not ended."""
        self._whole = 0
        """Requests that have ended and were not taken."""
        self._wanted = 0
        """With how many of them whoever takes them is woken; 0: with any sample."""
        self._unwanted: set[int] = set()
        """Requests that were given up and may still be sampled."""
        self._begun = self._closed = False
        self.held: FedEngine | None = None
        """The engine, while it may begin no samples."""
        if alone:
            # In the context of its making, where the stages of a start are counted.
            run = copy_context().run
            threading.Thread(target=run, args=(self._sample,), name="sampling", daemon=True).start()

    def begin(self, requests: Seq[tuple[int, Request]]) -> None:
        """Begins requests, together. Raises UserError where one cannot be sampled, and has begun none then."""
        names = [name for name, _ in requests]
        with self._changed:
            self._left |= {name: len(request.seeds) for name, request in requests}
        try:
            futures = self.engine.submit([request for _, request in requests], partial(self._hear, names))
        except UserError:
            with self._changed:
                for name in names:
                    del self._left[name]
            raise
        with self._changed:
            self._open |= zip(names, futures, strict=True)
            self._begun = True
            self._changed.notify_all()

    def take(self, at_least: int, seconds: float) -> Heard:
        """What has ended and was not taken yet: once ``at_least`` requests have ended, after so many seconds at the
        latest. Where it is ``alone``, with any sample that has ended, after 0.1 s."""
        if self.alone:
            with self._changed:
                self._wanted = at_least
                if not self._changed.wait_for(lambda: self._whole >= at_least, LINGER_S):
                    self._wanted = 0
                    self._changed.wait_for(lambda: self._ended, seconds)
        else:
            end, futures = time.monotonic() + seconds, list(self._open.values())
            self._sharing.sample(
                lambda: self._stops() or time.monotonic() >= end or sum(f.done() for f in futures) >= at_least
            )  # fmt: skip
        with self._changed:
            # In this order: what is done has been heard of before.
            failed = self._failed()
            ended, self._ended, self._whole = self._ended, [], 0
        return Heard(
            ended=ended,
            failed=failed,
            running=self.held.running if self.held is not None else 0,
            busy_seconds=self.engine.busy_seconds,
            sampled_tokens=self.engine.sampled_tokens,
        )

    def give_way(self) -> None:
        """The last slice for now is over: others are going to compute here."""
        self._sharing.give_way()

    @property
    def _sharing(self) -> SharingEngine:
        assert isinstance(self.engine, SharingEngine)
        return self.engine

    def hold(self, held: bool) -> int:
        """Has it begin no samples, or any again. Returns how many it has begun.

        For an engine with weights of its own, which are to change when none runs.
        """
        engine = self.engine
        assert isinstance(engine, FedEngine)
        engine.hold(held)
        with self._changed:
            self.held = engine if held else None
            self._begun = True
            self._changed.notify_all()
        return engine.running

    def give_up(self, names: Seq[int]) -> None:
        """Nobody wants these requests any more, nor any that were begun with them: they end after the next step."""
        with self._changed:
            for name in names:
                future = self._open.pop(name, None)
                if future is not None and not future.done():
                    self._unwanted.add(name)
                self._left.pop(name, None)
            self._ended = [told for told in self._ended if told[0] not in names]

    def cancel(self) -> None:
        """Gives up all that was begun, and all that was not taken."""
        self.engine.cancel()
        with self._changed:
            self._open.clear()
            self._left.clear()
            self._unwanted.clear()
            self._ended.clear()
            self._whole = 0

    def close(self) -> None:
        """Ends the thread that samples, after the step that is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _hear(self, names: Seq[int], ended: Seq[Ended]) -> None:
        if self._unwanted:
            with self._changed:
                if unwanted := self._unwanted.intersection(names):
                    self._unwanted -= unwanted
                    raise Cancelled("what was being sampled was given up")
        if ended:
            with self._changed:
                for number, sample, completion in ended:
                    name = names[number]
                    self._ended.append((name, sample, completion))
                    if (left := self._left.pop(name, 1) - 1) > 0:
                        self._left[name] = left
                    else:
                        self._whole += 1
                if self._whole >= self._wanted:
                    self._changed.notify_all()

    def _failed(self) -> list[tuple[int, Failure]]:
        """Forgets what is done; of that, what has failed. Raises an error that is nobody's fault."""
        failed = []
        for name in [name for name, future in self._open.items() if future.done()]:
            try:
                self._open.pop(name).result()
            except UserError as error:
                failed.append((name, Failure.of(error)))
        return failed

    def _stops(self) -> bool:
        """Whether there is nothing more to sample for now."""
        return self._closed or (self.held is not None and not self.held.running)

    def _sample(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._begun or self._closed)
                self._begun = False
                if self._closed:
                    return
            # An error of the engine is that of everything that was begun.
            with suppress(Exception):
                self.engine.wait(self._stops)


def serve(site: Site, alone: bool) -> ServedEngine:
    """Beside the engine of a process."""
    return ServedEngine(site.roles["engine"], alone=alone)
