"""Optional fields that a formula cannot do without."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def required(value: Tensor | None, name: str) -> Tensor:
    """The tensor itself. Raises ValueError where it is None: something that should have filled ``name`` did not."""
    if value is None:
        raise ValueError(f"{name} is not filled; what should fill it is not wired")
    return value
