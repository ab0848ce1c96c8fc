"""Rotations by position: the angles that a model's rotary embeddings give, and what may be turned by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tandem.engines.live.layers import Unlike
from tandem.kernels.layers import Norm, Rotation


@dataclass(frozen=True)
class Table:
    """Angles [P, R / 2] as a rotary embedding gives them, or none."""

    cos: Tensor
    sin: Tensor

    def rotation(self, pairs: bool) -> Rotation:
        cos, sin = (
            (x.repeat_interleave(2, dim=-1) if pairs else torch.cat((x, x), dim=-1)).contiguous()
            for x in (self.cos, self.sin)
        )
        return Rotation(cos, sin, pairs=pairs)


class Rotations:
    """Of all positions that a model has angles for, by the number of their table and whether they turn ``pairs``."""

    def __init__(self, positions: int, position_T: Tensor, turning: int | None) -> None:
        """``position_T``: those of the watched tokens. ``turning``: beyond it all tokens have other angles."""
        self.positions, self.position_T, self.turning = positions, position_T, turning
        self.device = position_T.device
        self.tables: list[Table] = []
        self.made: dict[tuple[int, bool], Rotation] = {}

    def add(self, module: Any, args: Any, kwargs: Any) -> None:
        """The angles of all positions, from a module that was asked for some."""
        if self.turning is not None and self.positions > self.turning:
            raise Unlike(f"its rotary embedding turns all tokens otherwise beyond {self.turning}")
        every = torch.arange(self.positions, device=self.device)[None]

        def swapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            # Models that also see have positions of three kinds, equal where there is only text.
            return x.reshape(-1)[:1].view(1, 1, 1) if x.is_floating_point() else every.expand(*x.shape[:-2], 1, -1)

        angles = module.forward(*map(swapped, args), **{k: swapped(v) for k, v in kwargs.items()})
        if isinstance(angles, Tensor):
            # As complex numbers, one for each two dimensions (DeepSeek V2).
            self.tables.append(Table(angles[0].real.contiguous(), angles[0].imag.contiguous()))
            return
        cos, sin = (x[0] for x in angles)
        half = cos.shape[-1] // 2
        for columns, again in ((slice(0, half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2))):
            if torch.equal(cos[:, columns], cos[:, again]):
                cos, sin = cos[:, columns], sin[:, columns]
                break
        for dtype in dict.fromkeys((cos.dtype, torch.float32)):
            self.tables.append(Table(cos.to(dtype), sin.to(dtype)))

    def some(self, size: int) -> Iterator[tuple[tuple[int, bool], Rotation]]:
        """Those that there may be of up to so many dimensions, of the watched tokens alone; their names."""
        for number, pairs in [(i, pairs) for i in range(len(self.tables)) for pairs in (False, True)] + [(-1, False)]:
            table = self._table(number)
            if 2 * table.cos.shape[1] <= size:
                some = Table(table.cos[self.position_T], table.sin[self.position_T])
                yield (number, pairs), some.rotation(pairs)

    def of(self, name: tuple[int, bool], norms: tuple[Norm, Norm] | None) -> Rotation:
        """The one of that name, of all positions."""
        if name not in self.made:
            self.made[name] = self._table(name[0]).rotation(name[1])
        return replace(self.made[name], norms=norms)

    def _table(self, number: int) -> Table:
        """-1: no dimension turns."""
        nothing = torch.empty(self.positions, 0, device=self.device)
        return Table(nothing, nothing) if number < 0 else self.tables[number]
