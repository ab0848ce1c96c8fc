"""A worker process started from this one, without Ray: called over a pipe, watched, and gone when this one is."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

from tandem.errors import RunFailure, UserError, WorkerDied
from tandem.workers.group import LOAD_DEADLINE_S, START_DEADLINE_S, WorkerFailed
from tandem.workers.keeper import MARK, die_with, start_keeper
from tandem.workers.process import Build, Where, WorkerProcess, raise_failure

CLOSE_DEADLINE_S = 20.0
HEARTBEAT_S = 30.0
"""It is killed once it has been stopped for so long."""
TAIL_LINES = 15
TAIL_BYTES = 16384
RANK_VARIABLES = frozenset(
    (
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "NODE_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
)
"""What torchrun tells a process about its own world, which is not the child's."""


class Child:
    """One process with roles in it (``tandem.workers.process.WorkerProcess``), on this machine.

    ``gpu`` is the UUID of the only GPU that it sees; None runs it on the CPU. ``name`` is how errors call it. A call
    that takes longer than ``deadline_s``, or whose process dies, ends with an error that says so and shows the end of
    what the process wrote. Calls from several threads go one after another.
    """

    def __init__(self, name: str, *, gpu: str | None = None, deadline_s: float = 1800.0) -> None:
        self.name, self.deadline_s = name, deadline_s
        self.lock = threading.Lock()
        self.calls = 0
        self.answered = 0
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.pipe, theirs = Pipe()
        self.ended, ended = Pipe(duplex=False)
        born: list[subprocess.Popen[bytes] | BaseException] = []
        started = threading.Event()
        # Linux ends the child when the thread that started it ends: so that is a thread which lives as long.
        self.keeper = threading.Thread(
            target=self._keep, args=(theirs, ended, gpu, born, started), name=f"keeper of {name}", daemon=True
        )
        self.keeper.start()
        started.wait()
        theirs.close()
        if isinstance(born[0], BaseException):
            raise born[0]
        self.process: subprocess.Popen[bytes] = born[0]
        try:
            self.where: Where = self._ask("start", "where", (), START_DEADLINE_S)
        except BaseException:
            self.close()
            raise

    def place(self, role: str, build: Build) -> None:
        """Builds a role there. ``build`` is pickled: a function of a module that can be imported there."""
        self._ask(f"loading {role}", "place", (role, build), LOAD_DEADLINE_S)

    def call(self, role: str, method: str, *arguments: Any, **options: Any) -> Any:
        """A role's method, or its attribute where that is no method. Returns what that returned."""
        return self._ask(f"{role}.{method}", "call", (role, method, arguments, options, False), self.deadline_s)

    def end(self, role: str) -> ChildEnd:
        """The role as one side of a push."""
        return ChildEnd(self, role)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def closed(self) -> bool:
        return self.pipe.closed

    def died(self, what: str) -> WorkerDied:
        """The error that says how it ended."""
        self.keeper.join()
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerDied(f"{self._who} died in {what} ({how}){self._tail()}")

    def close(self) -> None:
        """Ends the roles and the process, by force where it does not answer."""
        # One that is still at an earlier call would answer after that only.
        if self.alive and self.answered == self.calls:
            with suppress(UserError, WorkerFailed, OSError):
                self._ask("close", "close", (), CLOSE_DEADLINE_S)
            self.pipe.close()
            self.keeper.join(CLOSE_DEADLINE_S)
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.keeper.join()
        self.pipe.close()
        self.output.close()

    def _keep(
        self,
        theirs: Connection,
        ended: Connection,
        gpu: str | None,
        born: list[subprocess.Popen[bytes] | BaseException],
        started: threading.Event,
    ) -> None:
        try:
            born.append(self._start(theirs, gpu))
        except BaseException as error:
            born.append(error)
        started.set()
        if isinstance(born[0], subprocess.Popen):
            born[0].wait()
        # Said, and not left to the pipe's closing: whoever was forked meanwhile may hold its other end open.
        ended.send_bytes(b"ended")

    def _start(self, theirs: Connection, gpu: str | None) -> subprocess.Popen[bytes]:
        device = "cpu" if gpu is None else "cuda"
        code = f"from tandem.workers.child import serve; serve({theirs.fileno()}, {os.getpid()}, {device!r})"
        return subprocess.Popen(
            # -P: the current folder is searched only where it is for this process.
            [sys.executable, "-P", "-c", code],
            env=clean_environment(gpu) | {MARK: secrets.token_hex(8)},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            # Ctrl-C is for this process, which ends the child in its own time.
            start_new_session=True,
        )

    def _ask(self, what: str, method: str, arguments: tuple[Any, ...], deadline_s: float) -> Any:
        with self.lock:
            if self.pipe.closed:
                raise UserError(f"{what}: {self.name} is closed; start another one")
            self.calls += 1
            try:
                self.pipe.send_bytes(pickle.dumps((self.calls, method, arguments)))
                ok, result = self._answer(what, self.calls, time.monotonic() + deadline_s, deadline_s)
            except (EOFError, ConnectionError):
                raise self.died(what) from None
        if not ok:
            raise WorkerFailed(f"{self._who} failed in {what}: {result.strip().splitlines()[-1]}\n{result}")
        return raise_failure(result, self._who)

    def _answer(self, what: str, call: int, end: float, deadline_s: float) -> tuple[bool, Any]:
        """The answer to a call. Answers to earlier ones, whose wait was given up, are passed over."""
        while True:
            ready = wait([self.pipe, self.ended], max(0.0, end - time.monotonic()))
            if not ready:
                raise RunFailure(f"{what}: no answer within {deadline_s:.0f} s from {self._who}{self._tail()}")
            if self.pipe not in ready:
                raise self.died(what)
            number, ok, result = pickle.loads(self.pipe.recv_bytes())
            if number == call:
                self.answered = call
                return ok, result

    @property
    def _who(self) -> str:
        return f"{self.name} (pid {self.process.pid})"

    def _tail(self) -> str:
        size = os.fstat(self.output.fileno()).st_size
        # pread leaves the place alone at which the child writes.
        text = os.pread(self.output.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]
        return "; its output ends:\n  " + "\n  ".join(lines) if lines else "; it wrote nothing"


@dataclass(frozen=True)
class ChildEnd:
    """A role of a child as one side of a push (``tandem.sync.push.End``)."""

    child: Child
    role: str

    @property
    def places(self) -> Seq[tuple[str, str | None]]:
        where = self.child.where
        return [(where.node, where.gpus[0] if where.gpus else None)]

    def each(self, method: str, arguments: Seq[tuple[Any, ...]]) -> list[Any]:
        return [self.child.call(self.role, method, *own) for own in arguments]

    def call(self, method: str, *arguments: Any) -> Any:
        return self.child.call(self.role, method, *arguments)


def clean_environment(gpu: str | None) -> dict[str, str]:
    """This process's environment without the world that it may be a rank of, and with its imports."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    kept["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    if gpu is not None:
        kept["CUDA_VISIBLE_DEVICES"] = f"GPU-{gpu}"
    return kept


def serve(pipe_fd: int, parent: int, device: str) -> NoReturn:
    """The child's whole life: answers calls until the pipe closes."""
    die_with(parent)
    os.set_inheritable(pipe_fd, False)
    start_keeper(os.environ[MARK], HEARTBEAT_S)
    pipe = Connection(pipe_fd)
    worker = WorkerProcess(0, 1, device)
    while True:
        try:
            number, method, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            break
        try:
            answer = pickle.dumps((number, True, getattr(worker, method)(*arguments)))
        except Exception:
            answer = pickle.dumps((number, False, traceback.format_exc()))
        with suppress(ConnectionError):
            pipe.send_bytes(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' threads and exit handlers have nothing left to do, and some of them never end.
    os._exit(0)
