"""Engines that do not hold what is pushed to them, built in a worker like the true one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch

import tandem.engines.vllm.engine as true
from tandem.engines.vllm.engine import VLLMEngine
from tandem.engines.vllm.setup import vllm_engine
from tandem.types import Held


class Deaf(VLLMEngine):
    """Takes a push off the wire and throws it away."""

    def receive(self, version: int, check: bool = False) -> Seq[int | None]:
        with self.stepper.exclusive():
            self._engine.collective_rpc(_drop)
        self.core.version = version
        return []

    def held(self) -> list[Held]:
        return []


class Damaged(VLLMEngine):
    """One number of one parameter is changed after each push."""

    def receive(self, version: int, check: bool = False) -> Seq[int | None]:
        super().receive(version)
        with self.stepper.exclusive():
            self._engine.collective_rpc(_damage)
        return self.checksums() if check else []


def deaf_engine(site: Any, **options: Any) -> Any:
    return _build(Deaf, site, options)


def damaged_engine(site: Any, **options: Any) -> Any:
    return _build(Damaged, site, options)


def _build(kind: type[VLLMEngine], site: Any, options: dict[str, Any]) -> Any:
    # This process is the engine's own, and ends with it.
    true.VLLMEngine = kind  # type: ignore[misc]
    engine = vllm_engine(site, **options)
    assert type(engine) is kind
    return engine


def _drop(worker: Any) -> None:
    for _ in worker.weight_transfer_engine.receiver.buckets():
        pass


@torch.no_grad()
def _damage(worker: Any) -> None:
    worker.model_runner.model.get_parameter("model.norm.weight")[3] += 1e-3
