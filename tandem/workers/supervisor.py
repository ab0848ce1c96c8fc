"""The parent of a command that works with Ray: it outlives the command, and says what that has lost.

Ray's library ends the process it is in, with code 1 and without a word, where the raylet beside it is gone, and lets no
signal through where that is frozen. So whoever looks after them is another process, which has started nothing else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress

from tandem.errors import RunFailure
from tandem.signals import STOPPING
from tandem.workers.keeper import STOPPED, die_with, state_of

PIPE = "TANDEM_SUPERVISOR"
"""The environment variable with the number of the process that has a supervisor, and the descriptor to tell it by."""
LOOK_EVERY_S = 0.5


def supervise() -> int | None:
    """Forks: returns None in the new process, which goes on with the command, and the exit code here when that ends.

    Signals that stop a command are passed on; one that kills it kills this process as well. To be called while there
    is one thread only. Raises RunFailure, and ends the command, where a process that it stands on dies, or is stopped
    for as long as it said.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent = os.getpid()
    reports, theirs = os.pipe()
    # Until it is known whom they are for.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    command = os.fork()
    if command == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        die_with(parent)
        os.close(reports)
        os.environ[PIPE] = f"{os.getpid()}:{theirs}"
        return None
    os.close(theirs)
    for signum in STOPPING:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            # A terminal sends them to both; the command takes two at once for one (``tandem.signals``).
            signal.signal(signum, lambda number, frame: os.kill(command, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    watch = _Watch(command, reports)
    lost = watch.wait()
    if lost is not None:
        os.kill(command, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    if code == 1 and watch.processes:
        # It did not come to say that it was done: this is how Ray ends it.
        lost = "Ray's {} (pid {}) died".format(*next(iter(watch.processes.items())))
    if lost is not None:
        if sys.stderr.isatty():
            # The command may have been ended in the middle of a line.
            print(file=sys.stderr)
        raise RunFailure(f"cluster: {lost}, and no worker can be reached without it; go on with --resume")
    if code < 0:
        if -code in STOPPING:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(parent, -code)
    return code


def stand_on(processes: dict[str, int], heartbeat_s: float) -> None:
    """Tells the supervisor, where this process has one, by name and number what it cannot do without from now on."""
    pid, _, descriptor = os.environ.get(PIPE, "").partition(":")
    # Others have the variable only.
    if pid == str(os.getpid()):
        os.write(int(descriptor), json.dumps([processes, heartbeat_s]).encode() + b"\n")


class _Watch:
    """Waits for the end of a command, or of what it stands on."""

    def __init__(self, command: int, reports: int) -> None:
        self.reports = reports
        self.processes: dict[str, int] = {}
        """What the command stands on, by name; the raylet is the first."""
        self.heartbeat_s = 0.0
        self.handles: dict[int, int] = {}
        """For each of their numbers what can be read from once it has ended."""
        self.since: dict[int, float] = {}
        """When each that is stopped was first found so, on the monotonic clock."""
        self.command, self.handle = command, os.pidfd_open(command)
        self.poll = select.poll()
        self.poll.register(self.handle, select.POLLIN)
        os.set_blocking(reports, False)

    def wait(self) -> str | None:
        """Returns when the command has ended; or when what it stands on has, with the words for that."""
        while True:
            ready = {descriptor for descriptor, _ in self.poll.poll(LOOK_EVERY_S * 1000)}
            # After the look: the command says so before it ends what it stands on.
            self.hear()
            # What it has started dies with its first thread, and it counts as ended with its last.
            if self.handle in ready or state_of(self.command) == "Z":
                return None
            for name, pid in self.processes.items():
                if pid not in self.handles or self.handles[pid] in ready:
                    return f"Ray's {name} (pid {pid}) died"
                if state_of(pid) not in STOPPED:
                    self.since.pop(pid, None)
                elif time.monotonic() - self.since.setdefault(pid, time.monotonic()) > self.heartbeat_s:
                    return f"Ray's {name} (pid {pid}) has been stopped for {self.heartbeat_s:.0f} s"

    def hear(self) -> None:
        """Takes the last of what the command has said: each time it says all."""
        try:
            said = os.read(self.reports, select.PIPE_BUF)
        except BlockingIOError:
            return
        for line in said.splitlines()[-1:]:
            self.processes, self.heartbeat_s = json.loads(line)
        for pid in self.processes.values():
            if pid not in self.handles:
                with suppress(ProcessLookupError):
                    self.handles[pid] = os.pidfd_open(pid)
                    self.poll.register(self.handles[pid], select.POLLIN)
