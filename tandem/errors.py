"""Errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path


class UserError(Exception):
    """Something outside Tandem is wrong: a path, a row, a key, a reward function.

    The message is one line that says what was wrong, where (file, line, key or sample) and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class RunFailure(UserError):
    """What a run depends on has failed: a worker, a disk, a reward that is called. ``--resume`` goes on after it.

    The command line exits with code 75 (``EX_TEMPFAIL`` of sysexits.h), so that a scheduler knows to start it again.
    """


class DiskFailure(RunFailure):
    """A file cannot be written. A run says at what point of it that was, and where it goes on."""


class WorkerFailure(RunFailure):
    """A process that works for this one has died or does not answer. A run says at what point of it that was."""


class WorkerDied(WorkerFailure):
    """A process that works for this one is gone. The message says which, at what, and how its log ends."""


class NonFiniteError(UserError):
    """A loss or a gradient is not finite. Raised before any parameter is touched by it."""


class Cancelled(Exception):
    """The call was given up before it ended (``tandem.roles.Engine.cancel``)."""


LISTED = 3
"""3 names stand in a message, and how many more there are."""


def listed(names: Seq[str]) -> str:
    """The first ``LISTED`` of some names, to go into a message, and how many more there are."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def kind_of(value: object) -> str:
    """``an int``: of what type a value is, to go into a message."""
    name = type(value).__name__
    return f"a{'n' * (name[0] in 'aeiou')} {name}"


def counted(count: int, what: str) -> str:
    """``2 rows``, ``1 row``: how many there are, to go into a message."""
    return f"{count} {what}{'s' * (count != 1)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error of somebody else's says, to go into a message of ours; its class if nothing.

    And the second, where the first ends with a colon.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def nearest(path: Path, among: Callable[[Path], bool] = Path.exists) -> str:
    """What a path that is not there may be meant as, of those ``among`` its neighbours, to end a message with."""
    there = [other.name for other in path.parent.iterdir() if among(other)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
