"""Whole parameters out of slices, a bucket at a time, for the engines that sample with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tandem.parallel.sharding import local

# torch renamed it after 2.11 and warns of the old name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def standing(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What can be looked at for nothing, of the same names, shapes and places.

    That is the parameters themselves, and for those that are computed when they are asked for (adapters scaled, or
    folded into their base; a base in few bits) what they are computed from: their mapping's ``standing``.
    """
    found: Mapping[str, Tensor] = getattr(parameters, "standing", parameters)
    return found


class Gatherer:
    """Fills tensors with the whole values of parameters, sharded or not, cast to the tensors' dtype."""

    def __init__(self, parameters: Mapping[str, Tensor], device: torch.device) -> None:
        self.parameters = parameters
        self.device = device

    @torch.no_grad()
    def fill(self, wanted: list[tuple[str, Tensor]]) -> None:
        """Writes each named parameter into its tensor. A collective where parameters are sharded.

        One all-gather moves all of ``wanted``, already in the dtype that is wanted.
        """
        plain: list[tuple[Tensor, Tensor]] = []
        by_dtype: dict[torch.dtype, list[tuple[DTensor, Tensor]]] = {}
        for name, out in wanted:
            parameter = self.parameters[name]
            if isinstance(parameter, DTensor):
                by_dtype.setdefault(out.dtype, []).append((parameter, out))
            else:
                plain.append((parameter, out))
        if plain:
            torch._foreach_copy_([out for _, out in plain], [p.detach() for p, _ in plain], non_blocking=True)
        for dtype, pairs in by_dtype.items():
            self._gather(dtype, pairs)

    def _gather(self, dtype: torch.dtype, pairs: list[tuple[DTensor, Tensor]]) -> None:
        mesh = pairs[0][0].device_mesh
        ranks = mesh.size()
        # Ranks keep ceil(rows / ranks) rows each, the last ones fewer or none: room for the most is sent by all.
        rows = [-(-p.shape[0] // ranks) for p, _ in pairs]
        widths = [p[0].numel() if p.ndim > 1 else 1 for p, _ in pairs]
        sizes = [r * w for r, w in zip(rows, widths, strict=True)]
        mine = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        slices = [local(p.detach()).reshape(-1) for p, _ in pairs]
        pieces = [room[: s.numel()] for room, s in zip(mine.split(sizes), slices, strict=True)]
        torch._foreach_copy_(pieces, slices, non_blocking=True)
        everyone = torch.empty(ranks, mine.numel(), dtype=dtype, device=self.device)
        all_gather(everyone.view(-1), mine, group=mesh.get_group())
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for (_, out), size, columns in zip(pairs, sizes, everyone.split(sizes, dim=1), strict=True):
            flat = out.view(-1)
            for rank, target in enumerate(flat.split(size)):
                targets.append(target)
                sources.append(columns[rank, : target.numel()])
        torch._foreach_copy_(targets, sources, non_blocking=True)
