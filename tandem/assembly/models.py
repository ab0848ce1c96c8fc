"""Builds each role where it will live: in this process, or in a worker to which these functions and configs travel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from tandem.assembly.configs.methods import RunConfig, SamplesConfig, warmup_of
from tandem.assembly.configs.role_sections import is_reward_model
from tandem.assembly.configs.sections import EngineSection, ModelSection, OptimSection, as_adapters
from tandem.batch import Asks
from tandem.config import settings
from tandem.data.chat import set_template
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.replica import ReplicaEngine
from tandem.errors import UserError
from tandem.futures import Done, Future
from tandem.kernels.quantized import require_bitsandbytes
from tandem.models.description import check_targets
from tandem.models.folder import readable_errors, with_config
from tandem.models.forward import LoadedModel
from tandem.models.loading import load_causal, load_scalar, load_tokenizer
from tandem.models.lora.adapters import AdapterParams, require_peft
from tandem.models.lora.folder import adapter_folder
from tandem.models.moe.routers import require_biases, require_experts
from tandem.models.quantized.folder import quantized_kind
from tandem.models.quantized.layers import dequantize_module, share_codes
from tandem.models.shared import scalar_beside
from tandem.models.weights import require_reader
from tandem.roles import Engine, FedEngine, LossFn, Seat
from tandem.runs.progress import say
from tandem.sync.checksum import Sums
from tandem.sync.source import WeightSource
from tandem.training.optim import OptimParams, require_adamw8bit
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer, MemoryParams
from tandem.training.views import View
from tandem.workers.process import Build, Site

Head = Literal["lm", "scalar"]
NewHead = Literal["refuse", "random", "zero"]


def heads(config: RunConfig) -> dict[str, Head]:
    """The head of every model that a run may have, by role."""
    found: dict[str, Head] = {role: "scalar" for role in config.sources if is_reward_model(role)}
    return found | {"actor": config.method.head} | {need.role: need.head for need in config.method.models}


def scalar_roles(config: RunConfig) -> list[str]:
    """The roles of models with one number a token."""
    return [role for role, head in heads(config).items() if head == "scalar"]


def load_models(
    config: RunConfig,
    begin: Callable[[str, Build], Future[Seat]],
    steps: int,
    idle: Collection[str] = (),
    new_head: NewHead = "random",
) -> dict[str, Seat]:
    """Every trainer and scorer by role, made where ``begin`` puts it, but those that are ``idle``. See ``builds``.

    Those of several groups of processes are made at the same time.
    """
    begun: dict[str, Future[Seat]] = {}
    for role, build in builds(config, steps, new_head).items():
        if role in idle:
            continue
        if not config.is_view(role):
            say(f"loading the {role} from {config.sources[role]}")
        begun[role] = begin(role, build)
        if isinstance(begun[role], Done):
            say(f"  {begun[role].result().call('describe')}")
    models = {role: seat.result() for role, seat in begun.items()}
    for role, seat in models.items():
        if not isinstance(begun[role], Done):
            say(f"  the {role}: {seat.call('describe')}")
    for role in models:
        if config.method.asks_of(role).states:
            # The policy gets the head of a teacher that hands over its hidden states.
            models["actor"].call("learn_from", models[role].call("head"))
    return models


def builds(config: RunConfig, steps: int, new_head: NewHead = "random") -> dict[str, Build]:
    """For every model of the run, by role, what makes it where it will live: a trainer, or a scorer that is frozen.

    ``steps`` is the run's length, ``new_head`` what becomes of a scalar head that the policy's folder lacks.
    """
    method, head_of, losses = config.method, heads(config), config.method.losses()
    temperature = config.sampling.temperature if isinstance(config, SamplesConfig) else 1.0
    template = _template(config)
    found: dict[str, Build] = {}
    for role, source in config.sources.items():
        model = partial(load, section=config.model, source=source, head=head_of[role], seed=config.run.seed)
        asks = method.asks_of(role, temperature)
        if config.is_view(role):
            found[role] = partial(view, temperature=asks.temperature, follows=config.following is not None)
            continue
        if role not in losses:
            found[role] = partial(frozen, load=model, section=config.model, asks=asks)
            continue
        adapters = adapter_params(config, role) if config.lora.on else None
        if role == "actor":
            model = partial(model, new_head=new_head, chat_template=template, adapters=adapters)
        elif adapters is not None and config.is_shared(role):
            model = partial(beside_actor, source=source, adapters=adapters)
        else:
            model = partial(model, new_head="zero", adapters=adapters)
        optim = optim_params(config.optim, steps)
        if role != "actor":  # the average and the balance are the policy's
            rate = config.models.learning_rate(role)
            optim = replace(optim, learning_rate=rate, ema_decay=None, aux_loss_coef=0.0, bias_update_speed=0.0)
        found[role] = partial(trained, load=model, section=config.model, loss=losses[role], optim=optim, asks=asks)
    return found


def adapter_params(config: RunConfig, role: str) -> AdapterParams:
    """The adapters that a trained model gets: new ones, or those of its folder, where its base stays as it is."""
    lora, source = config.lora, config.sources[role]
    keeps = role == "actor" or config.is_shared(role)
    return AdapterParams(
        **as_adapters(lora),
        folder=source if keeps and adapter_folder(source) is not None else None,
        beside=role != "actor",
        seed=config.run.seed,
        quantize=lora.quantize,
    )


def _template(config: RunConfig) -> str | None:
    """The chat template that goes into the trained model's folder, where the config names one."""
    if config.data.chat_template is None:
        return None
    tokenizer = load_tokenizer(config.model.source)
    set_template(tokenizer, config.data.chat_template)
    return tokenizer.chat_template


def optim_params(section: OptimSection, total_steps: int) -> OptimParams:
    """The policy's optimizer, whose parameters are the section's keys; ``total_steps`` are the run's."""
    warmup = {"warmup_steps": warmup_of(section, total_steps)}
    return OptimParams(total_steps=total_steps, **settings(section) | warmup)


def load(
    site: Site,
    section: ModelSection,
    source: str,
    head: Head = "lm",
    new_head: NewHead = "refuse",
    seed: int = 0,
    chat_template: str | None = None,
    adapters: AdapterParams | None = None,
) -> LoadedModel:
    """A model on this process's device. ``new_head``: what becomes of a scalar head that its folder lacks.

    ``chat_template``, the text of one, takes the place of its tokenizer's; ``adapters`` are put on it.
    """
    options: dict[str, Any] = {
        "dtype": section.dtype,
        "device": str(site.world.device),
        "adapters": adapters,
    }
    model = (
        load_causal(source, **options) if head == "lm" else load_scalar(source, new_head=new_head, seed=seed, **options)
    )
    if chat_template is not None:
        model.tokenizer.chat_template = chat_template
    return model


def beside_actor(site: Site, source: str, adapters: AdapterParams) -> LoadedModel:
    """A critic on the base of the actor of this process, which has its own adapters."""
    actor: LocalTrainer = site.roles["actor"]
    return scalar_beside(actor.model, source, adapters)


def trained(
    site: Site,
    load: Callable[[Site], LoadedModel],
    section: ModelSection,
    loss: LossFn,
    optim: OptimParams,
    asks: Asks | None = None,
) -> LocalTrainer:
    """A trainer of the model that ``load`` gives."""
    memory = MemoryParams(
        keep_gathered=section.keep_gathered,
        offload=section.offload,
        activation_checkpointing=section.activation_checkpointing,
    )
    return LocalTrainer(
        load(site),
        loss,
        optim,
        token_budget=section.token_budget,
        asks=asks,
        world=site.world,
        memory=memory,
        compile=section.compile,
    )


def frozen(
    site: Site, load: Callable[[Site], LoadedModel], section: ModelSection, asks: Asks | None = None
) -> LocalScorer:
    """A scorer with the model that ``load`` gives."""
    return LocalScorer(
        load(site),
        token_budget=section.token_budget,
        asks=asks,
        world=site.world,
        offload=section.offload_frozen,
        compile=section.compile,
    )


def view(site: Site, temperature: float, follows: bool) -> View:
    """Beside the actor: the policy as it began, on its own weights."""
    return View(site.roles["actor"], temperature=temperature, follows=follows)


def weight_source(site: Site, fold: bool = False, scaled: bool = False) -> WeightSource:
    """Beside the actor: its weights, to be pushed; ``fold``: with its adapters folded in; ``scaled``: these scaled."""
    actor: LocalTrainer = site.roles["actor"]
    policy, device = actor.policy, actor.model.device
    if policy.adapters is None or fold:
        return WeightSource(policy.merged(), device)
    return WeightSource(policy.scaled() if scaled else actor.parameters, device, moving=policy.trained)


def live_engine(site: Site, options: Mapping[str, Any]) -> Engine:
    """In the actor's only process: samples on the actor's own weights, and nothing is ever copied.

    ``options`` are ``LiveEngine``'s.
    """
    actor: LocalTrainer = site.roles["actor"]
    return LiveEngine(actor.model.module, actor.model.tokenizer, version=lambda: actor.version, **options)


def replica_engine(
    site: Site,
    section: ModelSection,
    options: Mapping[str, Any],
    adapters: AdapterParams | None = None,
    whole: bool = False,
) -> FedEngine:
    """A live engine with weights of its own, and ``adapters`` of its own; ``options`` are ``LiveEngine``'s.

    Beside an actor with a base in few bits it has that one, which no step changes; ``whole``: none in few bits.
    """
    model = load(site, section, section.source, adapters=adapters)
    if whole:
        dequantize_module(model.module)
    elif (actor := site.roles.get("actor")) is not None:
        share_codes(actor.model.module, model.module)
    return ReplicaEngine(model, **options)


class Replicas:
    """Beside sharded actors: fills the replica of this process with gathered weights. A collective over the ranks."""

    def __init__(self, site: Site, fold: bool = False) -> None:
        """``fold``: with the actor's adapters folded in."""
        self.actor: LocalTrainer = site.roles["actor"]
        self.engine: ReplicaEngine = site.roles["engine"]
        self.source = weight_source(site, fold)

    def push(self, check: bool) -> tuple[Sums, Seq[int | None]]:
        """The engine holds the actor's weights when this returns: the checksums of both, if asked to ``check``."""
        sums = self.source.fill({name: p.data for name, p in self.engine.parameters.items()}, check)
        self.engine.version = self.actor.version
        if self.source.gatherer.device.type == "cuda":
            torch.cuda.synchronize()
        return sums, self.engine.checksums() if check else []


def require_trainable(config: RunConfig) -> None:
    """Raises UserError, before anything is loaded, where a library that training asks for is not installed, where
    adapters are to be on what a model has not, or experts of a policy are to be balanced that has none."""
    if config.optim.optimizer == "adamw8bit":
        require_adamw8bit()
    if config.lora.on or any(adapter_folder(source) is not None for source in config.sources.values()):
        require_peft()
    if config.quantized not in (None, "fp8"):
        require_bitsandbytes()
    for source in config.sources.values():
        if quantized_kind(source) is not None:
            require_reader(source)
    for role in config.method.losses() if config.lora.on else ():
        params = adapter_params(config, role)
        if params.folder is None and not config.is_shared(role):
            check_targets(config.sources[role], params, scalar=role in scalar_roles(config))
    source = config.model.source
    asked = {require_experts: config.optim.aux_loss_coef, require_biases: config.optim.bias_update_speed}
    for require in (require for require, wanted in asked.items() if wanted):
        with readable_errors(source, "causal language model"):
            require(with_config(source))


def require_engine(engine: EngineSection) -> None:
    """Raises UserError where the engine that is asked for is not installed, or cannot be told what it is to be told.

    Before anything is loaded.
    """
    if engine.kind == "vllm":
        from tandem.engines.vllm.setup import check_arguments, check_vllm

        try:
            check_arguments(engine.vllm_arguments)
            check_vllm()
        except UserError as error:
            raise UserError(f"engine.kind vllm: {error}") from None
