"""The best model of a run: a folder that is whole or not there, and says in ``best.json`` of which step it is."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.errors import UserError
from tandem.signals import held

BEST_MODEL = "best"
ABOUT = "best.json"


@dataclass(frozen=True, kw_only=True)
class Best:
    """Of which step a kept model is, and what it reached."""

    step: int
    metric: str
    value: float


def read_best(out: Path) -> Best | None:
    """What a run's best model is; None where it has none. Raises UserError where that cannot be read."""
    path = out / BEST_MODEL / ABOUT
    if not (out / BEST_MODEL).exists():
        return None
    try:
        return Best(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: does not say which step's model this is; remove {out / BEST_MODEL}") from None


def write_about(folder: Path, best: Best) -> None:
    """Into a model's folder, of which step it is."""
    (folder / ABOUT).write_text(json.dumps(asdict(best)) + "\n")


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
    aside = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def replaced(folder: Path) -> Path:
    """Where a folder is while its successor takes its name."""
    return folder.with_name(f".{folder.name}-replaced")
