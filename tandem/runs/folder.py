"""The folder of a run: its resolved config, metrics, samples, events, checkpoints and models.

``config.yaml`` and ``.tandem-run`` (which is also the lock) are what a run is recognised by.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tandem.errors import UserError
from tandem.runs.lines import append_line, keep_until, read_lines, write_aside
from tandem.runs.lock import FolderLock
from tandem.types import Group, Rollout

MARKER = ".tandem-run"
CONFIG = "config.yaml"
CONTENTS = ("metrics.jsonl", "rollouts.jsonl", "events.jsonl", "checkpoints", "model")
"""What a run writes beside its marker and config; ``overwrite`` removes these and nothing else."""
_CONFIG_PARTIAL = f".{CONFIG}-partial"


class RunFolder:
    """A run folder held by this process. Every line is in the operating system's hands once its method returns."""

    def __init__(self, path: Path, lock: FolderLock) -> None:
        """For ``RunFolder.open``, which makes sure of what is in the folder first."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts.jsonl"
        self.events = path / "events.jsonl"
        self._lock = lock

    @staticmethod
    def check(out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Raises UserError where ``open`` would refuse the folder. Creates nothing."""
        ancestor = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise UserError(f"{out}: cannot be written: {ancestor} is not a folder that this user may write in")
        if ancestor != out:
            return
        names = {path.name for path in out.iterdir()}
        if {MARKER, CONFIG} <= names:
            if not resume and not overwrite:
                raise UserError(f"{out}: already holds a run; go on with --resume, delete it with --overwrite")
        elif others := sorted(names - {MARKER, _CONFIG_PARTIAL}):
            raise UserError(
                f"{out}: holds {others[0]!r} but no run of Tandem's; give an empty or a new folder as --out"
            )

    @staticmethod
    def finished(out: Path) -> int | None:
        """The steps after which the run there was finished and its model written; None where it was not."""
        ends = [e for e in read_lines(out / "events.jsonl") if e.get("event") in ("start", "finish")]
        if not ends or ends[-1]["event"] != "finish" or not (out / "model").is_dir():
            return None
        return ends[-1].get("step")

    @classmethod
    def open(
        cls,
        out: Path,
        *,
        config: str,
        resume: bool = False,
        overwrite: bool = False,
        ignore: Collection[str] = (),
    ) -> RunFolder:
        """Takes the folder for this process and writes ``config``, the resolved config as YAML, into it.

        A folder that is absent or empty starts a run, with ``resume`` too. ``overwrite`` removes the run that is
        there. ``resume`` keeps it, and its config must be the given one but for the keys in ``ignore``. Raises
        UserError where the folder holds a run and neither is given, holds something else, belongs to another
        process, has another config, or cannot be written.
        """
        cls.check(out, resume=resume, overwrite=overwrite)
        try:
            with _made(out), _locked(out) as lock:
                # Once more, now that nobody else can start here in between.
                cls.check(out, resume=resume, overwrite=overwrite)
                run = cls(out, lock)
                if overwrite:
                    run._remove_contents()
                elif (out / CONFIG).exists():
                    require_same_config(out / CONFIG, config, ignore)
                    keep_until(run.events)
                write_aside(out / CONFIG, config)
        except OSError as error:
            raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from error
        return run

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        append_line(self.metrics, {"step": step, **metrics})

    def log_rollouts(self, step: int, groups: Seq[Group], limit: int, *, held_out: bool = False) -> None:
        """A line in ``rollouts.jsonl`` for each of the first groups, until they hold ``limit`` samples or more."""
        written = 0
        for group in groups:
            if written >= limit:
                break
            append_line(self.rollouts, {"step": step, "held_out": held_out, **_describe(group)})
            written += len(group.rollouts)

    def event(self, kind: str, **fields: Any) -> None:
        """Adds a line with the time (UTC) to ``events.jsonl``."""
        append_line(
            self.events, {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **fields}
        )

    def truncate_after(self, step: int, *, metrics: int) -> None:
        """Drops rollouts of steps after ``step``, and metrics after theirs, which a resumed run writes again."""
        keep_until(self.rollouts, step)
        keep_until(self.metrics, metrics)

    def close(self) -> None:
        """Gives the folder back."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Notes how the run ended (a start without a stop was killed) and closes."""
        with suppress(UserError):  # a full disk may be what the run ends of
            if error is None:
                self.event("stop", reason="finished")
            elif isinstance(error, KeyboardInterrupt):
                self.event("stop", reason="interrupted")
            else:
                self.event("stop", reason="error", message=f"{type(error).__name__}: {error}")
        self.close()

    def _remove_contents(self) -> None:
        # The config goes last (it is replaced), so that a run half removed is still known as one.
        for name in CONTENTS:
            path, aside = self.path / name, self.path / f".{name}-partial"
            for found in (path, aside):
                if found.is_dir() and not found.is_symlink():
                    shutil.rmtree(found)
                else:
                    found.unlink(missing_ok=True)


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
def _locked(out: Path) -> Iterator[FolderLock]:
    """Takes the folder's lock; where the body fails, gives it back and leaves no half-made run."""
    lock = FolderLock(out / MARKER)
    try:
        yield lock
    except BaseException:
        if not (out / CONFIG).exists():
            (out / _CONFIG_PARTIAL).unlink(missing_ok=True)
            (out / MARKER).unlink(missing_ok=True)
        lock.release()
        raise


def require_same_config(path: Path, config: str, ignore: Collection[str]) -> None:
    """Raises UserError naming every key, and both its values, in which the stored config differs from the given."""
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        stored.keys()
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise UserError(f"{path}: not the config of a run any more; start again with --overwrite") from None
    given = yaml.safe_load(config) or {}
    differing = [
        f"{key} ({_show(stored, key)} there, {_show(given, key)} now)"
        for key in dict.fromkeys([*stored, *given])
        if key not in ignore and (key in stored, stored.get(key)) != (key in given, given.get(key))
    ]
    if differing:
        raise UserError(
            f"{path}: cannot resume with another config: {', '.join(differing)}; resume with --config {path}, "
            "or start again with another --out"
        )


def _show(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], default=str) if key in config else "absent"


def _describe(group: Group) -> dict[str, Any]:
    """What a person wants to see of a prompt and its samples (docs/runs.md has the format)."""
    prompt = group.prompt
    return {
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.prompt,
        "prompt_length": len(prompt.token_ids),
        "columns": prompt.columns,
        "samples": [_describe_sample(rollout) for rollout in group.rollouts],
    }


def _describe_sample(rollout: Rollout) -> dict[str, Any]:
    described = {
        "completion": rollout.completion,
        "reward": rollout.reward,
        "reward_parts": rollout.reward_parts,
        "advantage": rollout.advantage,
        "stop": rollout.stop,
        "length": len(rollout.completion_ids),
        "version_min": rollout.version_min,
        "version_max": rollout.version_max,
    }
    return described | ({"error": rollout.error} if rollout.error else {})
