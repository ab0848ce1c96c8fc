"""What ``--reward`` may name, and the function that each is: somebody's own, or one that Tandem has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tandem.errors import UserError
from tandem.rewards.loading import import_function, source_files

if TYPE_CHECKING:
    from tandem.rewards.calling import Setting

FORMS = "FILE.py:function, http://HOST:PORT, judge:FILE.yaml, math, reasoning-gym or format:REGEX"
"""What a source may look like, for messages."""
_OWN = re.compile(r".+:[A-Za-z_]\w*", re.DOTALL)


@dataclass(frozen=True)
class Found:
    """A function, the files that it is made of, and what a server says of itself."""

    function: Callable[..., Any]
    files: Mapping[str, Path] = field(default_factory=dict)
    version: str = ""


def kind_of(source: str) -> str:
    """``own``, ``server``, ``judge``, ``math``, ``reasoning_gym`` or ``format``. Imports nothing.

    Raises UserError where nothing of this form can be a reward.
    """
    head, _, rest = source.partition(":")
    if head in ("http", "https"):
        urls_of(source)
        return "server"
    if re.match(r"\w+://", source):
        raise UserError(f"{source!r} has an unknown scheme; give http://HOST:PORT, or {FORMS}")
    if head == "judge" and rest.endswith((".yaml", ".yml")):
        return "judge"
    if head == "format" and rest:
        try:
            re.compile(rest)
        except re.error as error:
            raise UserError(f"{source!r}: not a regular expression: {error}") from error
        return "format"
    if re.fullmatch(r"math(:\w+)?", source):
        return "math"
    if source == "reasoning-gym":
        return "reasoning_gym"
    if not _OWN.fullmatch(source):
        raise UserError(f"expected {FORMS}, got {source!r}")
    return "own"


def is_function(source: str) -> bool:
    """Whether it is a function, and not the folder of a model."""
    try:
        return bool(kind_of(source))
    except UserError:
        return False


def urls_of(source: str) -> list[str]:
    """The servers that ``http://a:1,http://b:2`` names. Raises UserError for one that is no URL."""
    urls = [url.rstrip("/") for url in source.split(",")]
    for url in urls:
        try:
            split = urlsplit(url)
            right = split.scheme in ("http", "https") and split.hostname and split.port != 0
        except ValueError:  # a port that is no number
            right = False
        if not right or split.query or split.fragment or split.username:
            raise UserError(
                f"{url!r} is not the URL of a reward server; give http://HOST:PORT or http://HOST:PORT/PATH"
            )
    if twice := {url for url in urls if urls.count(url) > 1}:
        raise UserError(f"{min(twice)!r} is named twice")
    return urls


def reward_name(source: str) -> str:
    """What metrics and errors call it: a function by its own name, a judge by its file's."""
    kind = kind_of(source)
    if kind == "own":
        return source.rpartition(":")[2]
    return Path(source.partition(":")[2]).stem if kind == "judge" else kind


def find_function(source: str, setting: Setting) -> Found:
    """The function. Raises UserError where there is none (for one of a file: ``tandem.rewards.loading``)."""
    kind, rest = kind_of(source), source.partition(":")[2]
    # Each imported where it is wanted: a process of somebody's own function holds nothing of the others.
    if kind == "server":
        from tandem.rewards.remote import RewardServers

        servers = RewardServers(urls_of(source), setting)
        return Found(servers, version=servers.version)
    if kind == "judge":
        from tandem.rewards.endpoint import read_judge

        path = Path(rest).expanduser()
        return Found(read_judge(path, setting), {"": path.resolve()})
    if kind == "own":
        function, module = import_function(source)
        return Found(function, source_files(module))
    from tandem.rewards.checks import FormatCheck, GymCheck, MathCheck

    if kind == "math":
        return Found(MathCheck(rest or None))
    return Found(FormatCheck(rest) if kind == "format" else GymCheck())
