"""How Ctrl-C and SIGTERM end a command: as an exception in the main thread, never in the middle of a save."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_S = 1.0
"""A second signal that comes this soon, in seconds, is the first one again: a terminal and a launcher both send it."""


class Stop:
    """The handler of both signals. The first raises in the main thread, or after ``held``; the next ends the process.

    Until something has begun that needs an orderly end, the first calls ``at_once``, if that is given: libraries that
    are interrupted as they are imported make anything of an exception. A process that was forked from this one has the
    handler too, and no command to stop: there a signal does what it does by default.
    """

    def __init__(self, at_once: Callable[[int], None] | None = None) -> None:
        self.pid = os.getpid()
        self.at_once = at_once
        self.signum: int | None = None
        """The signal that came, which says how the command has ended."""
        self.since = 0.0
        self.holding = 0
        self.waiting = False
        self.dropped = False
        """Whether the exception was raised where Python drops it, and is to be raised again."""

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        again = self.signum is not None and not self.dropped and time.monotonic() - self.since > SAME_S
        if os.getpid() != self.pid or again:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if self.signum is None:
            self.signum, self.since, self.waiting = signum, time.monotonic(), True
            if self.at_once is not None:
                self.at_once(signum)
        self.dropped = False
        if not self.holding:
            self.deliver()

    def swallowed(self, what: sys.UnraisableHookArgs) -> None:
        """In place of ``sys.unraisablehook``: raises anew what Python dropped, as it does in callbacks of its own."""
        if self.signum is None or not issubclass(what.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(what)
            return
        self.waiting = self.dropped = True
        # Not from here, which is a callback too.
        threading.Timer(0.01, os.kill, (self.pid, self.signum)).start()

    def deliver(self) -> None:
        """Raises what a signal that has come stands for, once."""
        if self.waiting:
            self.waiting = False
            # For both: libraries that are interrupted as they wait (Ray's) make such a one of whatever is raised.
            raise KeyboardInterrupt


@contextmanager
def stoppable(at_once: Callable[[int], None] | None = None) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the body, but for one that this process was started to ignore (as by nohup).

    Outside the main thread signals cannot be handled, and none are.
    """
    stop = Stop(at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handled = [signum for signum in STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, stop) for signum in handled}
    hook, sys.unraisablehook = sys.unraisablehook, stop.swallowed
    try:
        yield stop
    finally:
        sys.unraisablehook = hook
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def stopping() -> bool:
    """Within ``stoppable``: whether a signal has come that stops the command."""
    stop = _current()
    return stop is not None and stop.signum is not None


def _current() -> Stop | None:
    return next((h for h in map(signal.getsignal, STOPPING) if isinstance(h, Stop)), None)


@contextmanager
def held() -> Iterator[None]:
    """Within ``stoppable``: a signal that comes during the body stops the command when the body is done."""
    stop = _current()
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    stop.holding += 1
    try:
        yield
    finally:
        stop.holding -= 1
        if not stop.holding:
            stop.deliver()


def how_ended(code: int | None) -> str:
    """What ended a process with this exit code: the name of a signal, or the code."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
