"""The engine's end: one push after another, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tandem.sync.links import BUFFERS, Link, Pending, open_channel
from tandem.sync.meeting import Meeting
from tandem.sync.plan import used, views


class Receiver:
    """One receiving end of a link, on ``device``."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link = link
        self.meeting = Meeting(link)
        self.channel = open_channel(link, self.meeting.store, device)
        self.pushes = 0

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The buckets of one push, each a list of (name, tensor).

        Tensors are valid until the next bucket is asked for, which is on its way meanwhile. They lie on the CPU
        with gloo, else on the device.
        """
        push, channel, buckets = self.pushes, self.channel, self.link.plan.buckets
        self.pushes += 1
        coming = self._fetch(push, 0)
        for number, bucket in enumerate(buckets):
            here = coming
            if number + 1 < len(buckets):
                coming = self._fetch(push, number + 1)
            here.wait()
            yield views(bucket, channel.buffers[number % BUFFERS])
            channel.taken(push, number)

    def _fetch(self, push: int, number: int) -> Pending:
        bucket = self.link.plan.buckets[number]
        return self.channel.receive(push, number, used(bucket, self.channel.buffers[number % BUFFERS]))

    def close(self) -> None:
        self.channel.close()
        self.meeting.close()
