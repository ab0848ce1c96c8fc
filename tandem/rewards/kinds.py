"""What ``--reward`` may name, and the function that each is: somebody's own, or one that Tandem has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.rewards.loading import import_function, imported_module
from tandem.rewards.sources import source_files

FORMS = "FILE.py:function"
"""What a source may look like, for messages."""
_OWN = re.compile(r".+:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Setting:
    """What a function of Tandem's may need to know of the run."""

    deadline_s: float = 600.0
    """Longest time that a call may take, in seconds."""
    folder: str = ""
    """The run's; nothing is written before the first call."""


@dataclass(frozen=True)
class Found:
    """A function, the files that it is made of, and what a server says of itself."""

    function: Callable[..., Any]
    files: Mapping[str, Path] = field(default_factory=dict)
    version: str = ""


def check_source(source: str) -> None:
    """Raises UserError where nothing of this form can be a reward. Imports nothing."""
    if not _OWN.fullmatch(source):
        raise UserError(f"expected {FORMS}, got {source!r}")


def reward_name(source: str) -> str:
    """What metrics and errors call it: a function by its own name."""
    return source.rpartition(":")[2]


def find_function(source: str, setting: Setting = Setting()) -> Found:
    """The function. Raises UserError where there is none (for one of a file: ``tandem.rewards.loading``)."""
    return Found(import_function(source), source_files(imported_module(source)))
