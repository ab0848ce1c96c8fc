"""Which run a folder holds: its id, method and seed, its config, digests of what it reads, and what began it.

``run.json`` keeps what ``config.yaml`` does not say. A resumed run must be the one that began, so each of them is
compared, and what differs is refused by name.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tandem.errors import UserError
from tandem.seeds import DRAWS
from tandem.version import __version__

CONFIG = "config.yaml"
IDENTITY = "run.json"
RUN = ("id", "method", "seed")
"""What tells a run from others: its checkpoints carry it too."""
_ANEW = "put it back, or begin again with another --out, or with --overwrite, which deletes what is here"
Inputs = Mapping[str, Mapping[str, str]]
"""Kind (``data``, ``reward``, ``model``) → name → digest of the content."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a command would begin in a run folder, or go on with."""

    out: Path
    """The folder."""
    method: str
    seed: int
    config: str
    """Resolved, as YAML."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keys with the values that they have where they are not given: what a run had that began before they were."""
    changeable: Mapping[str, str] = field(default_factory=dict)
    """Keys of the config that may differ from the stored one, each with the reason against it, or ""."""
    inputs: Inputs | None = None
    """None where they have not been read yet: they are not compared then."""
    accepted: Collection[str] = ()
    """Kinds of input that may have changed."""
    resume: bool = False
    overwrite: bool = False
    reads: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Files and folders that it reads, by the key that names them."""

    def new_identity(self) -> dict[str, Any]:
        """The identity of a run that begins now."""
        began = {"version": __version__, "draws": DRAWS}
        return {"id": uuid.uuid4().hex, "method": self.method, "seed": self.seed, **began, "inputs": self.inputs}


def read_identity(folder: Path) -> dict[str, Any]:
    """What ``run.json`` holds. Raises UserError where it is missing or damaged."""
    path = folder / IDENTITY
    try:
        identity = json.loads(path.read_bytes())
        return {"version": None, "draws": None, **{name: identity[name] for name in (*RUN, "inputs")}, **identity}
    except FileNotFoundError:
        raise UserError(f"{path}: is missing, so nobody knows which run this is; {_ANEW}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the identity of a run any more; {_ANEW}") from None


def read_run(folder: Path) -> dict[str, Any]:
    """What the checkpoints of the folder's run carry. Raises UserError as ``read_identity``."""
    identity = read_identity(folder)
    return {name: identity[name] for name in RUN}


def require_same_run(start: Start) -> dict[str, list[str]]:
    """Raises UserError where the folder's run is not the one that ``start`` goes on with; everything is named.

    Returns the inputs that have changed, by kind, all of which ``start`` accepts.
    """
    folder, identity = start.out, read_identity(start.out)
    if identity["method"] != start.method:
        raise UserError(f"{folder}: holds a run of {identity['method']}, not of {start.method}; give another --out")
    if identity["draws"] == 2:
        _require_bound(folder)
    elif identity["draws"] != DRAWS:
        whose = "an earlier Tandem" if identity["version"] is None else f"Tandem {identity['version']}"
        model = f", from its model if you like (tandem export --model {folder} --out NEW)"
        raise UserError(
            f"{folder}: begun by {whose}, in which a seed gives other samples and steps than in this Tandem "
            f"({__version__}), so it cannot go on: begin a new run with another --out"
            f"{model if (folder / 'checkpoints').is_dir() else ''}"
        )
    _require_same_config(start)
    changed = _changed(identity["inputs"], start.inputs) if start.inputs is not None else {}
    if refused := [kind for kind in changed if kind not in start.accepted]:
        names = [name for kind in refused for name in changed[kind]]
        raise UserError(
            f"{folder}: {', '.join(names)} {'has' if len(names) == 1 else 'have'} changed since the run began; undo "
            f"that, or go on with --accept-changed {' '.join(sorted({*refused, *start.accepted}))}"
        )
    return changed


def _require_bound(folder: Path) -> None:
    """Raises UserError for a run whose correction_high may have been 5 and, not being given, would be 2 from now on."""
    stored = _stored(folder)
    if stored.get("correction") == "sequence_tis" and stored.get("correction_high") is None:
        raise UserError(
            f"{folder / CONFIG}: correction_high, which is not given, is 2 for sequence_tis, and was 5 until lately: "
            "write the one that the run began with there, and give it, to go on as it was, or take another --out"
        )


def _changed(stored: Inputs, given: Inputs) -> dict[str, list[str]]:
    """Names whose digests differ, or that only one side has, by kind; kinds without any are left out."""
    changed = {}
    for kind in given:
        then, now = stored.get(kind, {}), given[kind]
        if names := [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]:
            changed[kind] = names
    return changed


def changed_keys(start: Start) -> dict[str, tuple[Any, Any]]:
    """Keys of the config that differ, with the value that the folder's run has and that of ``start``; None for none.

    A key that its config does not name has its default there. Raises UserError where the stored config cannot be read.
    """
    stored = _stored(start.out)
    given = yaml.safe_load(start.config) or {}
    defaults = {key: [*value] if isinstance(value, tuple) else value for key, value in start.defaults.items()}
    stored = {key: value for key, value in defaults.items() if key in given} | stored
    return {
        key: (stored.get(key), given.get(key))
        for key in dict.fromkeys([*stored, *given])
        if (key in stored, stored.get(key)) != (key in given, given.get(key))
    }


def _stored(folder: Path) -> dict[str, Any]:
    """The config of the folder's run. Raises UserError where it cannot be read."""
    path = folder / CONFIG
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError):
        raise UserError(f"{path}: not the config of a run any more; {_ANEW}") from None


def _require_same_config(start: Start) -> None:
    """Raises UserError naming every key, and both its values, that differs and may not."""
    path, changed = start.out / CONFIG, changed_keys(start)
    given = yaml.safe_load(start.config) or {}
    gone = [f"{key} ({json.dumps(then, default=str)} there)" for key, (then, _) in changed.items() if key not in given]
    if gone:
        raise UserError(
            f"{path}: this Tandem ({__version__}) has no {', '.join(gone)}; take {'it' if len(gone) == 1 else 'them'} "
            "out of the file to go on without, or start again with another --out"
        )
    described = [
        f"{key} ({json.dumps(then, default=str)} there, {json.dumps(now, default=str)} now"
        f"{f': {reason}' if reason else ''})"
        for key, (then, now) in changed.items()
        if (reason := start.changeable.get(key)) != ""
    ]
    if described:
        raise UserError(
            f"{path}: cannot resume with another config: {', '.join(described)}; resume with --config {path}, "
            "or start again with another --out"
        )
