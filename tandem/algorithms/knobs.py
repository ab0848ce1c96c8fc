"""Ranges of knobs."""

from __future__ import annotations

from collections.abc import Callable

from tandem.errors import UserError
from tandem.roles import Algorithm


def expect(algorithm: Algorithm, wanted: str, ok: Callable[[float], bool], *names: str) -> None:
    """Raises UserError naming the first of these knobs whose value is neither None nor ``ok``."""
    for name in names:
        value = getattr(algorithm, name)
        if value is not None and not ok(value):
            raise UserError(f"{name}: expected {wanted}, got {value!r}")
