"""Reward functions in a process of their own, which may crash, hang or end itself without taking the run along."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import IO, Any

from tandem.errors import RunFailure, UserError
from tandem.rewards.calling import Fault, Scores, Wants
from tandem.rewards.function import FunctionReward, reward_name
from tandem.rewards.serving import receive, send

WAITS_S = (1.0, 2.0, 4.0)
"""A call that raises is made again after each of these, in seconds: what it asks for may be back."""
END_S = 5.0
"""How long, in seconds, the process may take to end by itself."""
_FRAME = re.compile(r'File "(.+)", line (\d+) in ')

log = logging.getLogger(__name__)


class RewardProcess:
    """One process for the reward functions that ``sources`` name, begun at once: it imports while others load.

    A batch must be judged within ``deadline_s`` seconds, calls that raise and are made again included. What functions
    print goes where this process prints. They have nothing on standard input, and their process is gone, with all that
    it started, when this one is.
    """

    def __init__(self, sources: Seq[str], *, deadline_s: float, waits_s: Seq[float] | None = None) -> None:
        self.sources, self.deadline_s, self.waits_s = list(sources), deadline_s, tuple(waits_s or WAITS_S)
        self._connection, theirs = socket.socketpair()
        read, write = os.pipe()
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115
        passed = (theirs.fileno(), read, self._trace.fileno())
        code = f"import sys; sys.path[:] = {sys.path!r}; from tandem.rewards.serving import serve; serve(*{passed!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=passed,
            # A group of its own, which is killed as one. Ctrl-C is for this process.
            start_new_session=True,
        )
        theirs.close()
        os.close(read)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        printing = [
            threading.Thread(target=_print, args=(pipe, name), daemon=True)
            for pipe, name in ((self._process.stdout, "stdout"), (self._process.stderr, "stderr"))
        ]
        for thread in printing:
            thread.start()
        self._busy = threading.Event()
        self._busy.set()
        self._end = weakref.finalize(self, _end, self._process, self._connection, write, printing, self._busy)
        send(self._connection, self.sources)

    def rewards(self) -> list[FunctionReward]:
        """One for each source, named after its function, once they are imported.

        Raises UserError where one cannot be (``tandem.rewards.loading``), or ends its process or hangs as it is.
        """
        what = f"the import of {', '.join(self.sources)}"
        try:
            answer = self._exchange(self.deadline_s)
        except TimeoutError:
            raise UserError(f"{what} has not ended within {self.deadline_s:g} s{self._killed_at(None)}") from None
        except (EOFError, ConnectionError):
            raise UserError(f"{what} ended its process ({self._how()})") from None
        if isinstance(answer, str):
            raise UserError(answer)
        return [
            FunctionReward(RemoteFunction(self, i, wants, name), name=name, source=source, files=files)
            for i, (source, (wants, files)) in enumerate(zip(self.sources, answer, strict=True))
            for name in [reward_name(source)]
        ]

    def call(self, name: str, wants: Wants, message: tuple[Any, ...], end: float) -> Scores:
        """One call of a function, to be answered before ``end`` (``time.monotonic``). Raises Fault and RunFailure."""
        if not self._end.alive:
            raise RunFailure(f"reward {name!r}: its process has ended; go on with --resume")
        try:
            answer = self._exchange(max(0.001, end - time.monotonic()), message)
        except TimeoutError:
            raise RunFailure(
                f"reward {name!r} has not answered within {self.deadline_s:g} s (--reward-deadline)"
                f"{self._killed_at(wants.file)}; go on with --resume"
            ) from None
        except (EOFError, ConnectionError):
            raise RunFailure(
                f"reward {name!r} ended its process ({self._how()}{self._place(wants.file)}); go on with --resume"
            ) from None
        if isinstance(answer, dict):
            raise Fault(**answer)
        return answer

    def wait(self, seconds: float) -> None:
        """Before the next call; not longer than the process lives."""
        select.select([self._connection], [], [], seconds)

    def close(self) -> None:
        """Ends the process and all that it started; by force at once where a function is being called."""
        self._end()

    def _exchange(self, seconds: float, message: tuple[Any, ...] | None = None) -> Any:
        self._connection.settimeout(seconds)
        self._busy.set()
        if message is not None:
            send(self._connection, message)
        answer = receive(self._connection)
        self._busy.clear()
        return answer

    def _how(self) -> str:
        """What a process that has gone away died of."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self.close()
        code = self._process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _killed_at(self, file: str | None) -> str:
        """Ends a process that does not answer; where it was, in words."""
        # Its own handler of this one writes down where it is, whatever it is doing, and lets it die.
        self._process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self.close()
        return self._place(file)

    def _place(self, file: str | None) -> str:
        """The line of the function's file at which the process died, where that is known."""
        trace = os.pread(self._trace.fileno(), 1 << 20, 0).decode(errors="replace")
        here = trace.partition("Current thread")[2].partition("\n\n")[0]
        lines = [line for path, line in _FRAME.findall(here) if path == file]
        return f", at {Path(file).name}:{lines[0]}" if file and lines else ""


class RemoteFunction:
    """A reward function of the process (``tandem.rewards.function.Judging``)."""

    def __init__(self, process: RewardProcess, index: int, wants: Wants, name: str) -> None:
        self.process, self.index, self.wants, self.name = process, index, wants, name

    def __call__(self, arguments: Mapping[str, list[Any]], samples: int, seed: int | None = None) -> Scores:
        """A call that raises is made again a few times, each as if it were the first (with the same seed)."""
        message = (self.index, dict(arguments), samples, seed)
        end = time.monotonic() + self.process.deadline_s
        for again, wait_s in enumerate((*self.process.waits_s, math.inf), start=1):
            try:
                return self.process.call(self.name, self.wants, message, end)
            except Fault as fault:
                if not fault.raised:
                    raise
                if time.monotonic() + wait_s >= end:
                    fault.then += (
                        f"; it was called {again} times: mend it, or what it asks, and go on with --resume (a function "
                        "that was mended: --accept-changed reward)"
                    )
                    raise
                what = fault.what.partition(", last at")[0]
                log.warning("reward %r %s; it is called again in %g s", self.name, what, wait_s)
            self.process.wait(wait_s)
        raise AssertionError("unreachable: the last wait ends after the deadline")


def _end(
    process: subprocess.Popen[bytes],
    connection: socket.socket,
    lifeline: int,
    printing: Seq[threading.Thread],
    busy: threading.Event,
) -> None:
    """Lets a process that waits for a call end by itself, and kills it, and what it has left, after a while."""
    connection.close()
    if not busy.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        # The number is still the group's: a process of it waits for this one's end.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(lifeline)
    for thread in printing:
        thread.join(END_S)


def _print(pipe: IO[bytes], name: str) -> None:
    """Passes lines on to this process's own stream, as it is at that time: a live display puts another in its place."""
    for line in pipe:
        with contextlib.suppress(OSError, ValueError):  # closed, or read by nobody any more: what is left is dropped
            getattr(sys, name).write(line.decode(errors="replace"))
            getattr(sys, name).flush()
