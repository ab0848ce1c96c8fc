"""Nobody else comes to where the ends of a link meet."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.pushes import model_of, pushing

from tandem.engines.live.replica import ReplicaEngine
from tandem.errors import UserError
from tandem.parallel.world import LOOPBACK
from tandem.sync import links
from tandem.sync.links import Link
from tandem.sync.meeting import GREETING_S, Meeting
from tandem.sync.plan import Plan, TensorSpec
from tandem.sync.push import WeightPush

OTHER = "127.0.0.2"
"""This machine by another name, for one that is elsewhere."""


def listening() -> set[str]:
    """Where this process listens, ``address:port`` in /proc's hexadecimal."""
    mine = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            mine.add(os.readlink(fd))
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


def test_on_one_machine_all_that_listens_is_the_loopback():
    before = listening()
    push, _ = pushing(ReplicaEngine(model_of(1)))
    # Sockets, not addresses: what an earlier test has left open listens on the loopback, too.
    assert {where.partition(":")[0] for where in listening() - before} == {"0100007F"}
    push(1)


@pytest.fixture
def sender() -> Iterator[tuple[Link, Meeting]]:
    """The link of a receiver that is on another machine, and the sender's end of it."""
    plan = Plan((TensorSpec("weight", (4,), "float32"),))
    link = Link("gloo", OTHER, 0, 0, 2, plan, timeout_s=3, secret="known to both")
    meeting = Meeting(link)
    yield replace(link, port=meeting.port, rank=1), meeting
    meeting.close()


def test_from_another_machine_one_comes_with_the_secret(sender):
    link, meeting = sender
    assert "0200007F" in {where.partition(":")[0] for where in listening()}
    # A stranger who says nothing keeps nobody from coming.
    with socket.create_connection((OTHER, link.port)):
        receiver = Meeting(link)
        meeting.store.set("from the sender", b"\x00" * 100_000)
        assert receiver.store.get("from the sender") == b"\x00" * 100_000
        receiver.store.set("from the receiver", "there")
        meeting.store.wait(["from the receiver"], timedelta(seconds=3))
        receiver.close()


def test_without_the_secret_nothing_is_read_or_written(sender):
    link, meeting = sender
    meeting.store.set("buffers", "handles")
    with pytest.raises(UserError, match=f"weight sync: no answer from {OTHER}:{link.port}"):
        Meeting(replace(link, secret="guessed", timeout_s=1))
    with pytest.raises((dist.DistError, RuntimeError)):
        dist.TCPStore(OTHER, link.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((OTHER, meeting.store.port), GREETING_S)
    assert meeting.store.list_keys() == ["buffers"]


def test_a_push_between_two_machines(monkeypatch):
    link_of = WeightPush._link
    monkeypatch.setattr(WeightPush, "_link", lambda *given: replace(link_of(*given), host=OTHER))
    engine = ReplicaEngine(model_of(1))
    push, trainer = pushing(engine)
    push(1)
    assert all(torch.equal(engine.parameters[name], p) for name, p in trainer.parameters.items())


def test_a_buffers_handle_is_plain_data(monkeypatch):
    """What CUDA IPC needs goes through the store as numbers and bytes, and arrives as it was."""
    of_tensor = (torch.Tensor, (8,), (1,), 0, torch.storage.TypedStorage, torch.uint8)
    of_memory = (b"\x80handle", 1 << 21, 512, False, b"counter", 3, b"event", True)
    monkeypatch.setattr(links, "reduce_tensor", lambda buffer: (None, (*of_tensor, 5, *of_memory)))
    monkeypatch.setattr(links, "rebuild_cuda_tensor", lambda *arguments: arguments)
    sent = json.dumps(links._handle(torch.zeros(8, dtype=torch.uint8)))
    assert links._rebuild(json.loads(sent), 8, torch.device("cuda", 2)) == (*of_tensor, 2, *of_memory)
    assert LOOPBACK == "127.0.0.1"
