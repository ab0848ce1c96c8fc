"""A trainer rank as the source of weights: for engines in its own process, and for those at the end of a link."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from tandem.parallel.gather import Gatherer, standing
from tandem.parallel.sharding import local
from tandem.sync.checksum import ParameterSums, Sums
from tandem.sync.links import Link
from tandem.sync.plan import Plan, plan_of
from tandem.sync.sender import Sender


class WeightSource:
    """Parameters, sharded or not, ready to be pushed. All ranks of a trainer make the same calls.

    ``moving`` are the names of those that change; None: all.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], device: torch.device, *, moving: Collection[str] | None = None
    ) -> None:
        self.parameters = parameters
        self.moving = moving
        self.gatherer = Gatherer(self.parameters, device)
        self.sender: Sender | None = None
        self.truth: ParameterSums | None = None
        self.aside: list[Tensor] = []
        self.filled = False

    def plan(self, dtype: str | None = None) -> Plan:
        """What a first push consists of, floating tensors as ``dtype`` (None: as they are)."""
        return plan_of(standing(self.parameters).items(), getattr(torch, dtype) if dtype else None)

    def moving_plan(self, dtype: str) -> Plan | None:
        """What later ones consist of, where that is not all."""
        if self.moving is None:
            return None
        there = standing(self.parameters)
        return plan_of(((name, there[name]) for name in self.moving), getattr(torch, dtype))

    def listen(self, link: Link | None, plan: Plan) -> int:
        """Opens this rank's end, where it has receivers of its own (``link``). Returns its port, else 0."""
        self.close()
        self.sender = Sender(self.gatherer, plan)
        return self.sender.listen(link) if link is not None else 0

    def connect(self) -> None:
        """Meets the receivers, which connect at the same time."""
        assert self.sender is not None, "listen() comes first"
        self.sender.connect()

    def send(self, check: bool = False) -> Sums:
        """One push over the links. Returns the checksums that the other end must have; {} unless asked to ``check``."""
        assert self.sender is not None, "connect() comes first"
        link = self.sender.link
        return self.sender.send(self._truth(self.sender.plan, link is None or link.overlaps) if check else None)

    def fill(self, targets: Mapping[str, Tensor], check: bool = False) -> Sums:
        """Writes all weights into tensors of this process, a layer's worth at a time, and of what moves alone from the
        second time on. Returns what ``send`` does, of all."""
        plan = plan_of((name, tensor) for name, tensor in targets.items())
        partly = self.filled and self.moving is not None
        now = plan_of((name, targets[name]) for name in self.moving) if partly and self.moving else plan
        self.filled = True
        for bucket in now.buckets:
            self.gatherer.fill([(spec.name, targets[spec.name]) for spec in bucket])
        return self._truth(plan, overlap=False).now() if check else {}

    def _truth(self, plan: Plan, overlap: bool) -> ParameterSums:
        """The last push's, as long as it is of the same tensors."""
        if self.truth is None or self.truth.parameters is not self.parameters or self.truth.plan != plan:
            self.truth = ParameterSums(self.parameters, plan, self.gatherer.device, overlap)
        return self.truth

    @torch.no_grad()
    def zero(self) -> None:
        """Sets all parameters to zero, keeping them for ``restore``: what ``tandem doctor`` tests engines with."""
        slices = [local(p.detach()) for p in self.parameters.values()]
        self.aside = [s.cpu() if s.device.type != "cpu" else s.clone() for s in slices]
        torch._foreach_zero_(slices)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what ``zero`` took."""
        for p, kept in zip(self.parameters.values(), self.aside, strict=True):
            local(p.detach()).copy_(kept)
        self.aside = []

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None
