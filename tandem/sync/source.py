"""A trainer rank as the source of weights: for engines in its own process, and for those at the end of a link."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from tandem.parallel.gather import Gatherer, standing
from tandem.parallel.sharding import local
from tandem.sync.checksum import ParameterSums, Sums
from tandem.sync.links import BUFFERS, Channel, Link, Pending, open_channel
from tandem.sync.meeting import Meeting
from tandem.sync.plan import Plan, plan_of, used, views


class WeightSource:
    """Parameters, sharded or not, ready to be pushed. All ranks of a trainer make the same calls.

    ``moving`` are the names of those that change; None: all. A rank without receivers of its own (no link) still takes
    part in the gathering.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], device: torch.device, *, moving: Collection[str] | None = None
    ) -> None:
        self.parameters = parameters
        self.moving = moving
        self.gatherer = Gatherer(self.parameters, device)
        self.link: Link | None = None
        self.over_link = Plan(())
        """What a push over the link consists of."""
        self.meeting: Meeting | None = None
        self.channel: Channel | None = None
        self.buffers: list[Tensor] = []
        self.pushes = 0
        """Over the link that there is."""
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
        """Opens the place where the receivers that this rank has over its ``link`` meet it. Its port; 0 without one."""
        self.close()
        self.link, self.over_link, self.pushes = link, plan, 0
        self.meeting = Meeting(link) if link is not None else None
        return self.meeting.port if self.meeting is not None else 0

    def connect(self) -> None:
        """Connects to the receivers, which connect at the same time."""
        device = self.gatherer.device
        if self.link is not None and self.meeting is not None:
            self.channel = open_channel(self.link, self.meeting.store, device)
            self.buffers = self.channel.buffers
        else:
            size = self.over_link.buffer_bytes
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]

    def send(self, check: bool = False) -> Sums:
        """One push over the link, after ``listen`` and ``connect``: gathers one bucket while the last is on its way.

        Returns the checksums that the other end must have, begun once a bucket is on its way; {} unless asked to
        ``check``.
        """
        if not self.buffers:
            raise RuntimeError("a push before its source has connected: nothing would be sent")
        overlap = self.link is None or self.link.overlaps
        truth = self._truth(self.over_link, overlap) if check else None
        push = self.pushes
        self.pushes += 1
        on_way: list[Pending | None] = [None] * BUFFERS
        for number, bucket in enumerate(self.over_link.buckets):
            slot = number % BUFFERS
            if (before := on_way[slot]) is not None:
                before.wait()
            buffer = self.buffers[slot]
            self.gatherer.fill(views(bucket, buffer))
            if self.channel is not None:
                on_way[slot] = self.channel.send(push, number, used(bucket, buffer))
            if truth is not None:
                truth.tally.add(number)
        for pending in on_way:
            if pending is not None:
                pending.wait()
        return truth.result() if truth is not None else {}

    def fill(self, targets: Mapping[str, Tensor], check: bool = False) -> Sums:
        """Writes all weights into tensors of this process, a layer's worth at a time, and of what moves alone from the
        second time on. Returns what ``send`` does, of all."""
        plan = plan_of(targets.items())
        now = plan_of((name, targets[name]) for name in self.moving) if self.filled and self.moving else plan
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
        if self.channel is not None:
            self.channel.close()
        if self.meeting is not None:
            self.meeting.close()
        self.channel, self.meeting, self.buffers = None, None, []
