"""The folder of a run: its resolved config, metrics, samples, events, checkpoints and models.

``config.yaml`` and ``.tandem-run`` (which is also the lock) are what a run is recognised by; ``run.json`` says which
run it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from tandem.errors import UserError
from tandem.runs.goals import BEST_MODEL
from tandem.runs.identity import CONFIG, IDENTITY, RUN, Start, changed_keys, read_identity, require_same_run
from tandem.runs.lines import append_line, keep_until, read_lines
from tandem.runs.record import RECORD, forget_after
from tandem.runs.tracking import WRITES
from tandem.types import Group, Rollout
from tandem.whole import partial_of, replaced, write_aside

MARKER = ".tandem-run"
EVENTS = "events.jsonl"
CHECKPOINTS, MODEL, EMA_MODEL = "checkpoints", "model", "model-ema"
SUMMARY, CURVES = "summary.md", "curves.png"
USED = ("samples.jsonl", "best.jsonl", "pairs.jsonl", "scored.jsonl", "evaluation.json")
"""What commands write which only use a model."""
SAMPLES, BEST, PAIRS, SCORED, MEASURED = USED
CONTENTS = (
    *("metrics.jsonl", "rollouts.jsonl", EVENTS, RECORD, CHECKPOINTS, MODEL, EMA_MODEL, BEST_MODEL, SUMMARY, CURVES),
    *(*WRITES, *USED),
)
"""What a run writes beside its marker, config and identity; ``overwrite`` removes these and nothing else."""
_BEGINNING = (IDENTITY, *(partial_of(Path(name)).name for name in (IDENTITY, CONFIG)))
"""What is there before the config, which makes a folder a run's, is."""


class RunFolder:
    """A run folder held by this process. Every line is in the operating system's hands once its method returns."""

    def __init__(self, path: Path, lock: int) -> None:
        """For ``RunFolder.open``, which makes sure of what is in the folder first. ``lock``: its marker, open."""
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts.jsonl"
        self.events = path / EVENTS
        self.identity: dict[str, Any] = {}
        """Id, method and seed of the run, which its checkpoints carry too."""
        self.replaced = False
        """Whether the files of a run that had done no step were here."""
        self.changed: dict[str, tuple[Any, Any]] = {}
        """Keys that a resumed run has other values of: before, and now."""
        self._lock = lock

    @staticmethod
    def check(start: Start) -> None:
        """Raises UserError where ``open`` would refuse the folder. Creates nothing that stays."""
        out, ancestor = start.out, require_writable(start.out)
        require_apart(out, start.reads, overwrite=start.overwrite)
        if ancestor != out:
            return
        if _holds_a_run(out):
            if start.overwrite or did_nothing(out):
                return
            if not start.resume:
                raise UserError(f"{out}: already holds a run; go on with --resume, delete it with --overwrite")
            require_same_run(start)
        elif others := sorted({path.name for path in out.iterdir()} - {MARKER, *_BEGINNING}):
            raise UserError(
                f"{out}: holds {others[0]!r} but no run of Tandem's; give an empty or a new folder as --out"
            )

    @staticmethod
    def finished(out: Path) -> int | None:
        """The steps after which the run there was finished and its model written; None where it was not."""
        ends = [e for e in read_lines(out / EVENTS) if e.get("event") in ("start", "finish")]
        if not ends or ends[-1]["event"] != "finish" or not (out / MODEL).is_dir():
            return None
        return ends[-1].get("step")

    @classmethod
    def open(cls, start: Start) -> RunFolder:
        """Takes the folder, which has been checked, for this process; writes the config and the run's identity there.

        A folder that is absent, empty, or holds a run that has done no step begins a run, whether it is to be resumed
        or not; the events of such a run stay. ``overwrite`` removes the run that is there. ``resume`` keeps it if it
        is the same (``require_same_run``), and notes changed inputs that are accepted. Raises UserError where the
        folder holds a run and neither is given, holds something else, belongs to another process, has another run, or
        cannot be written.
        """
        out = start.out
        try:
            with _made(out), _locked(out) as lock:
                # Once more, now that nobody else can start here in between.
                cls.check(start)
                run = cls(out, lock)
                there = _holds_a_run(out)
                run.replaced = there and not start.overwrite and did_nothing(out)
                goes_on = there and not start.overwrite and not run.replaced
                run._go_on(start) if goes_on else run._begin(start)
                write_aside(out / CONFIG, start.config)
        except OSError as error:
            raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from error
        return run

    def _begin(self, start: Start) -> None:
        # The config goes last (it is replaced), so that a run half removed is still known as one.
        for name in CONTENTS:
            if name == EVENTS and self.replaced:
                continue
            path = self.path / name
            for found in (path, partial_of(path), replaced(path)):
                if found.is_dir() and not found.is_symlink():
                    shutil.rmtree(found)
                else:
                    found.unlink(missing_ok=True)
        keep_until(self.events)
        self._identify(start.new_identity())

    def _go_on(self, start: Start) -> None:
        changed = require_same_run(start)
        keep_until(self.events)
        self.changed = changed_keys(start)
        if self.changed:
            self.event("config", changed=self.changed)
        for kind, names in changed.items():
            self.event("accept_changed", what=kind, changed=names)
        identity = read_identity(self.path)
        self._identify(identity | {"inputs": {**identity["inputs"], **(start.inputs or {})}})

    def _identify(self, identity: Mapping[str, Any]) -> None:
        write_aside(self.path / IDENTITY, json.dumps(identity, indent=1) + "\n")
        self.identity = {name: identity[name] for name in RUN}

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        append_line(self.metrics, {"step": step, **metrics})

    def log_rollouts(
        self, step: int, groups: Seq[Group], limit: int, *, held_out: bool = False, eval_set: str = ""
    ) -> None:
        """A line in ``rollouts.jsonl`` for each of the first groups, until they hold ``limit`` samples or more."""
        about = {"step": step, "held_out": held_out} | ({"eval_set": eval_set} if eval_set else {})
        written = 0
        for group in groups:
            if written >= limit:
                break
            append_line(self.rollouts, about | _describe(group))
            written += len(group.rollouts)

    def event(self, kind: str, **fields: Any) -> None:
        """Adds a line with the time (UTC) to ``events.jsonl``."""
        _add_event(self.events, kind, **fields)

    def truncate_after(self, step: int, *, metrics: int) -> None:
        """Drops rollouts and the record of steps after ``step``, and metrics after theirs, which come again."""
        # With its metrics an evaluation comes again.
        keep_until(self.rollouts, step, held_out=metrics)
        forget_after(self.path / RECORD, step)
        keep_until(self.metrics, metrics)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Notes how the run ended (a start without a stop was killed) and gives the folder back."""
        with suppress(UserError):  # a full disk may be what the run ends of
            if error is None:
                self.event("stop", reason="finished")
            elif isinstance(error, KeyboardInterrupt):
                self.event("stop", reason="interrupted")
            else:
                self.event("stop", **_failed(error))
        os.close(self._lock)


def require_writable(out: Path) -> Path:
    """The nearest folder that is there. Raises UserError where nothing can be made in it; nothing stays of the try."""
    ancestor = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be written: {ancestor} is not a folder that this user may write in")
    try:
        # A file system that lets nobody make anything (/proc, a full disk) says so only when it is asked to.
        TemporaryDirectory(prefix=".tandem-", dir=ancestor).cleanup()
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {ancestor}: {error.strerror}") from None
    return ancestor


def require_apart(out: Path, reads: Mapping[str, Collection[str]], *, overwrite: bool = False) -> None:
    """Raises UserError where ``out`` lies in what another run has written, or in a folder that is read.

    ``reads``: files and folders, by the key that names them; ``overwrite`` must not delete one of them either.
    """
    place = out.resolve()
    for part in (place, *place.parents):
        if part.name in CONTENTS and _holds_a_run(part.parent):
            raise UserError(f"{out}: lies in what the run in {part.parent} writes ({part.name}); give another --out")
    for key, path in ((key, path) for key, paths in reads.items() for path in paths if os.path.exists(path)):
        read = Path(path).resolve()
        if read.is_dir() and place.is_relative_to(read) and not _holds_a_run(read):
            raise UserError(f"{out}: lies in {path}, which is read ({key}); give another --out")
        if overwrite and _holds_a_run(place) and any(read.is_relative_to(place / name) for name in CONTENTS):
            raise UserError(f"{out}: --overwrite would delete {path}, which is read ({key}); give another --out")


def note_failure(out: Path, error: BaseException) -> None:
    """Notes how the run in a folder ended, whose process was killed before it could. Nothing where no run goes on."""
    path = out / EVENTS
    keep_until(path)
    if (events := read_lines(path)) and events[-1]["event"] != "stop":
        _add_event(path, "stop", **_failed(error))


def did_nothing(out: Path) -> bool:
    """Whether a folder's run has done no step and written no row: nothing is lost where another takes its place."""
    if any((out / name).exists() and (out / name).stat().st_size for name in (SAMPLES, SCORED, MEASURED)):
        return False
    saved = {path.name for path in (out / CHECKPOINTS).glob("[!.]*")} - {"step_00000000"}
    if saved or (out / MODEL).exists():
        return False
    return not any(line.get("step", 0) > 0 for line in read_lines(out / "metrics.jsonl"))


def _add_event(file: Path, kind: str, /, **fields: Any) -> None:
    append_line(file, {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **fields})


def _failed(error: BaseException) -> dict[str, str]:
    return {"reason": "error", "message": f"{type(error).__name__}: {error}"}


def _holds_a_run(out: Path) -> bool:
    return (out / MARKER).exists() and (out / CONFIG).exists()


@contextmanager
def _made(out: Path) -> Iterator[None]:
    """Makes the folder; where the body fails, removes what it made, unless somebody has put something into it."""
    new = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in new:
                path.rmdir()
        raise


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Takes the folder's lock; where the body fails, gives it back and leaves no half-made run."""
    lock = _lock(out / MARKER)
    try:
        yield lock
    except BaseException:
        if not (out / CONFIG).exists():
            for name in _BEGINNING:
                (out / name).unlink(missing_ok=True)
            (out / MARKER).unlink(missing_ok=True)
        os.close(lock)
        raise


def _lock(marker: Path) -> int:
    """A file, open and locked until it is closed or this process ends, however it ends. The file stays.

    Raises UserError where another process holds it, and names that process.
    """
    opened = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(opened, 1000, 0).decode(errors="replace").strip()
        os.close(opened)
        if not isinstance(error, BlockingIOError):
            raise
        raise UserError(
            f"{marker.parent}: {holder or 'another process'} is writing this run; stop it, or give another --out"
        ) from None
    os.ftruncate(opened, 0)
    os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return opened


def _describe(group: Group) -> dict[str, Any]:
    """What a person wants to see of a prompt and its samples (docs/runs.md has the format)."""
    prompt = group.prompt
    return {
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.prompt,
        "prompt_length": len(prompt.token_ids),
        "prompt_ids": list(prompt.token_ids),
        "columns": prompt.columns,
        "samples": [_describe_sample(rollout) for rollout in group.rollouts],
    }


def _describe_sample(rollout: Rollout) -> dict[str, Any]:
    start = rollout.prompt_length

    def of_completion(numbers: Seq[float]) -> list[float]:
        return [round(number, 6) for number in numbers[start:]]

    described: dict[str, Any] = {
        "completion": rollout.completion,
        "reward": rollout.reward,
        "reward_parts": rollout.reward_parts,
        "advantage": rollout.advantage,
        "stop": rollout.stop,
        "length": len(rollout.completion_ids),
        "version_min": rollout.version_min,
        "version_max": rollout.version_max,
        "completion_ids": rollout.completion_ids,
        "behaviour_logp": of_completion(rollout.behaviour_logp),
        "untruncated_logp": of_completion(rollout.untruncated_logp),
        "advantages": None if rollout.advantages is None else of_completion(rollout.advantages),
    }
    if not all(rollout.trainable[start:]):
        described["trainable"] = rollout.trainable[start:]
    return described | ({"error": rollout.error} if rollout.error else {})
