"""Checkpoints on disk: a folder each, whole or not there, whatever moment the process is killed at.

``step_00000010`` holds ``<part>.pt`` for every part (a trainer's state), ``state.json`` and,
written last, ``manifest.json`` with the run it is of and the size and sha256 of each file. A folder is written, and
deleted, under the name ``.partial-step_00000010``, which nothing reads; it changes its name in one rename, once all of
it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from tandem.errors import DiskFailure, UserError

FORMAT = "tandem-checkpoint"
VERSION = 3
MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial-"
_PLAIN_TYPES = (bool, int, float, str, type(None))
"""Exactly these: a numpy float is a float too, but torch would not load it again."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are all there. ``state`` is what ``save`` was given, through JSON."""

    step: int
    path: Path
    state: dict[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    """Size in bytes and sha256 of each file, by name."""

    def load(self, part: str) -> dict[str, Any]:
        """The part as it was saved, tensors on the CPU. Raises UserError where it is missing or corrupt."""
        name = f"{part}.pt"
        if name not in self.files:
            held = ", ".join(sorted(n.removesuffix(".pt") for n in self.files if n != STATE))
            raise UserError(f"{self.path}: holds no part {part!r} but {held}; another kind of run saved it")
        path = self.path / name
        _check_sum(path, self.files[name]["sha256"])
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: torch cannot load it ({reason}); {_fall_back(self.path)}") from error


class CheckpointStore:
    """The checkpoints of one run. Only one process may save at a time (the run folder's lock sees to that)."""

    def __init__(self, folder: Path, *, keep: int, run: Mapping[str, Any] | None = None) -> None:
        """``keep`` newest checkpoints stay; 0 keeps all. Creates nothing.

        ``run`` is what tells the run from others (its id, method and seed): a checkpoint of another one is refused.
        """
        if keep < 0:
            raise ValueError(f"keep={keep}: the number of checkpoints to keep, or 0 for all")
        self.folder = folder
        self.keep = keep
        self.run = dict(run or {})
        self.spared: int | None = None
        """The step of one that stays, whatever its age."""

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, parts: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, and only once it is whole removes those beyond ``keep``.

        A part is a nest of dicts, lists and tuples of tensors and plain values; TypeError names anything else, which
        could not be loaded again. Raises DiskFailure where the disk is full or refuses, and where one of this step is
        there already, which stays.
        """
        for part, value in parts.items():
            if not re.fullmatch(r"\w[\w.-]*", part):
                raise ValueError(f"{part!r} is no name for a file")
            _require_plain(value, part)
        final = self.path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            partial = self._partial(final)
            _write_folder(partial, {"step": step, "run": self.run}, parts, state)
            os.rename(partial, final)
            _sync_folder(self.folder)
            self._remove_old(step)
        except OSError as error:
            raise DiskFailure(self._failure(final, error)) from error
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; None where there is none.

        Raises UserError where it is truncated or corrupt, of another run, or something lies here that Tandem did not
        write. A save that was killed leaves none of them: what it leaves is passed over.
        """
        if not self.folder.is_dir():
            return None
        for path in sorted(self.folder.iterdir()):
            if not path.name.startswith(".") and not _NAME.fullmatch(path.name):
                raise UserError(f"{path}: not a checkpoint of Tandem's; move it out of {self.folder}")
        newest = max(self._checkpoints().items(), default=None)
        return newest and _open(*newest, self.run)

    def _checkpoints(self) -> dict[int, Path]:
        """Step → folder."""
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def _partial(self, path: Path) -> Path:
        return self.folder / f"{_PARTIAL}{path.name}"

    def _clean(self) -> None:
        """Clears away what a killed save left."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path)

    def _remove_old(self, step: int) -> None:
        """Removes older checkpoints beyond ``keep``. A folder without a manifest is not ours to remove."""
        older = sorted((s, path) for s, path in self._checkpoints().items() if s < step)
        beyond = older[: max(0, len(older) + 1 - self.keep)] if self.keep else []
        for old, path in beyond:
            if old != self.spared and (path / MANIFEST).is_file():
                os.rename(path, self._partial(path))
                shutil.rmtree(self._partial(path))

    def _failure(self, final: Path, error: OSError) -> str:
        shutil.rmtree(self._partial(final), ignore_errors=True)
        found = self._checkpoints() if self.folder.is_dir() else {}
        rest = f"{found[max(found)].name} is whole" if found else "there is no earlier one"
        return f"{final}: cannot be written: {error.strerror or error}; {rest}"


class _HashingFile:
    """What torch.save writes through: counts the bytes on their way to the file, and sums them meanwhile."""

    def __init__(self, file: IO[bytes], thread: Executor) -> None:
        self.file, self.thread = file, thread
        self.size = 0
        self.sum = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        summed = self.thread.submit(self.sum.update, data)
        # torch turns an error raised here into one about positions in a zip file, so it is kept.
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        finally:
            summed.result()
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write_folder(
    folder: Path, about: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]
) -> None:
    folder.mkdir()
    files = {f"{part}.pt": _write(folder / f"{part}.pt", value) for part, value in parts.items()}
    files[STATE] = _write(folder / STATE, state)
    _write(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **about, "files": files})
    _sync_folder(folder)


def _write(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a file on the disk, as JSON or by torch as its name says. Its entry for the manifest."""
    with path.open("wb") as file, ThreadPoolExecutor(1) as thread:
        hashing = _HashingFile(file, thread)
        try:
            if path.suffix == ".json":
                hashing.write(json.dumps(value, indent=1).encode())
            else:
                torch.save(dict(value), cast(IO[bytes], hashing))
        except RuntimeError:
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashing.size, "sha256": hashing.sum.hexdigest()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _require_plain(key, f"{where}: the key {key!r}")
            _require_plain(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _require_plain(inner, f"{where}[{i}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in _PLAIN_TYPES:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def open_checkpoint(path: Path, run: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder, of this run (anything of it that is known). Raises UserError as ``latest`` does."""
    if (match := _NAME.fullmatch(path.name)) is None:
        raise UserError(f"{path}: not a whole checkpoint, which is called step_ and its step")
    return _open(int(match[1]), path, run)


def _open(step: int, path: Path, run: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder, once its manifest, its state and the sizes of all its files are as they should be."""
    files = _read_manifest(step, path, run)
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; {_fall_back(path)}")
        if (size := file.stat().st_size) != entry["size"]:
            raise UserError(f"{file}: truncated or changed: {size} bytes, not {entry['size']}; {_fall_back(path)}")
    _check_sum(path / STATE, files[STATE]["sha256"])
    return Checkpoint(step=step, path=path, state=_read_json(path / STATE), files=files)


def _read_manifest(step: int, path: Path, run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file, by name."""
    file = path / MANIFEST
    manifest = _read_json(file)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file}: its format is not {FORMAT!r}; move {path} away: Tandem did not write it")
    if (version := manifest.get("version")) != VERSION:
        raise UserError(
            f"{path}: written in version {version} of the format; this Tandem reads {VERSION}; export it with the one "
            "that wrote it"
        )
    files = manifest.get("files")
    whole = (
        manifest.get("step") == step
        and isinstance(files, dict)
        and STATE in files
        and all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values())
    )
    if not whole:
        raise UserError(f"{file}: does not describe step {step}; {_fall_back(path)}")
    theirs = manifest.get("run") or {}
    if others := [f"{name} {theirs.get(name)}, not {run[name]}" for name in run if theirs.get(name) != run[name]]:
        raise UserError(f"{path}: a checkpoint of another run ({'; '.join(others)}); move it back to that run's folder")
    return manifest["files"]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{file}: is missing: not a checkpoint of Tandem's, or a damaged one; {_fall_back(file.parent)}"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); {_fall_back(file.parent)}") from error
    return value if isinstance(value, dict) else {}


def _check_sum(file: Path, expected: str) -> None:
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; {_fall_back(file.parent)}") from error
    if found != expected:
        raise UserError(f"{file}: corrupt: sha256 {found[:12]}…, not {expected[:12]}…; {_fall_back(file.parent)}")


def _fall_back(checkpoint: Path) -> str:
    return f"remove {checkpoint} to go on from the checkpoint before it"
