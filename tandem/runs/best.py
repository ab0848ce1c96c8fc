"""The best model of a run: a folder that is whole or not there, and says in ``best.json`` of which step it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.errors import UserError

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
