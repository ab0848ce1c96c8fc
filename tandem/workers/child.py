"""A worker process started from this one, without Ray: called over a pipe, watched, and gone when this one is."""

from __future__ import annotations

import concurrent.futures
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

from tandem.errors import UserError, WorkerDied, WorkerFailure
from tandem.futures import Future
from tandem.roles import Device, Seat
from tandem.signals import how_ended
from tandem.workers.group import LOAD_DEADLINE_S, START_DEADLINE_S, WorkerFailed
from tandem.workers.keeper import MARK, die_with, start_keeper
from tandem.workers.process import Build, Where, WorkerProcess, ending, raise_failure

CLOSE_DEADLINE_S = 20.0
HEARTBEAT_S = 30.0
"""A child is killed once it has been stopped for 30 s."""
TAIL_BYTES = 16384
RANK_VARIABLES = frozenset(
    f"{of}{what}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")
) | {"NODE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}
"""What torchrun tells a process about its own world, which is not the child's."""


class Child:
    """One process of this machine as a home for roles (``tandem.roles.Home``), which it takes calls to in order.

    ``gpu`` is the UUID of the only GPU that it sees; None runs it on the CPU. ``name`` is how errors call it. A wait
    for an answer that takes longer than ``deadline_s``, or whose process dies, ends with an error that says so and
    shows the end of what the process wrote.
    """

    at_once = False

    def __init__(self, name: str, *, gpu: str | None = None, deadline_s: float = 1800.0) -> None:
        self.name, self.deadline_s = name, deadline_s
        self.calls = 0
        self.open: dict[int, _Answer] = {}
        """Calls that it has not answered, by number."""
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.pipe, theirs = Pipe()
        self.ended, ended = Pipe(duplex=False)
        born: concurrent.futures.Future[subprocess.Popen[bytes]] = concurrent.futures.Future()
        # Linux ends the child when the thread that started it ends: so that is a thread which lives as long.
        self.keeper = threading.Thread(
            target=self._keep, args=(theirs, ended, gpu, born), name=f"keeper of {name}", daemon=True
        )
        self.keeper.start()
        try:
            self.process = born.result()
        finally:
            theirs.close()
        try:
            self.where: Where = self._begin("start", "where", (), START_DEADLINE_S).result()
        except BaseException:
            self.close()
            raise

    @property
    def devices(self) -> Seq[Device]:
        return [(self.where.node, self.where.gpus[0] if self.where.gpus else None)]

    def place(self, role: str, build: Build) -> Seat:
        """Builds a role there. ``build`` is pickled: a function of a module that can be imported there."""
        self._begin(f"loading {role}", "place", (role, build), LOAD_DEADLINE_S).result()
        return Seat(self, role)

    def submit(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Future[Any]:
        """See ``tandem.roles.Home``."""
        return self._begin(f"{role}.{verb}", "call", (role, verb, arguments, False), self.deadline_s)

    def submit_each(self, role: str, verb: str, arguments: Seq[tuple[Any, ...]]) -> Future[list[Any]]:
        """See ``tandem.roles.Home``."""
        (own,) = arguments
        return self._begin(f"{role}.{verb}", "call", (role, verb, own, False), self.deadline_s, each=True)

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
        how = f"killed by {how_ended(code)}" if code < 0 else how_ended(code)
        return WorkerDied(f"{self._who} died in {what} ({how}){self._tail()}")

    def close(self) -> None:
        """Ends the roles and the process, by force where it does not answer."""
        # One that is still at an earlier call would answer after that only.
        if self.alive and not self.open:
            with suppress(UserError, WorkerFailed, OSError):
                self._begin("close", "close", (), CLOSE_DEADLINE_S).result()
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
        born: concurrent.futures.Future[subprocess.Popen[bytes]],
    ) -> None:
        try:
            process = self._start(theirs, gpu)
        except BaseException as error:
            born.set_exception(error)
            return
        born.set_result(process)
        process.wait()
        # Said, and not left to the pipe's closing: whoever was forked meanwhile may hold its other end open.
        ended.send_bytes(b"ended")

    def _start(self, theirs: Connection, gpu: str | None) -> subprocess.Popen[bytes]:
        device = "cpu" if gpu is None else "cuda"
        # The collector first: what follows imports torch, and vLLM's child much more.
        code = (
            "from tandem.collector import collect_rarely; collect_rarely(); "
            f"from tandem.workers.child import serve; serve({theirs.fileno()}, {os.getpid()}, {device!r})"
        )
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

    def _begin(
        self, what: str, method: str, arguments: tuple[Any, ...], deadline_s: float, *, each: bool = False
    ) -> _Answer:
        self._require_open(what)
        self.calls += 1
        answer = self.open[self.calls] = _Answer(self, what, deadline_s, each)
        try:
            self.pipe.send_bytes(pickle.dumps((self.calls, method, arguments)))
        except ConnectionError:
            raise self.died(what) from None
        return answer

    def _hear(self, what: str, timeout_s: float) -> bool:
        """Takes the next answer to any open call. Returns False where none comes; ``what`` is waited for."""
        self._require_open(what)
        ready = wait([self.pipe, self.ended], max(0.0, timeout_s))
        if not ready:
            return False
        if self.pipe not in ready:
            raise self.died(what)
        try:
            number, *outcome = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            raise self.died(what) from None
        self.open.pop(number).outcome = outcome
        return True

    def _require_open(self, what: str) -> None:
        if self.pipe.closed:
            raise UserError(f"{what}: {self.name} is closed; start another one")

    @property
    def _who(self) -> str:
        return f"{self.name} (pid {self.process.pid})"

    def _tail(self) -> str:
        size = os.fstat(self.output.fileno()).st_size
        # pread leaves the place alone at which the child writes.
        text = os.pread(self.output.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        return ending("output", text.splitlines())


@dataclass(eq=False)
class _Answer:
    """What the child returns from a call that is under way (``tandem.futures.Future``)."""

    child: Child
    what: str
    deadline_s: float
    each: bool
    """Whether the result is to be a list of one."""
    outcome: Seq[Any] | None = None
    """Whether the call ended well, and its result or the traceback."""

    def done(self) -> bool:
        with suppress(WorkerDied):
            while self.outcome is None and self.child._hear(self.what, 0.0):
                pass
        return self.outcome is not None or not self.child.alive

    def result(self) -> Any:
        end = time.monotonic() + self.deadline_s
        who = self.child._who
        while self.outcome is None:
            if not self.child._hear(self.what, end - time.monotonic()):
                raise WorkerFailure(
                    f"{self.what}: no answer within {self.deadline_s:.0f} s from {who}{self.child._tail()}"
                )
        ok, result = self.outcome
        if not ok:
            raise WorkerFailed(f"{who} failed in {self.what}: {result.strip().splitlines()[-1]}\n{result}")
        result = raise_failure(result, who)
        return [result] if self.each else result


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
