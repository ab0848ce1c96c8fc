"""One rank's engine of a loop's sampler: in this process, or vLLM in a child of it; and how weights get there."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tandem.engines.live.replica import ReplicaEngine
from tandem.engines.vllm.setup import VLLMParams, vllm_engine
from tandem.errors import UserError
from tandem.models.loading import load_causal
from tandem.models.moe.routers import all_weights
from tandem.models.text_config import config_in
from tandem.models.trusted import is_trusted
from tandem.own_loop.their_model import GivenModel, Shapes
from tandem.parallel.world import World
from tandem.sync.check import TruthCheck, require_equal
from tandem.sync.push import PushParams, WeightPush
from tandem.sync.source import WeightSource
from tandem.types import Completion, Request
from tandem.workers.child import Child
from tandem.workers.homes import Aside
from tandem.workers.process import Site

SHARE_BESIDE_TRAINER = 0.4
"""Of a GPU's memory, for vLLM's weights and cache on a GPU that trains, too."""


@dataclass(frozen=True, kw_only=True)
class EngineParams(VLLMParams):
    """What a loop's engine is made of: see ``tandem.own_loop.sampler.Sampler``."""

    device: torch.device
    check: bool
    deadline_s: float
    own_process: bool = True


class InProcess:
    """Tandem's live engine, with weights of its own: it samples with those that it was last given."""

    def __init__(self, params: EngineParams) -> None:
        model = load_causal(params.model, dtype=params.dtype, device=str(params.device))
        self.engine = ReplicaEngine(model, max_slots=params.max_slots, max_length=params.max_length)
        self.shapes: Shapes = {name: tuple(p.shape) for name, p in self.engine.parameters.items()}
        """The shapes of the parameters that it must be given."""
        self.config = model.module.config
        self.device, self.check = params.device, params.check
        self.filled = False
        """Whether it still holds what it was given."""

    def require_alive(self) -> None:
        """Nothing: it is as alive as this process."""

    def fill(self, model: GivenModel, step: int) -> None:
        """Takes over the model's weights. A collective where they are sharded."""
        self.filled = False
        source = WeightSource(model.parameters, gathering_device(model, self.device))
        sums = source.fill({name: p.data for name, p in self.engine.parameters.items()}, self.check)
        if self.check:
            require_equal(f"after step {step} the sampler", sums, self.engine.held(), self.engine.checksums())
        self.engine.version = step
        self.filled = True

    def logprobs(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        with self._in_its_dtype():
            return self.engine.logprobs(sequences)

    def generate(self, requests: Seq[Request]) -> list[list[Completion]]:
        with self._in_its_dtype():
            return self.engine.generate(requests)

    def _in_its_dtype(self) -> torch.autocast:
        """The loop may call from within an autocast of its own."""
        return torch.autocast(self.device.type, enabled=False)

    def close(self) -> None:
        self.engine.close()


class InChild:
    """As ``InProcess``: vLLM in a process of its own, on this rank's device, fed over a link. With ``sleep`` it gives
    the GPU's memory back after sampling, and its weights with it."""

    def __init__(self, params: EngineParams, name: str) -> None:
        self.params = params
        self.config = config_in(params.model)
        self.shapes: Shapes = shapes_of(self.config, params.model)
        gpu = str(torch.cuda.get_device_properties(params.device).uuid) if params.device.type == "cuda" else None
        self.child = Child(name, gpu=gpu, deadline_s=params.deadline_s)
        self.push: WeightPush | None = None
        self.aside: Aside | None = None
        self.source: WeightSource | None = None
        self.asleep = False
        self.filled = False
        try:
            self.engine = self.child.place("engine", partial(vllm_engine, params=params))
            self._sleep()
        except BaseException:
            self.child.close()
            raise

    def require_alive(self) -> None:
        """Raises UserError where it can no longer be used."""
        if self.child.closed:
            raise UserError("the sampler is closed; make another one")
        if not self.child.alive:
            raise self.child.died("the time between two calls")

    def fill(self, model: GivenModel, step: int) -> None:
        self.filled = False
        self._wake()
        device = gathering_device(model, self.params.device)
        if device.type == "cuda":
            # The push has a thread of its own, and comes after what the loop has under way.
            torch.cuda.current_stream(device).synchronize()
        if self.source is None or self.push is None:
            self.source = source = WeightSource(model.parameters, device)
            self.aside = Aside(Site(World(device=device)))
            # The probe is left to the sampler: a forward of a sharded model is for all ranks together, also where one
            # of them has found a wrong checksum.
            self.push = WeightPush(
                self.aside.place("source", lambda site: source),
                self.engine,
                PushParams(dtype=self.params.dtype),
                TruthCheck(None, self.engine, count=1, dtype=self.params.dtype, on=self.params.check),
            )
            self.push.connect()
        # Parameters are other objects where another model is given, and where a forward had left them gathered.
        self.source.parameters = self.source.gatherer.parameters = model.parameters
        self.push(step)
        self.filled = True

    def logprobs(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        return self.engine.call("logprobs", sequences)

    def generate(self, requests: Seq[Request]) -> list[list[Completion]]:
        try:
            return self.engine.call("generate", requests) if requests else []
        finally:
            if self.child.alive:
                self._sleep()

    def close(self) -> None:
        self.child.close()
        if self.aside is not None:
            self.aside.close()
        if self.source is not None:
            self.source.close()

    def _sleep(self) -> None:
        if self.params.sleep:
            self.filled = False
            self.engine.call("sleep")
            self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            # Memory that the trainer's allocator keeps for later is what vLLM is about to ask for.
            torch.cuda.empty_cache()
            for stage in ("weights", "cache"):
                self.engine.call("wake", stage)
            self.asleep = False


def gathering_device(model: GivenModel, device: torch.device) -> torch.device:
    """Where whole parameters come together: on the sampler's device, unless the ranks share on the CPU only."""
    return torch.device("cpu") if model.mesh_device == "cpu" else device


def shapes_of(config: Any, source: str) -> Shapes:
    """Names and shapes of the parameters that a causal LM has whose config this is."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=is_trusted(source))
    return {name: tuple(parameter.shape) for name, parameter in all_weights(module).items()}
