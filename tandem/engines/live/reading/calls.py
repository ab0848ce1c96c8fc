"""What is written down of a module that was called, and of an attention that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tandem.engines.live.layers import Product
from tandem.models.attention import Ask


@dataclass(frozen=True, eq=False)
class Call:
    """A module that was called: the first tensor that went in, and the first that came out."""

    module: nn.Module
    input: Tensor
    output: Tensor
    more: bool
    """Whether more than the one tensor went in."""
    args: tuple[Any, ...] = ()
    kwargs: tuple[Any, ...] = ()
    """What went in by a name."""
    made: tuple[Any, ...] = ()
    """All that came out."""


@dataclass(frozen=True, eq=False)
class Attended:
    """What a layer asked of its attention: query [1, H, T, D], key and value [1, Hkv, T, D], and what it got."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    ask: Ask


def call_of(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Call | None:
    """None where no tensor went in, or none came out."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    made = (output,) if isinstance(output, Tensor) else tuple(output) if isinstance(output, (tuple, list)) else ()
    if not given or not made or not isinstance(made[0], Tensor):
        return None
    return Call(module, given[0], made[0], len(args) + len(kwargs) > 1, args, tuple(kwargs.values()), made)


def product_of(*calls: Call) -> Product:
    """What linear layers that were called compute, as one product."""
    return Product([call.module for call in calls])  # type: ignore[misc]
