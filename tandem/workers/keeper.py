"""A small process beside a large one: ends what is stopped, and when that one is gone, ends all that it has started.

``start_keeper`` starts this file as a program of its own, which imports the standard library only. A family is a
process, what it starts, and everything that was started with its mark in the environment, whoever its parent is by now.
A mark may be the beginning of others: that of a run is the beginning of its workers'.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "TANDEM_FAMILY"
"""The environment variable that a family's processes have in common."""
LOOK_EVERY_S = 1.0
STOPPED = ("T", "t")
YOUNG = 5
"""Looks after which a process is known for a stranger: one that has just been forked has its parent's environment."""
TRACKER_S = 5.0
"""For Python's resource trackers to remove shared memory before they are ended, too."""
SHARED_MEMORY = Path("/dev/shm")
PR_SET_PDEATHSIG = 1


def start_keeper(mark: str, patience_s: float) -> None:
    """Keeps this process and its family from now on, in a process that no signal to this one's group reaches."""
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark, str(patience_s)]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    # Returns at once: what stays is the child of the process started here.
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


def die_with(parent: int) -> None:
    """Has this process killed when the thread of ``parent`` that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # It died before the line above.
            os._exit(1)


def name_of(pid: int) -> str:
    """What a process calls itself: its title, or its program's file name; with its number."""
    words = command_line(pid).split()
    return f"{os.path.basename(words[0]) if words else 'process'} (pid {pid})"


def command_line(pid: int) -> str:
    """As a process was started, or the title that it has given itself; nothing where it is gone."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def parent_of(pid: int) -> int:
    """The number of a process's parent; 0 where it is gone."""
    return int((_stat(pid)[1:2] or ["0"])[0])


def state_of(pid: int) -> str:
    """A letter, as ``ps`` shows it: T is stopped by a signal, Z ended; nothing where it is gone."""
    return (_stat(pid)[:1] or [""])[0]


class Family:
    """The processes of a mark, as they are found in ``/proc``, and the shared memory that they have named."""

    def __init__(self, root: int, mark: str) -> None:
        self.root, self.mark = root, f"{MARK}={mark}".encode()
        self.members: dict[int, str] = {root: born_at(root)}
        """When each was started, by its number."""
        self.stopped: dict[int, int] = {}
        """How many looks in a row have found it stopped."""
        self.shared: set[str] = set()
        self._others: dict[int, int] = {}
        self._files: dict[str, int] = dict.fromkeys(_files(), YOUNG)

    @property
    def alive(self) -> list[int]:
        """Members that still run, the root among them."""
        return [pid for pid, start in self.members.items() if start and state_of(pid) != "Z" and born_at(pid) == start]

    def has(self, pid: int) -> bool:
        """Whether a process was started with the mark."""
        return any(variable.startswith(self.mark) for variable in _read(pid, "environ").split(b"\0"))

    def look(self) -> None:
        """Finds who and what is new, and who is stopped."""
        now = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._others = {pid: looks for pid, looks in self._others.items() if pid in now}
        for pid in now - self.members.keys():
            if self._others.get(pid, 0) < YOUNG:
                self._others[pid] = self._others.get(pid, 0) + 1
                # Some write their title over the environment that they were started with.
                if self.has(pid) or parent_of(pid) in self.members:
                    self.members[pid] = born_at(pid)
        for pid in self.alive:
            self.stopped[pid] = self.stopped.get(pid, 0) + 1 if state_of(pid) in STOPPED else 0
        self._look_at_files()

    def _look_at_files(self) -> None:
        names = _files()
        self._files = {name: looks for name, looks in self._files.items() if name in names}
        new = {name for name in names if self._files.get(name, 0) < YOUNG} - self.shared
        if not new:
            return
        # By their numbers: a semaphore is mapped before it gets its name.
        lines = [line for pid in self.alive for line in _read(pid, "maps").decode(errors="replace").splitlines()]
        mapped = {line.split()[4] for line in lines if f"{SHARED_MEMORY}/" in line}
        for name in new:
            self._files[name] = self._files.get(name, 0) + 1
            with suppress(FileNotFoundError):
                if str((SHARED_MEMORY / name).stat().st_ino) in mapped:
                    self.shared.add(name)

    def end(self) -> None:
        """Kills every member but the root, and removes the shared memory that they leave."""
        start = time.monotonic()
        while left := [pid for pid in self.alive if pid != self.root]:
            late = time.monotonic() > start + TRACKER_S
            for pid in left:
                if late or b"multiprocessing.resource_tracker" not in _read(pid, "cmdline"):
                    _kill(pid)
            time.sleep(0.05)
            self.look()
        for name in self.shared:
            (SHARED_MEMORY / name).unlink(missing_ok=True)


def keep(root: int, mark: str, patience_s: float) -> None:
    """The keeper's whole life.

    A member that is stopped for ``patience_s`` is killed, so that whoever waits for it is told. The root itself, too,
    if it is a member by its environment and not only their first: a driver may be stopped by whoever started it.
    """
    family = Family(root, mark)
    spared = set() if family.has(root) else {root}
    end = select.poll()
    end.register(os.pidfd_open(root), select.POLLIN)
    while not end.poll(LOOK_EVERY_S * 1000):
        family.look()
        if root in spared and state_of(root) in STOPPED:
            # Ctrl-Z stops a driver together with what Ray has started beside it.
            family.stopped.clear()
        for pid, looks in family.stopped.items():
            if pid not in spared and looks * LOOK_EVERY_S >= patience_s and pid in family.alive:
                print(
                    f"tandem: {name_of(pid)} has been stopped for {patience_s:.0f} s (by a signal) and is killed",
                    file=sys.stderr,
                    flush=True,
                )
                _kill(pid)
    family.look()
    family.end()


def born_at(pid: int) -> str:
    """When a process was started, in the kernel's ticks: with its number, what tells it from all others."""
    return (_stat(pid)[19:20] or [""])[0]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _files() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def _read(pid: int, what: str) -> bytes:
    """A file of a process; nothing where the process is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> list[str]:
    """State, parent and the rest; nothing where the process is gone."""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    os.setsid()
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    keep(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
