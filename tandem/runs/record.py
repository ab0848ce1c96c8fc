"""The record of a run on samples: every group that it has trained on, whole, a file a step.

``record/step_00000007.jsonl.gz`` is gzip of JSON lines: one about the step, then one a group in the order in which
they were trained on. Numbers of tokens are packed (base64 of little-endian numbers) and lose no bit. A file is written
aside, flushed, and renamed, before its step changes any parameter.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import struct
import zlib
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.types import Group, Prompt, Rollout, Ticket
from tandem.whole import whole_file, writing

RECORD = "record"
FORMAT, VERSION = "tandem-record", 1
LEVEL = 1
"""gzip's level 1: log-probs are random bits, and no other level makes them smaller."""
_NAME = re.compile(r"step_(\d{8,})\.jsonl\.gz")
_PACKED = {"token_ids": "i", "trainable": "?", "behaviour_logp": "fd", "untruncated_logp": "fd"}
"""Fields of a rollout that are packed, each with the kinds of numbers that may hold them (``struct``), small ones
first."""
_FOUND_ANEW = ("advantages",)
"""Fields of a rollout that training finds: they are not recorded."""

Recorded = tuple[Ticket, Group]


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Writes the record of a run."""

    folder: Path
    run: str
    """The run's id."""
    steps: int
    """The run's length, which its learning rate follows."""

    def write(self, step: int, taken: Seq[Recorded]) -> None:
        """What a step is going to train on, whole or not at all. Raises DiskFailure where it cannot be written.

        A file of the same step is replaced: the run has come to it again.
        """
        about = {
            "format": FORMAT,
            "version": VERSION,
            "run": self.run,
            "step": step,
            "steps": self.steps,
            "tickets": [asdict(ticket) for ticket, _ in taken],
        }
        path = path_of(self.folder, step)
        with writing(path):
            self.folder.mkdir(exist_ok=True)
            with whole_file(path) as file, gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed:
                packed.write(_line(about))
                for _, group in taken:
                    packed.write(_line(_of_group(group)))


def forget_after(folder: Path, step: int) -> None:
    """Removes what is recorded of later steps, which come again, and what a kill has left half written."""
    for path in folder.glob(".step_*-partial") if folder.is_dir() else ():
        path.unlink()
    for later in steps_in(folder):
        if later > step:
            path_of(folder, later).unlink()


def steps_in(folder: Path) -> list[int]:
    """The steps that are recorded, in order; none where there is no record."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def path_of(folder: Path, step: int) -> Path:
    """Where a step is recorded."""
    return folder / f"step_{step:08d}.jsonl.gz"


class Record:
    """The record of a run, whole from its first step on."""

    def __init__(self, run: Path, identity: str, last: int | None = None) -> None:
        """Reads every file of the steps until ``last`` (None: all) once, and keeps no group of it.

        ``identity`` is the run's id. Raises UserError where the run was not recorded, and for the first step that is
        missing, damaged, or of another run.
        """
        self.folder, self.run = run / RECORD, identity
        found = steps_in(self.folder)
        if not found:
            raise UserError(f"{run}: the run was not recorded; record the next one with --record")
        if last is not None and last > found[-1]:
            raise UserError(f"last_step: the record in {self.folder} ends with step {found[-1]}, got {last}")
        self.steps = [step for step in found if last is None or step <= last]
        """From 1 on."""
        for step, there in enumerate(self.steps, start=1):
            if step != there:
                holes = f"step {step}" if there == step + 1 else f"steps {step} to {there - 1}"
                raise UserError(
                    f"{path_of(self.folder, step)}: {holes} of {run} {'is' if there == step + 1 else 'are'} not "
                    "recorded, so what comes after cannot be trained again"
                    + (f"; give --last-step {step - 1}" if step > 1 else "")
                )
        self.lengths: list[int] = []
        """The length that the run was to have when each step was done."""
        self.tickets: list[list[Ticket]] = []
        """The tickets of each step's groups."""
        self.bytes = 0
        for step in self.steps:
            lines = self._lines(step)
            first, count = next(lines, b""), sum(1 for _ in lines)  # the sum is known once all of it is read
            about = self._about(step, first)
            self.lengths.append(about["steps"])
            self.tickets.append([Ticket(**ticket) for ticket in about["tickets"]])
            self.bytes += path_of(self.folder, step).stat().st_size
            if count != len(about["tickets"]):
                raise self._damaged(step, f"{count} groups, not {len(about['tickets'])}")

    def groups(self, step: int) -> list[Group]:
        """The groups that a step trained on, in that order."""
        first, *lines = [*self._lines(step)] or [b""]
        self._about(step, first)
        try:
            return [_group(json.loads(line)) for line in lines]
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise self._damaged(step, str(error)) from error

    def _lines(self, step: int) -> Iterator[bytes]:
        """Raises UserError where the file cannot be read, or its sum is wrong: once all of it is read."""
        path = path_of(self.folder, step)
        try:
            with gzip.open(path, "rb") as file:
                yield from file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self._damaged(step, str(error)) from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _about(self, step: int, line: bytes) -> dict[str, Any]:
        """The first line of a step's file, once it is that of this step and run."""
        try:
            about = json.loads(line)
            found = {name: about[name] for name in ("format", "version", "run", "step", "steps", "tickets")}
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(step, f"its first line is not about a step: {error}") from error
        path = path_of(self.folder, step)
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"{path}: in version {found['version']} of the format; this Tandem reads {VERSION}; replay it with "
                "the one that wrote it"
            )
        if (found["run"], found["step"]) != (self.run, step):
            raise UserError(
                f"{path}: of step {found['step']} of the run {found['run']}, not of step {step} of {self.run}: it has "
                "been moved here"
            )
        return found

    def _damaged(self, step: int, what: str) -> UserError:
        rest = f"; what comes before it can be trained again with --last-step {step - 1}" if step > 1 else ""
        return UserError(f"{path_of(self.folder, step)}: step {step} is damaged or truncated: {what}{rest}")


def _line(value: Any) -> bytes:
    """JSON, in which what it has no type for (a date, an image) is its text, and numbers may be infinite or NaN."""
    return json.dumps(value, default=str, separators=(",", ":")).encode() + b"\n"


def _of_group(group: Group) -> dict[str, Any]:
    return {"prompt": vars(group.prompt), "rollouts": [_of_rollout(rollout) for rollout in group.rollouts]}


def _of_rollout(rollout: Rollout) -> dict[str, Any]:
    found = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name not in _FOUND_ANEW}
    return found | {name: pack(found[name], kinds) for name, kinds in _PACKED.items()}


def _group(line: dict[str, Any]) -> Group:
    prompt = Prompt(**line["prompt"] | {"token_ids": tuple(line["prompt"]["token_ids"])})
    return Group(prompt=prompt, rollouts=[_rollout(one) for one in line["rollouts"]])


def _rollout(found: dict[str, Any]) -> Rollout:
    versions = [(version, tokens) for version, tokens in found["versions"]]
    return Rollout(**found | {name: unpack(found[name]) for name in _PACKED} | {"versions": versions})


def pack(numbers: Seq[Any], kinds: str) -> str:
    """Numbers as text, of the first kind (``struct``) that holds each of them to the bit, or of the last."""
    for kind in kinds:
        layout = f"<{len(numbers)}{kind}"
        try:
            packed = struct.pack(layout, *numbers)
        except OverflowError:  # too large for float32
            continue
        if kind == kinds[-1] or list(struct.unpack(layout, packed)) == list(numbers):
            break
    return f"{kind}:{base64.b64encode(packed).decode()}"


def unpack(text: str) -> list[Any]:
    """What ``pack`` was given."""
    kind, _, packed = text.partition(":")
    data = base64.b64decode(packed)
    return list(struct.unpack(f"<{len(data) // struct.calcsize(f'<{kind}')}{kind}", data))
