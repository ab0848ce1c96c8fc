"""The numbers of a step, kept where they are computed until all are read at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tandem.batch import Batch, TokenLoss
from tandem.functional.corrections import mismatch
from tandem.parallel.world import World
from tandem.roles import Metrics


class Tally:
    """The total loss of some micro-batches, and every metric over the tokens whose weight is not zero.

    That is its mean, or its largest value where its name ends in ``_max``. Where micro-batches come with the gap
    between sampler and trainer, the metrics of ``functional.corrections.mismatch`` are of all their tokens.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Batch, Tensor]] = []
        """Each micro-batch with its unreduced loss, to name what is wrong with them."""
        self.totals: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.gaps: list[Tensor] = []
        self.balances: list[Tensor] = []

    def add(
        self, batch: Batch, token_loss: TokenLoss, gap_N: Tensor | None = None, balance: Tensor | None = None
    ) -> Tensor:
        """Takes a micro-batch in, and returns its loss, to be differentiated. No wait for the device.

        ``gap_N``: of N of its tokens the trainer's log-prob less the sampler's. ``balance``: its part of the metric
        ``aux_loss``.
        """
        total = (token_loss.loss_T * batch.weight_T).sum()
        self.parts.append((batch, token_loss.loss_T.detach()))
        self.totals.append(total.detach())
        mask_T = batch.weight_T != 0
        self._sum("", mask_T)
        for name, value_T in token_loss.metrics_T.items():
            if name.endswith("_max"):
                value = torch.where(mask_T, value_T.detach(), -math.inf).max().double()
                self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)
            else:
                self._sum(name, value_T.detach() * mask_T)
        if gap_N is not None:
            self.gaps.append(gap_N)
        if balance is not None:
            self.balances.append(balance.detach())
        return total

    def _sum(self, name: str, value_T: Tensor) -> None:
        value = value_T.sum(dtype=torch.float64)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def result(self, world: World) -> tuple[Metrics, str]:
        """The metrics over all ranks, and what is not finite about the loss (or nothing), the same on each of them."""
        kinds = [self.totals, [*self.sums.values()], [*self.maxima.values()], self.balances]
        values = torch.stack([value.double() for kind in kinds for value in kind])
        values = torch.cat([values, *(gap_N.double() for gap_N in self.gaps)]).cpu()
        *numbers, gap_N = values.split([*map(len, kinds), sum(map(len, self.gaps))])
        losses, sums_here, maxima_here, balances_here = (kind.tolist() for kind in numbers)
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        found = "" if bad is None else describe_non_finite(*self.parts[bad])
        ranks = world.gather((sum(losses), sums_here, maxima_here, found, gap_N, sum(balances_here)))
        loss, sums, maxima, faults, gaps, balances = zip(*ranks, strict=True)
        tokens, *totals = (sum(column) for column in zip(*sums, strict=True))
        means = {name: total / max(tokens, 1) for name, total in zip(list(self.sums)[1:], totals, strict=True)}
        largest = dict(zip(self.maxima, map(max, zip(*maxima, strict=True)), strict=True))
        apart = mismatch(torch.cat(gaps)) if any(map(len, gaps)) else {}
        routers = {"aux_loss": sum(balances)} if self.balances else {}
        return {"loss": sum(loss)} | means | largest | apart | routers, next(filter(None, faults), "")


def describe_non_finite(batch: Batch, loss_T: Tensor) -> str:
    """Which samples have a loss that is not finite, for a person to read."""
    bad_T = ~torch.isfinite(loss_T) & (batch.weight_T != 0)
    segments = batch.segment_T[bad_T].unique()
    if batch.index_S is not None:
        segments = batch.index_S[segments]
    first = ", ".join(map(str, segments.tolist()[:5])) or "none alone, only their sum"
    return f"the loss is not finite ({int(bad_T.sum())} tokens; samples of this step: {first}); lower the learning rate"
