"""Files and folders that are whole or not there, whatever moment the process is killed at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tandem.errors import DiskFailure, first_line
from tandem.signals import held


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskFailure where the body cannot write what ``path`` names: the disk is full, or refuses."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers are written in Rust, and have no OSError: a name and words are all there is.
        if (
            not isinstance(error, OSError)
            and type(error).__name__ != "SafetensorError"
            and "os error" not in str(error)
        ):
            raise
        why = getattr(error, "strerror", None) or first_line(error)
        raise DiskFailure(f"{path}: cannot be written: {why}") from error


def partial_of(path: Path) -> Path:
    """What a file or folder is called until it is whole."""
    return path.with_name(f".{path.name}-partial")


@contextmanager
def whole_file(path: Path, partial: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write in, called ``partial``. It takes the name ``path`` in one rename, once all of it is on the disk.

    ``partial`` is ``partial_of(path)`` where nobody else writes the same file. It is removed where the body fails.
    """
    partial = partial or partial_of(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_aside(path: Path, text: str | Iterable[str]) -> None:
    """A text file, whole or in parts, by ``whole_file``: whoever reads the path sees the old text or the new one."""
    with whole_file(path) as file:
        file.writelines(part.encode() for part in ([text] if isinstance(text, str) else text))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Where a folder is to be written, which takes its name (``replace_folder``) once the body has written all of it.

    It is removed where the body fails.
    """
    partial = partial_of(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Gives a folder, all of it written, the name of another. Signals wait; after a kill ``restore_folder`` mends."""
    with held():
        if folder.exists():
            shutil.rmtree(replaced(folder), ignore_errors=True)
            os.rename(folder, replaced(folder))
        os.rename(new, folder)
        shutil.rmtree(replaced(folder), ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Takes back a replacement that was killed in between."""
    if replaced(folder).exists() and not folder.exists():
        os.rename(replaced(folder), folder)
    shutil.rmtree(replaced(folder), ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Takes a folder away, all of it or nothing: what is left of it after a kill has another name."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    os.rename(folder, partial)
    shutil.rmtree(partial, ignore_errors=True)


def replaced(folder: Path) -> Path:
    """Where a folder is while its successor takes its name."""
    return folder.with_name(f".{folder.name}-replaced")
