"""Reward functions in processes of their own, which may crash, hang or end without taking the run along."""

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
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import IO, Any

from tandem.errors import RunFailure, UserError
from tandem.futures import Begun
from tandem.rewards.calling import Fault, Setting, Wants
from tandem.rewards.function import FunctionReward, added_up
from tandem.rewards.kinds import reward_name
from tandem.rewards.serving import CHUNK, packed, unpacked
from tandem.signals import how_ended
from tandem.types import Judgement

WAITS_S = (1.0, 2.0, 4.0)
"""A call that raises is made again after each of these, in seconds: what it asks for may be back."""
END_S = 5.0
"""How long, in seconds, a process may take to end by itself."""
AHEAD = 4
"""Calls that one of several processes of a function is given at a time: a slow one holds up 3 others at most."""
MOST = 8
"""A function that judges samples or groups gets a process for every second core, 8 at most, unless told otherwise."""
_FRAME = re.compile(r'File "(.+)", line (\d+) in ')

log = logging.getLogger(__name__)


class RewardProcesses:
    """Processes for the reward functions that ``sources`` name, begun at once: they import while others load.

    Each function has its own, so that none waits for another; one that judges a sample or a group at a time, and is
    not ``async``, has ``processes`` (None: ``MOST``). A call must be answered within ``deadline_s`` seconds from when
    its process comes to it, calls that raise and are made again included. What functions print goes where this process
    prints. They have nothing on standard input, and their processes are gone, with all that they started, when this
    one is.

    Nothing here runs by itself but the passing on of what is printed: calls go out and answers come in whenever one
    of the calls is asked whether it is done.
    """

    def __init__(
        self,
        sources: Seq[str],
        *,
        deadline_s: float,
        processes: int | None = None,
        waits_s: Seq[float] | None = None,
        folder: str = "",
    ) -> None:
        self.deadline_s, self.waits_s = deadline_s, tuple(waits_s or WAITS_S)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.given = processes is not None
        self.processes = processes or max(1, min(MOST, cores // 2))
        self.setting = Setting(deadline_s=deadline_s, folder=folder)
        lifeline, self._end_of_ours = os.pipe()
        self._passed: list[int] = [lifeline]
        printing = []
        for name in ("stdout", "stderr"):
            read, write = os.pipe()
            self._passed.append(write)
            printing.append(threading.Thread(target=_print, args=(os.fdopen(read, "rb"), name), daemon=True))
            printing[-1].start()
        self._workers: list[Worker] = []
        self._end = weakref.finalize(self, _end_all, self._workers, self._passed, self._end_of_ours, printing)
        self.functions = [RemoteFunction(self, source) for source in sources]

    def rewards(self) -> list[FunctionReward]:
        """One for each source, named after its function, once they are imported.

        Says so where a number of processes was given that none of them takes. Raises UserError where one cannot be
        imported (``tandem.rewards.loading``), or ends its process or hangs as it is.
        """
        found = [function.reward() for function in self.functions]
        if self.given and not any(function.divided for function in self.functions):
            log.warning("reward_processes: has no effect, since no --reward here judges a sample or a group at a time")
        return found

    def start(self, function: RemoteFunction) -> Worker:
        """Another process for a function, which imports it."""
        worker = Worker(function, self.setting, self._passed)
        self._workers.append(worker)
        return worker

    def turn(self, call: Call, *, wait: bool) -> None:
        """Sends what can be sent and takes what has come, whosever it is; waits for that if the call is not settled."""
        now = time.monotonic()
        dues = [due for function in self.functions if (due := function.dispatch(now)) is not None]
        working = [worker for worker in self._workers if worker.calls]
        dues += [worker.limit(self.deadline_s) for worker in working]
        poll = select.poll()
        for worker in working:
            poll.register(worker.connection, select.POLLIN | (select.POLLOUT if worker.outgoing else 0))
        wait_s = max(0.0, min(dues, default=now) - now) if wait and not call.settled else 0.0
        # Rounded up, so that what is waited for is then due.
        ready = {fd for fd, _ in poll.poll(math.ceil(min(wait_s, 3600.0) * 1000))}
        for worker in working:
            if worker.connection.fileno() in ready:
                worker.exchange()
        now = time.monotonic()
        for worker in working:
            if worker.calls and worker.limit(self.deadline_s) <= now:
                worker.kill(self.deadline_s)

    def close(self) -> None:
        """Ends the processes and all that they started; by force at once where a function is being called."""
        self._end()


class Call:
    """A call on its way to a process, or the import before the first (``tandem.futures.Begun``)."""

    def __init__(
        self, function: RemoteFunction, message: Any, in_words: Callable[[Fault], Exception] = lambda fault: fault
    ) -> None:
        self.function, self.message, self.in_words = function, message, in_words
        self.settled = False
        self.tries = 0
        self.counts: dict[str, int] = {}
        """What the function has counted in all its tries."""
        self.sent = 0.0
        self.began: float | None = None
        """When its first try began, where there has been one."""
        self.answer: Any = None
        self.error: Exception | None = None

    def done(self) -> bool:
        self.look()
        return self.settled

    def look(self, *, wait: bool = False) -> None:
        """See ``tandem.futures.Begun``."""
        if not self.settled:
            self.function.owner.turn(self, wait=wait)

    def result(self) -> Any:
        while not self.settled:
            self.look(wait=True)
        if self.error is not None:
            raise self.error
        return self.answer

    def settle(self, answer: Any = None, error: Exception | None = None) -> None:
        self.answer, self.error, self.settled = answer, error, True


class RemoteFunction:
    """A reward function in processes of its own (``tandem.rewards.function.JudgingFunction``)."""

    def __init__(self, owner: RewardProcesses, source: str) -> None:
        self.owner, self.source, self.name = owner, source, reward_name(source)
        self.wants: Wants
        self._waiting: deque[Call] = deque()
        self._again: list[tuple[float, Call]] = []
        """Calls that have raised, and when each is due again."""
        self._workers = [owner.start(self)]
        self._hello = self._workers[0].hello

    def reward(self) -> FunctionReward:
        """See ``RewardProcesses.rewards``."""
        answer = self._hello.result()
        if isinstance(answer, str):
            raise UserError(answer)
        self.wants, files, version = answer
        if self.divided:
            self._workers += [self.owner.start(self) for _ in range(self.owner.processes - 1)]
        return FunctionReward(self, name=self.name, source=self.source, files=files, version=version)

    @property
    def divided(self) -> bool:
        """Whether its calls are divided over several processes."""
        return self.wants.per != "all" and not self.wants.awaits

    def begin(
        self, arguments: Mapping[str, Any], samples: int, seed: int | None, in_words: Callable[[Fault], Exception]
    ) -> Begun[Judgement]:
        """A call that raises is made again a few times, each as if it were the first (with the same seed)."""
        call = Call(self, (dict(arguments), samples, seed), in_words)
        self._waiting.append(call)
        return call

    def dispatch(self, now: float) -> float | None:
        """Gives calls to the processes that have fewest. When the next one is due again, if any is."""
        self._waiting += [call for due, call in self._again if due <= now]
        self._again = [(due, call) for due, call in self._again if due > now]
        while self._waiting:
            alive = [worker for worker in self._workers if worker.alive]
            if not alive:
                self._waiting.popleft().settle(
                    error=RunFailure(f"reward {self.name!r}: its process has ended; go on with --resume")
                )
                continue
            worker = min(alive, key=lambda worker: worker.load)
            if len(self._workers) > 1 and worker.load >= AHEAD:
                break
            worker.give(self._waiting.popleft())
        return min((due for due, _ in self._again), default=None)

    def take(self, call: Call, began: float, answer: Any) -> None:
        """What a process has answered to a call that it came to at ``began``."""
        if call.message is None:
            call.settle(answer)
            return
        found, counts = answer
        call.counts = added_up((dict.fromkeys(self.wants.counts, 0), call.counts, counts))
        if not isinstance(found, dict):
            call.settle(Judgement(found, call.counts))
            return
        fault = Fault(**found)
        call.tries += 1
        call.began = began if call.began is None else call.began
        waits = self.owner.waits_s
        wait_s = waits[call.tries - 1] if call.tries <= len(waits) else math.inf
        now = time.monotonic()
        if not fault.raised or fault.final:
            call.settle(error=call.in_words(fault))
        elif now + wait_s >= call.began + self.owner.deadline_s:
            fault.then += (
                f"; it was called {call.tries} times: mend it, or what it asks, and go on with --resume (a function "
                "that was mended: --accept-changed reward)"
            )
            call.settle(error=call.in_words(fault))
        else:
            what = fault.what.partition(", last at")[0]
            log.warning("reward %r %s; it is called again in %g s", self.name, what, wait_s)
            self._again.append((now + wait_s, call))


class Worker:
    """One process with one function: what goes to it, and what comes from it, without waiting for either."""

    def __init__(self, function: RemoteFunction, setting: Setting, passed: Seq[int]) -> None:
        self.hello = Call(function, None)
        self.calls: dict[int, Call] = {0: self.hello}
        """Calls that it has not answered, in the order in which they were given; 0 is the import."""
        self.outgoing: deque[memoryview] = deque()
        self.alive = True
        self._given = 0
        self._incoming = bytearray()
        self._free = time.monotonic()
        """When it last answered: it came to the next call then."""
        self.connection, theirs = socket.socketpair()
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115
        lifeline, stdout, stderr = passed
        handed = (theirs.fileno(), lifeline, self._trace.fileno())
        code = f"import sys; sys.path[:] = {sys.path!r}; from tandem.rewards.serving import serve; serve(*{handed!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=handed,
            # A group of its own, which is killed as one. Ctrl-C is for this process.
            start_new_session=True,
        )
        theirs.close()
        self.connection.setblocking(False)
        self.hello.sent = time.monotonic()
        self.outgoing.append(memoryview(packed((function.source, setting))))
        self.exchange()

    @property
    def load(self) -> int:
        """Calls that it has not answered, the import aside."""
        return len(self.calls) - (0 in self.calls)

    def give(self, call: Call) -> None:
        """Sends as much of a call as goes now."""
        self._given += 1
        self.calls[self._given] = call
        call.sent = time.monotonic()
        self.outgoing.append(memoryview(packed((self._given, *call.message))))
        self.exchange()

    def exchange(self) -> None:
        """Sends and takes what goes without waiting. Where the process has ended, its calls end with how it did."""
        gone = False
        try:
            with contextlib.suppress(BlockingIOError):
                while part := self.connection.recv(CHUNK):
                    self._incoming += part
                raise EOFError
            with contextlib.suppress(BlockingIOError):
                while self.outgoing:
                    sent = self.connection.send(self.outgoing[0])
                    rest = self.outgoing.popleft()[sent:]
                    if rest:
                        self.outgoing.appendleft(rest)
        except (EOFError, ConnectionError):
            gone = True
        self._take()
        if gone:
            self._fail(self._how())

    def limit(self, deadline_s: float) -> float:
        """When the call that was given first must have been answered."""
        head = next(iter(self.calls.values()))
        patient = head.message is not None and head.function.wants.patient
        return self._began(head) + deadline_s + (END_S if patient else 0.0)

    def kill(self, deadline_s: float) -> None:
        """Ends a process that does not answer, and its calls with where it was."""
        # Its own handler of this one writes down where it is, whatever it is doing, and lets it die.
        self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.end()
        self._fail(None, deadline_s)

    def end(self) -> None:
        """Lets a process that waits for a call end by itself, and kills it, and what it has left, after a while."""
        if not self.alive:
            return
        self.alive = False
        self.connection.close()
        if not self.calls:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            # The number is still the group's: a process of it waits for this one's end.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _began(self, call: Call) -> float:
        """When the process came to a call, as far as can be told from here; to its first try, if there was one."""
        if call.began is not None:
            return call.began
        wants = call.function.wants if call.message is not None else None
        # One that keeps to the deadline by itself may let calls wait for others.
        side_by_side = wants is not None and wants.awaits and not wants.patient
        return call.sent if side_by_side else max(call.sent, self._free)

    def _take(self) -> None:
        for number, answer in unpacked(self._incoming):
            call = self.calls.pop(number)
            began = self._began(call)
            self._free = time.monotonic()
            call.function.take(call, began, answer)

    def _fail(self, how: str | None, deadline_s: float = 0.0) -> None:
        calls, self.calls = self.calls, {}
        for number, call in calls.items():
            file = None if number == 0 else call.function.wants.file
            place, name = self._place(file), call.function.name
            what = f"the import of {call.function.source}"
            error: Exception
            if number == 0:
                late = f"has not ended within {deadline_s:g} s" if how is None else f"ended its process ({how})"
                error = UserError(f"{what} {late}")
            elif how is None:
                error = RunFailure(
                    f"reward {name!r} has not answered within {deadline_s:g} s (--reward-deadline){place}; go on with "
                    "--resume"
                )
            else:
                error = RunFailure(f"reward {name!r} ended its process ({how}{place}); go on with --resume")
            call.settle(error=error)

    def _how(self) -> str:
        """What a process that has gone away died of."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.end()
        return how_ended(self.process.returncode)

    def _place(self, file: str | None) -> str:
        """The line of the function's file at which the process died, where that is known."""
        trace = os.pread(self._trace.fileno(), 1 << 20, 0).decode(errors="replace")
        here = trace.partition("Current thread")[2].partition("\n\n")[0]
        lines = [line for path, line in _FRAME.findall(here) if path == file]
        return f", at {Path(file).name}:{lines[0]}" if file and lines else ""


def _end_all(workers: Seq[Worker], passed: Seq[int], end_of_ours: int, printing: Seq[threading.Thread]) -> None:
    for worker in workers:
        worker.connection.close()  # all see it before any is waited for
    for worker in workers:
        worker.end()
    for descriptor in (*passed, end_of_ours):
        os.close(descriptor)
    for thread in printing:
        thread.join(END_S)


def _print(pipe: IO[bytes], name: str) -> None:
    """Passes lines on to this process's own stream, as it is at that time: a live display puts another in its place."""
    for line in pipe:
        with contextlib.suppress(OSError, ValueError):  # closed, or read by nobody any more: what is left is dropped
            getattr(sys, name).write(line.decode(errors="replace"))
            getattr(sys, name).flush()
