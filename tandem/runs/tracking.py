"""A run's trackers, each a process that follows the files of the run folder: the run itself never waits for one.

The files are the queue. The run says after each step how far they are written; a tracker that fails is asked again at
the next step and goes on where it was, one that hangs or dies is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tandem.errors import first_line
from tandem.runs.identity import CONFIG, read_identity
from tandem.runs.trackers import TRACKERS, About, Tracker
from tandem.signals import how_ended
from tandem.whole import write_aside

FOLDER = "trackers"
"""In the run folder: what each tracker has been given so far, and what it printed."""
DEADLINE_S = 60.0
"""How long, in seconds, trackers may take to end after the run's last step."""
WRITES = ("tensorboard", "wandb", "mlruns", FOLDER)
"""What trackers write into the run folder."""


class Tracking:
    """The trackers of a run, from the run's side. No call of it waits, but for ``close``, and none raises."""

    def __init__(self, out: Path, names: Seq[str], *, deadline_s: float = DEADLINE_S) -> None:
        self.out, self.deadline_s = out, deadline_s
        self._followers: dict[str, _Follower] = {}
        self._failed: list[str] = []
        for name in names:
            try:
                self._followers[name] = _Follower(out, name, deadline_s)
            except OSError as error:
                self._failed.append(f"{name} cannot be started: {error}")

    def written(self, step: int) -> list[str]:
        """The files hold everything up to ``step``. What has gone wrong since the last call, a line each."""
        failed, self._failed = self._failed, []
        for follower in self._followers.values():
            failed += follower.wake(step)
        return failed

    def close(self) -> list[str]:
        """Lets them end, all within the deadline, and kills those that do not. What has gone wrong, a line each."""
        end = time.monotonic() + self.deadline_s
        try:
            for follower in self._followers.values():
                follower.stop()
            return [line for follower in self._followers.values() for line in follower.wait(end)]
        finally:
            for follower in self._followers.values():
                follower.kill()


class _Follower:
    """One tracker's process."""

    def __init__(self, out: Path, name: str, deadline_s: float) -> None:
        self.name = name
        folder = out.absolute() / FOLDER
        folder.mkdir(exist_ok=True)
        arguments = (name, str(out.absolute()), deadline_s)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from tandem.runs.tracking import follow; follow(*{arguments!r})"
        )
        with (folder / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # A group of its own, which is killed as one. Ctrl-C is for the run.
                start_new_session=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.steps, self.reports = self.process.stdin, self.process.stdout
        os.set_blocking(self.steps.fileno(), False)
        os.set_blocking(self.reports.fileno(), False)
        self.said = self.gone = False

    def wake(self, step: int) -> list[str]:
        # Where the pipe is full, the process hangs, and a later step tells it the same.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self.steps.fileno(), f"{step}\n".encode())
        return self.news()

    def news(self) -> list[str]:
        """The first thing that it has reported, once; and once how its process ended before it was told to."""
        told = []
        with contextlib.suppress(BlockingIOError):
            lines = os.read(self.reports.fileno(), 1 << 16).decode(errors="replace").splitlines()
            told = self.say(lines[0]) if lines else []
        code = self.process.poll()
        if code is None or self.gone:
            return told
        self.gone = True
        if self.stopped and (code == 0 or self.said):
            return told
        rest = "" if self.stopped else ", and begins again with --resume only, which logs what it has missed"
        return [*told, self.line(f"its process ended ({how_ended(code)}){rest}")]

    def say(self, what: str) -> list[str]:
        if self.said:
            return []
        self.said = True
        return [self.line(what)]

    def line(self, what: str) -> str:
        return f"{self.name} fails: {what}; the run goes on, see {FOLDER}/{self.name}.log"

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self.steps.closed

    def stop(self) -> None:
        self.steps.close()

    def wait(self, end: float) -> list[str]:
        try:
            self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return self.news() or self.say("it has not ended in time and is killed")
        return self.news()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reports.close()


def follow(name: str, out: str, deadline_s: float) -> None:
    """A tracker's process: logs what the run has written whenever it says so, until the run is gone."""
    # What a library reads, or prints, is not what the run says, or is told.
    steps, reports = os.dup(0), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # One that an earlier start of the run has left behind is still at work: its files are this one's.
    lock = os.open(Path(out) / FOLDER / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(lock, fcntl.LOCK_EX)
    following = Following(out=Path(out), name=name)
    failed = False
    for step in _steps(steps):
        if step == math.inf:
            # Nobody waits for it any longer than this, whatever the library does.
            signal.alarm(math.ceil(deadline_s))
        try:
            following.up_to(step)
            failed = False
        except Exception as error:  # whatever a library or a network raises is said, and tried again
            traceback.print_exc()
            reports.write(first_line(error) + "\n")
            reports.flush()
            failed = True
    if failed:
        sys.exit(1)


def _steps(descriptor: int) -> Iterator[float]:
    """The newest step that the run has written, each time it says so; infinity when it has ended, or is gone."""
    left = b""
    while True:
        select.select([descriptor], [], [])
        if not (read := os.read(descriptor, 1 << 16)):
            yield math.inf
            return
        *lines, left = (left + read).split(b"\n")
        if lines:
            yield float(lines[-1])


@dataclass(kw_only=True)
class Following:
    """How far a tracker is in the files of a run."""

    out: Path
    name: str
    tracker: Tracker | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that are done with."""

    def up_to(self, step: float) -> None:
        """Logs every step up to this one that was not logged by this process or an earlier one; at infinity closes.

        Raises whatever the tracker does; the next call begins with the step that failed.
        """
        if not (self.out / "metrics.jsonl").exists():
            return  # a run that has ended before its first step is none to follow
        state = self._read()
        if self.tracker is None:
            config = yaml.safe_load((self.out / CONFIG).read_text(encoding="utf-8"))
            about = About(out=self.out, id=read_identity(self.out)["id"], config=config)
            self.tracker = TRACKERS[self.name](about, state)
            self._write(state)
        for record in self._lines("metrics.jsonl", step):
            at = record.pop("step")
            if at > state["step"]:
                self._log(at, record, state)
        if step == math.inf:
            self.tracker.close()

    def _log(self, step: int, record: dict[str, Any], state: dict[str, Any]) -> None:
        assert self.tracker is not None
        offsets = dict(self.offsets)
        samples = [line for line in self._lines("rollouts.jsonl", step) if line["step"] == step]
        # Written first: a process that is killed in between loses a step, but none is logged twice.
        self._write(state | {"step": step})
        try:
            metrics = {name: value for name, value in record.items() if value is not None}
            self.tracker.log(step, metrics, samples)
        except BaseException:
            self.offsets = offsets
            self._write(state)
            raise
        state["step"] = step

    def _lines(self, name: str, step: float) -> Iterator[dict[str, Any]]:
        """The next lines of a file, up to a step. One counts as done when the next is asked for."""
        path = self.out / name
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.offsets.get(name, 0))
            for line in file:
                if not line.endswith(b"\n") or (record := json.loads(line))["step"] > step:
                    return
                yield record
                self.offsets[name] = self.offsets.get(name, 0) + len(line)

    def _read(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.out / FOLDER / f"{self.name}.json").read_bytes())
        except FileNotFoundError:
            return {"step": -1}
        return state

    def _write(self, state: dict[str, Any]) -> None:
        write_aside(self.out / FOLDER / f"{self.name}.json", json.dumps(state))
