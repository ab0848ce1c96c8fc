"""Tiny models of the families of ``bench/families.py``, of trained size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tandem.models.attention import IMPLEMENTATION
from tandem.models.proof.shrunk import trained_size

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import families

FAMILIES = families.NAMES


def made(name: str) -> Any:
    """One as transformers makes it."""
    module = families.NAMES[name].module(families.TINY)
    trained_size(module)
    return module


def family_model(name: str) -> Any:
    """One whose attention is Tandem's."""
    module = made(name)
    module.set_attn_implementation(IMPLEMENTATION)
    return module
