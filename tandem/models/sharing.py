"""What several packed segments begin with goes through a model once. T tokens of the batch, U that go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.batch import Batch, send


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which tokens of a batch go through, and where each token's result is found.

    In a micro-batch the first segment of a group (``Batch.group_S``) goes through whole. The others begin with the
    same tokens, at the same positions and after the same ones, so that every number that a model gives them is the
    first one's: they drop them, and attend to the first one's. All int64.
    """

    dropped_S: Tensor
    """Leading tokens that a segment drops; 0 for the first of a group. On the CPU, as ``own_bounds``."""
    own_bounds: Tensor
    """[S + 1]: a segment's own tokens are ``[own_bounds[s], own_bounds[s + 1])`` of the U."""
    kept_U: Tensor
    """Which of the T tokens goes through. On the device, as all that follow."""
    place_T: Tensor
    """Where among the U a token's result is."""
    shared_P: Tensor
    """Which of the U are the result of several tokens,"""
    sharers_Pn: Tensor
    """and of which of the T,"""
    real_Pn: Tensor
    """where this is true (bool)."""

    def expand(self, x_U: Tensor) -> Tensor:
        """[U, ...] → [T, ...]: to every token its result. Its gradient adds up over those who share it.

        Whatever stands behind the U is left out.
        """
        expanded: Tensor = _Expand.apply(
            x_U[: len(self.kept_U)], self.place_T, self.kept_U, self.shared_P, self.sharers_Pn, self.real_Pn
        )
        return expanded


def sharing_of(batch: Batch) -> Sharing | None:
    """None where no two segments of a step begin alike (``pack``). Nobody waits for the device.

    A micro-batch in which none do, of a step in which some do, has a sharing in which every token is kept: compiled
    layers then take the way that they take for all the others, where another would be compiled in the midst of a run.
    """
    if batch.prefix_S is None or batch.group_S is None:
        return None
    first: dict[int, int] = {}
    host_S = torch.tensor([first.setdefault(group, s) for s, group in enumerate(batch.group_S.tolist())])
    dropped_S = torch.where(host_S == torch.arange(batch.segments), 0, batch.prefix_S)
    length_S, start_S = batch.bounds.diff(), batch.bounds[:-1]
    segment_T = torch.repeat_interleave(torch.arange(batch.segments), length_S)
    index_T = torch.arange(batch.tokens)
    position_T = index_T - start_S[segment_T]
    kept_T = position_T >= dropped_S[segment_T]
    source_T = torch.where(kept_T, index_T, start_S[host_S[segment_T]] + position_T)
    place_T = (kept_T.cumsum(0) - 1)[source_T]
    shared_P, sharers_Pn, real_Pn = _sharers(place_T)
    device = batch.token_ids_T.device
    return Sharing(
        dropped_S=dropped_S,
        own_bounds=torch.cat([length_S.new_zeros(1), (length_S - dropped_S).cumsum(0)]),
        kept_U=send(index_T[kept_T], device),
        place_T=send(place_T, device),
        shared_P=send(shared_P, device),
        sharers_Pn=send(sharers_Pn, device),
        real_Pn=send(real_Pn, device),
    )


def _sharers(place_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The places that come several times, where they come [P, n], and which of those n are real.

    Where none do, the first place stands there twice, as if it came again. Compiled code knows shapes of 0 and 1 apart
    from all others, and views from tensors of their own: none of these is one.
    """
    count_U = place_T.bincount()
    shared_P = torch.arange(len(count_U))[count_U > 1]
    if not len(shared_P):
        # Not expanded: what refers to one number twice cannot be pinned on its way to a GPU.
        return place_T.new_zeros(2), place_T.new_zeros(2, 2), torch.tensor([[True, False]] * 2)
    count_P = count_U[shared_P]
    start_P = (count_U.cumsum(0) - count_U)[shared_P]
    column = torch.arange(int(count_P.max()))
    real_Pn = column < count_P[:, None]
    order_T = place_T.argsort(stable=True)
    return shared_P, order_T[start_P[:, None] + torch.where(real_Pn, column, 0)], real_Pn


class _Expand(torch.autograd.Function):
    """Rows at their places. The gradient is summed in one order: torch's own would sort, or add by atomics."""

    @staticmethod
    def forward(
        ctx: Any, x_U: Tensor, place_T: Tensor, kept_U: Tensor, shared_P: Tensor, sharers_Pn: Tensor, real_Pn: Tensor
    ) -> Tensor:
        ctx.save_for_backward(kept_U, shared_P, sharers_Pn, real_Pn)
        return x_U.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, up_T: Tensor) -> tuple[Tensor | None, ...]:
        kept_U, shared_P, sharers_Pn, real_Pn = ctx.saved_tensors
        real = real_Pn.view(*real_Pn.shape, *[1] * (up_T.ndim - 1))
        total_P = torch.where(real, up_T[sharers_Pn], 0.0).sum(1)
        return up_T.index_select(0, kept_U).index_copy(0, shared_P, total_P), None, None, None, None, None
