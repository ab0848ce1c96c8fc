"""Faults of weights on their way to a real vLLM, at either end, and the push at which each is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch

from helpers.faults import NEVER, QUERY, Faulty, all_at_once, pushes_until_seen
from helpers.vllm_models import Pusher
from tandem.sync.check import require_equal
from tandem.sync.receiver import Receiver

__all__ = ["QUERY", "all_at_once", "faults_seen"]


def faults_seen(pusher: Pusher, end: Literal["sender", "engine"]) -> dict[str, tuple[int, str]]:
    """``faults.pushes_until_seen``. The engine's end is where a bucket has come off the wire, in this process."""
    faulty = Faulty()
    parameters = pusher.source.gatherer.parameters

    @torch.no_grad()
    def step() -> None:
        for parameter in parameters.values():
            parameter.mul_(1.01)
        faulty.record(parameters)
        sums = pusher.push(0)
        require_equal("the engine", sums, pusher.engine.held(), pusher.found)

    with pytest.MonkeyPatch.context() as patch:
        if end == "sender":
            faulty.sender(pusher.source.gatherer)
        else:
            patch.setattr(Receiver, "buckets", _spoiled(Receiver.buckets, faulty))
        return pushes_until_seen(step, faulty)


def _spoiled(buckets: Any, faulty: Faulty) -> Any:
    def after(self: Receiver) -> Iterator[Any]:
        for bucket in buckets(self):
            if faulty.fault == NEVER:
                for _, tensor in bucket:
                    tensor.zero_()
            faulty.spoil(bucket)
            yield bucket

    return after
