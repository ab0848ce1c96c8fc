"""The trainer's end: gathers one bucket while the last one is on its way."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.parallel.gather import Gatherer
from tandem.sync.checksum import ParameterSums, Sums
from tandem.sync.links import BUFFERS, Channel, Link, Pending, open_channel
from tandem.sync.meeting import Meeting
from tandem.sync.plan import Plan, used, views


class Sender:
    """One sending end. A trainer rank without receivers of its own (no link) still takes part in the gathering."""

    def __init__(self, gatherer: Gatherer, plan: Plan) -> None:
        self.gatherer = gatherer
        self.plan = plan
        self.pushes = 0
        self.link: Link | None = None
        self.meeting: Meeting | None = None
        self.channel: Channel | None = None
        self.buffers: list[Tensor] = []

    def listen(self, link: Link) -> int:
        """Opens the place where receivers will look for this end. Returns its port."""
        self.link = link
        self.meeting = Meeting(link)
        return self.meeting.port

    def connect(self) -> None:
        """Connects to the receivers, which connect at the same time."""
        if self.link is not None and self.meeting is not None:
            self.channel = open_channel(self.link, self.meeting.store, self.gatherer.device)
            self.buffers = self.channel.buffers
        else:
            size, device = self.plan.buffer_bytes, self.gatherer.device
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]

    def send(self, truth: ParameterSums | None = None) -> Sums:
        """One push of all weights. Returns the sums of ``truth``, begun once a bucket is on its way; {} without."""
        push = self.pushes
        self.pushes += 1
        on_way: list[Pending | None] = [None] * BUFFERS
        for number, bucket in enumerate(self.plan.buckets):
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

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        if self.meeting is not None:
            self.meeting.close()
