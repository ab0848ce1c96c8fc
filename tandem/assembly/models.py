"""Builds each role where it will live: in this process, or in a worker to which these functions and configs travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tandem.assembly.sections import EngineSection, ModelSection, SamplingSection
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.replica import ReplicaEngine
from tandem.errors import UserError
from tandem.models.forward import LoadedModel
from tandem.models.loading import load_causal, load_scalar
from tandem.roles import Engine, FedEngine, LossFn, SleepingEngine
from tandem.sync.checksum import Sums
from tandem.sync.source import WeightSource
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalScorer, LocalTrainer, MemoryParams
from tandem.types import Held
from tandem.workers.process import Site


def load_policy(site: Site, section: ModelSection, source: str | None = None) -> LoadedModel:
    """The causal LM of a run (or another, ``source``) on this process's device."""
    return load_causal(
        source or section.model,
        dtype=section.dtype,
        device=str(site.world.device),
        trust_remote_code=section.trust_remote_code,
    )


def load_scorer(site: Site, section: ModelSection, source: str, new_head: Any, seed: int = 0) -> LoadedModel:
    """A model with a scalar head on this process's device."""
    return load_scalar(
        source,
        new_head=new_head,
        seed=seed,
        dtype=section.dtype,
        device=str(site.world.device),
        trust_remote_code=section.trust_remote_code,
    )


def policy_trainer(
    site: Site, section: ModelSection, loss: LossFn, optim: OptimParams, options: Mapping[str, Any]
) -> LocalTrainer:
    """A trainer of the run's causal LM. ``options``: temperature and entropies (``LocalTrainer``)."""
    return _trainer(site, load_policy(site, section), section, loss, optim, options)


def scalar_trainer(
    site: Site, section: ModelSection, source: str, new_head: str, seed: int, loss: LossFn, optim: OptimParams
) -> LocalTrainer:
    """A trainer of a model with a scalar head: a critic or a reward model."""
    return _trainer(site, load_scorer(site, section, source, new_head, seed), section, loss, optim, {})


def _trainer(
    site: Site,
    model: LoadedModel,
    section: ModelSection,
    loss: LossFn,
    optim: OptimParams,
    options: Mapping[str, Any],
) -> LocalTrainer:
    memory = MemoryParams(
        keep_gathered=section.keep_gathered,
        offload=section.offload,
        activation_checkpointing=section.activation_checkpointing,
    )
    return LocalTrainer(
        model,
        loss,
        optim,
        token_budget=section.token_budget,
        world=site.world,
        memory=memory,
        compile=section.compile,
        **options,
    )


def reference_scorer(site: Site, section: ModelSection, source: str, temperature: float) -> LocalScorer:
    """The frozen reference."""
    return _scorer(site, load_policy(site, section, source), section, temperature)


def reward_scorer(site: Site, section: ModelSection, source: str) -> LocalScorer:
    """A reward model, whose head must have been trained."""
    return _scorer(site, load_scorer(site, section, source, "refuse"), section, 1.0)


def _scorer(site: Site, model: LoadedModel, section: ModelSection, temperature: float) -> LocalScorer:
    return LocalScorer(
        model,
        token_budget=section.token_budget,
        temperature=temperature,
        world=site.world,
        offload=section.offload_frozen,
        compile=section.compile,
    )


def weight_source(site: Site) -> WeightSource:
    """Beside the actor: its weights, to be pushed."""
    actor: LocalTrainer = site.roles["actor"]
    return WeightSource(actor.parameters, actor.model.device)


def live_engine(site: Site, sampling: SamplingSection, engine: EngineSection) -> Engine:
    """In the actor's only process: samples on the actor's own weights, and nothing is ever copied."""
    actor: LocalTrainer = site.roles["actor"]
    return LiveEngine(
        actor.model.module,
        actor.model.tokenizer,
        max_slots=sampling.max_slots,
        max_length=engine.max_length,
        way=engine.way,
        kv_cache_dtype=engine.kv_cache_dtype,
        version=lambda: actor.version,
    )


def replica_engine(site: Site, section: ModelSection, sampling: SamplingSection, engine: EngineSection) -> FedEngine:
    """A live engine with weights of its own."""
    return ReplicaEngine(
        load_policy(site, section),
        max_slots=sampling.max_slots,
        max_length=engine.max_length,
        way=engine.way,
        kv_cache_dtype=engine.kv_cache_dtype,
    )


class Replicas:
    """Beside sharded actors: fills the replica of this process with gathered weights. A collective over the ranks."""

    def __init__(self, site: Site) -> None:
        self.actor: LocalTrainer = site.roles["actor"]
        self.engine: ReplicaEngine = site.roles["engine"]
        self.source = WeightSource(self.actor.parameters, self.actor.model.device)

    def push(self, check: bool) -> tuple[Sums, list[Held]]:
        """The engine holds the actor's weights when this returns: the checksums of both, if asked to ``check``."""
        sums = self.source.fill({name: p.data for name, p in self.engine.parameters.items()}, check)
        self.engine.version = self.actor.version
        if self.source.gatherer.device.type == "cuda":
            torch.cuda.synchronize()
        return sums, self.engine.checksums() if check else []


def vllm_engine(
    site: Site, section: ModelSection, sampling: SamplingSection, engine: EngineSection, seed: int, shared: bool
) -> SleepingEngine:
    """vLLM in this process, on its devices."""
    # Imported here, where it is known to be wanted: it takes seconds, and not every machine has it.
    from tandem.engines.vllm.engine import VLLMEngine

    share = engine.memory_share if engine.memory_share or not shared else 0.6
    on_gpu = site.world.device.type == "cuda"
    return VLLMEngine(
        section.model,
        dtype=section.dtype,
        max_slots=sampling.max_slots,
        max_length=engine.max_length,
        tensor_parallel=engine.tensor_parallel,
        memory_share=share if on_gpu else None,
        seed=seed,
        seeded=engine.seeded,
        trust_remote_code=section.trust_remote_code,
        sleep=shared and on_gpu and engine.sleep,
        arguments=engine.vllm_arguments,
        own_process=True,
    )


def require_engine(engine: EngineSection) -> None:
    """Raises UserError where the engine that is asked for is not installed, before anything is loaded."""
    if engine.kind == "vllm":
        from tandem.engines.vllm.engine import check_vllm

        try:
            check_vllm()
        except UserError as error:
            raise UserError(f"engine.kind vllm: {error}") from None
