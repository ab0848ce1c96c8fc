"""Builds the engine of a run where it lives, together with the way in which new weights reach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tandem.assembly.configs.sections import DrawsSection, EngineSection, SamplingSection, ScheduleSection
from tandem.assembly.models import Replicas, live_engine, replica_engine, weight_source
from tandem.assembly.placing import Homes
from tandem.engines.live.engine import LiveEngine
from tandem.engines.vllm.adapters import room_of
from tandem.engines.vllm.setup import VLLMParams, in_full, vllm_engine
from tandem.models.folder import with_tokenizer
from tandem.models.lora.folder import base_of
from tandem.models.proof.limits import layers_of, model_config
from tandem.models.proof.shrunk import furthest_limit
from tandem.models.quantized.folder import quantized_kind
from tandem.roles import Device, Engine, FedEngine, HoldingEngine, Home, Metrics, Seat
from tandem.runs.progress import say
from tandem.sync.check import BEYOND, TruthCheck
from tandem.sync.push import FillPush, PushParams, WeightPush, between_sequences
from tandem.sync.turns import TakingTurns
from tandem.workers.engines import EngineGroup, RestartingOnce
from tandem.workers.group import Placing, WorkerGroup
from tandem.workers.homes import Aside, Here
from tandem.workers.process import Build

SHARE_BESIDE_ACTOR = 0.6
"""Of a GPU's memory, for vLLM's weights and cache on the actor's devices, unless the config says another."""
CALLS_AT_A_TIME = 8
"""A process that is there for an engine alone makes 8 calls at once: it takes pushes while it is waited for."""


@dataclass(frozen=True, kw_only=True)
class WiredEngine:
    """An engine, how new weights reach it (metrics of the push), and a line that says what it is."""

    engine: Engine
    push: Callable[[int], Metrics]
    about: str


@dataclass(kw_only=True)
class Wiring:
    """What the engine of a run is made of, beside the actor or in processes of its own."""

    homes: Homes
    sampling: SamplingSection
    seed: int
    vocabulary: int
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    """What becomes of samples that run when weights change, where there are any then."""
    begun: Placing | None = field(default=None, init=False)
    """Engines that have processes of their own and are being loaded there."""

    def begin(self) -> Placing | None:
        """Begins to load engines that have processes of their own, unless that has been done: beside the actor.

        None where they live with the actor, and where vLLM must know of it which adapters it will be fed.
        """
        vllm = self.homes.engine.kind == "vllm"
        if self.begun is None and not self._beside_actor and not (vllm and self.homes.fed_adapters is not None):
            group = self._group(self.homes.placement.workers("engine"))
            if vllm:
                say("starting vLLM")
            self.begun = group.begin("engine", self._fed_vllm(None, shared=False) if vllm else self.replica())
        return self.begun

    def engine(self, models: Mapping[str, Seat]) -> WiredEngine:
        """Builds it, and connects it to the actor where weights travel. ``models``: trainers and scorers by role."""
        if self.homes.engine.kind == "vllm":
            return self._vllm(models)
        if self._beside_actor:
            return self._live_beside_actor()
        begun = self.begin()
        assert begun is not None
        engines = begun.result()
        link = self._link(self._source(), engines)
        about = f"live, {begun.group.size} of its own, fed over {link.transport}"
        # With a lag a few groups begin at a time, and go to who has least to do.
        shared_out = begun.group.size > 1 and not self.schedule.max_lag
        several = EngineGroup(begun.group, alone=True, slots=self.sampling.max_slots if shared_out else None)
        return WiredEngine(engine=several, push=self._pushed(several, link), about=about)

    def replica(self) -> Build:
        """What makes a live engine with weights of its own, which are fed."""
        homes = self.homes
        return partial(
            replica_engine,
            section=homes.model,
            options=self._live_options,
            adapters=homes.fed_adapters,
            whole=homes.fold,
        )

    @property
    def _beside_actor(self) -> bool:
        return self.homes.placement.home("engine") == "actor"

    @property
    def _live_options(self) -> dict[str, Any]:
        stale = "recompute" if self.schedule.stale_cache == "recompute" else "keep"
        return live_options(self.homes.engine, self.sampling) | {"stale_cache": stale}

    def _pushed(self, engine: HoldingEngine, push: Callable[[int], Metrics]) -> Callable[[int], Metrics]:
        return between_sequences(engine, push) if self.schedule.weights_change == "between-sequences" else push

    def _live_beside_actor(self) -> WiredEngine:
        homes, home = self.homes, self.homes.of("actor")
        count = len(home.devices)
        if not homes.fold and (isinstance(home, Here) or (count == 1 and homes.model.offload != "parameters")):
            home.place("engine", partial(live_engine, options=self._live_options))
            engine = _of(home)
            return WiredEngine(engine=engine, push=_going_on(engine), about="live, on the actor's own weights")
        engines = home.place("engine", self.replica())
        replicas = home.place("replicas", partial(Replicas, fold=homes.fold))
        push = FillPush(replicas, self._check(engines, count), adapters=homes.fed_adapters is not None)
        if isinstance(home, Here):
            about = "live, on a copy with the adapters folded in"
            copy: FedEngine = home.site.roles["engine"]
            return WiredEngine(engine=copy, push=self._pushed(copy, push), about=about)
        assert isinstance(home, WorkerGroup)
        about = f"live, in each of the actor's {count} processes, on gathered weights"
        several = EngineGroup(home, alone=False)
        return WiredEngine(engine=several, push=self._pushed(several, push), about=about)

    def _vllm(self, models: Mapping[str, Seat]) -> WiredEngine:
        homes, actor = self.homes, self.homes.of("actor")
        shared, parallel = self._beside_actor, homes.engine.tensor_parallel
        count = len(actor.devices) // parallel if shared else homes.placement.workers("engine")
        taking_turns = shared and homes.device().type == "cuda" and homes.engine.sleep
        source = self._source()
        begun = self.begin()
        if begun is None:
            group = self._group(count, actor.devices if shared else ())
            say("starting vLLM")
            begun = group.begin("engine", self._fed_vllm(source, shared))
        group, engines = begun.group, begun.result()
        push = self._link(source, engines, drops=taking_turns)
        about = f"vllm, {count} x {parallel}, {'shared' if shared else 'split'}, fed over {push.transport}"
        about += "" if push.moving is None else " with adapters alone"
        several = EngineGroup(group, alone=True, slots=self.sampling.max_slots)
        if not taking_turns:
            restarting = RestartingOnce(several, several, push.again)
            guarded = restarting.guard(self._pushed(several, push), self._pushed(several, push.again))
            return WiredEngine(engine=restarting, push=guarded, about=about)
        turns = TakingTurns(
            several,
            engines,
            [seat for seat in models.values() if seat.home is actor],
            push,
            version=lambda: models["actor"].call("version"),
        )
        restarting = RestartingOnce(turns, several, turns.recover)
        return WiredEngine(engine=restarting, push=turns.push_later, about=about)

    def _group(self, count: int, on_gpus_of: Seq[Device] = ()) -> WorkerGroup:
        """Processes for engines alone."""
        homes = self.homes
        return homes.group(
            "engine",
            count,
            gpus_each=homes.engine.tensor_parallel if homes.engine.kind == "vllm" else 1,
            joined=False,
            on_gpus_of=on_gpus_of,
            concurrency=CALLS_AT_A_TIME,
        )

    def _fed_vllm(self, source: Seat | None, shared: bool) -> Build:
        """What makes vLLM with weights that pushes bring. It reads whole models, and is fed others.

        ``source``, the actor's weights, says what its adapters are, where these alone are fed.
        """
        model = self.homes.model
        params = vllm_params(self.homes, self.sampling, seed=self.seed, shared=shared)
        if quantized_kind(model.model) is not None:
            params = replace(params, arguments=in_full(params.arguments))
        if self.homes.fed_adapters is not None and source is not None:
            params = replace(params, adapters=room_of(source.call("plan", model.dtype)))
        whole = replace(params, model=base_of(model.source), tokenizer=with_tokenizer(model.model))
        return partial(vllm_engine, params=whole)

    def _source(self) -> Seat:
        """Beside the actor: its weights, to be pushed."""
        homes = self.homes
        actor = sender = homes.of("actor")
        if isinstance(actor, Here):
            # Whoever sends waits for an engine, and somebody must be free to see it die.
            sender = Aside(actor.site)
            homes.stack.callback(sender.close)
        return sender.place("source", partial(weight_source, fold=homes.fold, scaled=homes.engine.kind == "vllm"))

    def _link(self, source: Seat, engines: Seat, drops: bool = False) -> WeightPush:
        engine = self.homes.engine
        params = PushParams(
            dtype=self.homes.model.dtype,
            transport=engine.transport,
            timeout_s=min(300.0, self.homes.section.deadline),
            drops=drops,
        )
        count = len(engines.devices) // engine.tensor_parallel
        push = WeightPush(source, engines, params, self._check(engines, count, past_limits=True))
        push.connect()
        return push

    def _check(self, engines: Seat, count: int, *, past_limits: bool = False) -> TruthCheck:
        """What proves that engines hold the actor's weights; ``past_limits``: also on a sequence past the model's."""
        model, engine = self.homes.model, self.homes.engine
        config = model_config(model.source)
        return TruthCheck(
            Seat(self.homes.of("actor"), "actor"),
            engines,
            count=count,
            dtype=model.dtype,
            vocabulary=self.vocabulary,
            layers=layers_of(config),
            limit=furthest_limit(config, engine.max_length, by=BEYOND + 1) if past_limits else 0,
            on=engine.check_weights,
        )


def engine_alone(homes: Homes, draws: DrawsSection, *, seed: int) -> Engine:
    """An engine on the weights of the model's folder, where nothing is trained and nothing ever pushed."""
    vllm, count = homes.engine.kind == "vllm", homes.placement.workers("engine")
    build = (
        partial(vllm_engine, params=vllm_params(homes, draws, seed=seed, own_process=count > 0))
        if vllm
        else partial(replica_engine, section=homes.model, options=live_options(homes.engine, draws))
    )
    if not count:
        home = homes.of("engine")
        home.place("engine", build)
        return _of(home)
    gpus = {"gpus_each": homes.engine.tensor_parallel} if vllm else {}
    group = homes.group("engine", count, joined=False, concurrency=CALLS_AT_A_TIME, **gpus)
    group.place("engine", build)
    engines = EngineGroup(group, alone=True, slots=draws.max_slots if vllm or count > 1 else None)
    # One that is started again loads the folder again, and needs no push.
    return RestartingOnce(engines, engines, lambda: None) if vllm else engines


def live_options(engine: EngineSection, draws: DrawsSection) -> dict[str, Any]:
    """How a live engine samples, on whichever weights."""
    how = {"way": engine.way, "kv_cache_dtype": engine.kv_cache_dtype, "max_length": engine.max_length}
    return {"max_slots": draws.max_slots, **how}


def vllm_params(
    homes: Homes, draws: DrawsSection, *, seed: int, shared: bool = False, own_process: bool = True
) -> VLLMParams:
    """What vLLM is started with: on devices of its own or ``shared`` with the actor, in a process of its own or not."""
    model, engine, on_gpu = homes.model, homes.engine, homes.device().type == "cuda"
    share = engine.memory_share or (SHARE_BESIDE_ACTOR if shared else None)
    return VLLMParams(
        model=model.source,
        dtype=model.dtype,
        max_slots=draws.max_slots,
        max_length=engine.max_length,
        tensor_parallel=engine.tensor_parallel,
        memory_share=share if on_gpu else None,
        seed=seed,
        seeded=engine.seeded,
        sleep=shared and on_gpu and engine.sleep,
        arguments=engine.vllm_arguments,
        own_process=own_process,
    )


def _of(home: Home) -> Engine:
    """The engine in the only process of a home, for this one to sample with."""
    if isinstance(home, Here):
        engine: Engine = home.site.roles["engine"]
        return engine
    assert isinstance(home, WorkerGroup)
    return EngineGroup(home, alone=False)


def _going_on(engine: Engine) -> Callable[[int], Metrics]:
    """The push of an engine on the actor's own weights: one of this process goes on with them at once."""

    def go_on(step: int) -> Metrics:
        if isinstance(engine, LiveEngine):
            engine.go_on()
        return {}

    return go_on
