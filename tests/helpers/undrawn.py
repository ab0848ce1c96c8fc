"""Runs whose curves are not drawn: a file takes the picture's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tandem.runs import report


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """In this process, until the patch is undone. Nothing to draw is an error as it was."""
    patch.setattr(report, "plot_curves", _blank)


def _blank(path: Path, panels: Mapping[str, Any], title: str) -> None:
    if not panels:
        raise ValueError("no panels to draw")
    path.write_bytes(b"")
