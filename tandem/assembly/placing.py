"""Decides where the roles of a run live, and builds the engine together with the way weights reach it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tandem.assembly.models import Replicas, live_engine, replica_engine, vllm_engine, weight_source
from tandem.assembly.role_sections import RolePlacement
from tandem.assembly.sections import (
    ClusterSection,
    DrawsSection,
    EngineSection,
    ModelSection,
    SamplingSection,
    ScheduleSection,
)
from tandem.engines.live.engine import LiveEngine, StaleCache
from tandem.engines.vllm.adapters import check_dtype, room_for, room_of
from tandem.errors import UserError
from tandem.models.adapter_folder import adapter_folder, base_of
from tandem.models.adapters import AdapterParams
from tandem.models.folder import with_tokenizer
from tandem.models.limits import layers_of, read_config
from tandem.models.loading import pick_device
from tandem.models.quantized_folder import quantized_kind
from tandem.models.shrunk import furthest_limit
from tandem.parallel.world import World
from tandem.roles import Engine, FedEngine, Home, Metrics, Seat
from tandem.runs.progress import say
from tandem.sync.check import BEYOND, TruthCheck
from tandem.sync.push import FillPush, PushParams, WeightPush
from tandem.sync.turns import TakingTurns, settled
from tandem.workers.cluster import Cluster, connect, own_sigterm, require_ray, require_room, visible_gpus
from tandem.workers.engines import EngineGroup, RestartingOnce
from tandem.workers.group import WorkerGroup
from tandem.workers.homes import Aside, Here
from tandem.workers.launched import launched
from tandem.workers.process import Build, Site

HOST_THREADS = 4
"""Of this process where it computes on a GPU, unless OMP_NUM_THREADS says otherwise."""
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
CALLS_AT_A_TIME = 8
"""A process that is there for an engine alone makes 8 calls at once: it takes pushes while it is waited for."""


@dataclass(frozen=True, kw_only=True)
class WiredEngine:
    """An engine, how new weights reach it (metrics of the push), and a line that says what it is."""

    engine: Engine
    push: Callable[[int], Metrics]
    about: str
    link: WeightPush | None = None
    """The push itself, where weights travel."""


class Homes:
    """The processes of a run. Use as a context: all of them end with it, whatever ends the run."""

    def __init__(
        self,
        model: ModelSection,
        placement: RolePlacement,
        cluster: ClusterSection,
        engine: EngineSection,
        roles: list[str],
        *,
        adapters: AdapterParams | None = None,
        fold: bool = False,
    ) -> None:
        """``roles`` are those that the run has (``actor``, and ``critic``, ``reference``, ``reward``, ``engine``).

        ``adapters`` are what the actor trains in place of its model; ``fold``: engines sample with them folded in.
        """
        self.model, self.placement, self.section, self.engine = model, placement, cluster, engine
        self.fold = fold
        self.fed_adapters = None if fold else adapters
        self.roles = roles
        self.homes: dict[str, Home] = {}
        self.cluster: Cluster | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Homes:
        with ExitStack() as opening:
            opening.callback(self.stack.close)
            self._open()
            opening.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def place(self, role: str, build: Callable[[Site], Any], *, beside: str | None = None) -> Seat:
        """Builds a role in the processes that the placement gives it, or in another role's."""
        return self.of(beside or role).place(role, build)

    def of(self, role: str) -> Home:
        """The processes a role lives in."""
        return self.homes[self.placement.home(role)]

    def where(self, role: str) -> str:
        """For a person: nothing where it is this process or the actor's."""
        count = self.placement.workers(role)
        return f", {count} worker{'s' if count > 1 else ''} of its own" if count else ""

    @property
    def spread(self) -> bool:
        """Whether anything lives outside this process."""
        vllm = "engine" in self.roles and self.engine.kind == "vllm" and not self.placement.is_here("engine")
        return vllm or any(map(self.placement.workers, self.roles))

    def check(self) -> None:
        """Raises UserError where this machine, or the Ray of this process, cannot give the placement. Starts nothing.

        What another machine's cluster has is only known when it is joined.
        """
        if launched():
            raise UserError(
                "torchrun: this command starts workers itself; run it once, without torchrun, with --placement.actor N"
            )
        if self.engine.kind == "vllm" and "engine" in self.roles:
            if self.fed_adapters is not None:
                self._check_adapters(self.fed_adapters)
            if "actor" not in self.roles and adapter_folder(self.model.model) is not None:
                raise UserError(
                    f"model: {self.model.model} is a folder of adapters, and vLLM takes whole models here; write one "
                    f"with 'tandem export --model {self.model.model} --out FOLDER'"
                )
        if self.model.offload == "parameters" and self.placement.is_here("actor"):
            raise UserError("offload: parameters can leave the device in worker processes only: --placement.actor 1")
        for role in self.roles:
            if (home := self.placement.home(role)) not in self.roles:
                raise UserError(f"placement.{role}: shares with the {home}, and this run has none; give it a number")
        if not self.spread or self.section.address is not None:
            return
        device = pick_device(self.model.device)
        self._check(self._needed(), device)
        needed = {role: processes * each for role, (processes, each) in self._needed().items()}
        ray = require_ray(alone=True)
        resource = "GPU" if device.type == "cuda" else "CPU"
        if ray.is_initialized():
            total = int(ray.cluster_resources().get(resource, 0))
        else:
            total = visible_gpus() if device.type == "cuda" else len(os.sched_getaffinity(0))
        require_room(needed, total, resource)

    def _check_adapters(self, adapters: AdapterParams) -> None:
        """Raises UserError for adapters that vLLM does not compute."""
        room_for(adapters.rank)
        if adapters.dora:
            raise UserError("lora.dora: vLLM computes no DoRA; add --lora.fold, or take --engine.kind live")
        check_dtype(self.model.dtype, pick_device(self.model.device).type)

    def _needed(self) -> dict[str, tuple[int, int]]:
        """Processes of each role that has some of its own, and devices of each process."""
        needed = {role: (count, 1) for role in self.roles if (count := self.placement.workers(role))}
        if "engine" in needed:
            needed["engine"] = (needed["engine"][0], self.engine.tensor_parallel)
        return needed

    def _open(self) -> None:
        self.check()
        needed, device = self._needed(), self._device()
        if self.spread:
            self._check(needed, device)
            say("starting Ray" if self.section.address is None else f"joining Ray at {self.section.address}")
            self.cluster = Cluster(
                address=self.section.address,
                device=device.type,
                needed=needed,
                heartbeat_s=self.section.heartbeat,
            )
            self.stack.callback(self.cluster.close)
        if here := [role for role in self.roles if self.placement.is_here(role)]:
            if device.type == "cuda" and "OMP_NUM_THREADS" not in os.environ:
                # What is left for the CPU is small, and a thread for each of its cores makes it slow where they are
                # busy: measured on 64 of them, 24 ms to index 20,000 numbers, with the GPU waiting. (Ray's workers
                # have one thread.)
                torch.set_num_threads(min(HOST_THREADS, torch.get_num_threads()))
            home = Here(Site(World(device=device)))
            self.homes |= dict.fromkeys(here, home)
            self.stack.callback(home.close)
        for role in self.roles:
            if self.placement.home(role) == role and role not in self.homes and role != "engine":
                self.homes[role] = self._group(role, self.placement.workers(role))

    def _check(self, needed: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        here = next((role for role in self.roles if self.placement.is_here(role)), None)
        if here and needed and device.type == "cuda":
            raise UserError(
                f"placement: {', '.join(needed)} would have GPUs of their own while the {here} takes one in this "
                f"process, which Ray does not know of; give the {here} one too: --placement.{here} 1"
            )

    def _device(self) -> torch.device:
        if self.model.device == "auto" and self.spread and self.section.address is not None and not visible_gpus():
            # The machine that drives a cluster often has no GPU itself.
            ray = require_ray()
            if not ray.is_initialized():
                with own_sigterm():
                    connect(self.section.address)
                self.stack.callback(ray.shutdown)
            return torch.device("cuda" if ray.cluster_resources().get("GPU") else "cpu")
        return pick_device(self.model.device)

    def _group(self, name: str, size: int, **options: Any) -> WorkerGroup:
        assert self.cluster is not None
        say(f"starting {size} worker{'s' if size > 1 else ''} for the {name}")
        group = WorkerGroup(
            name,
            size,
            self.cluster,
            deadline_s=self.section.deadline,
            environment=self._threads(name)
            | passed_on("OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH", "TANDEM_DEBUG"),
            secrets=passed_on(*SECRETS),
            **options,
        )
        self.stack.callback(group.close)
        return group

    def _threads(self, name: str) -> dict[str, str]:
        """CPU workers divide this machine's threads; Ray would give each a single one.

        One worker then computes as this process would, to the bit: torch's CPU kernels round by how many threads there
        are. vLLM chooses for itself.
        """
        if self.cluster is None or self.cluster.device != "cpu" or (name == "engine" and self.engine.kind == "vllm"):
            return {}
        workers = sum(processes * each for processes, each in self._needed().values())
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))}

    def wire_engine(
        self,
        sampling: SamplingSection,
        *,
        seed: int,
        vocabulary: int,
        others: Mapping[str, Seat],
        schedule: ScheduleSection | None = None,
    ) -> WiredEngine:
        """Builds the engine, beside the actor or in processes of its own. ``others``: trainers and scorers by role.

        ``schedule`` says what becomes of samples that run when weights change. None: there are none then.
        """
        schedule = schedule or ScheduleSection()
        stale_cache: StaleCache = "recompute" if schedule.stale_cache == "recompute" else "keep"
        settling = schedule.weights_change == "between-sequences"
        if self.engine.kind == "live" and self.placement.home("engine") == "actor":
            return self._live_beside_actor(sampling, vocabulary, stale_cache, settling)
        if self.engine.kind == "live":
            group = self._group("engine", self.placement.workers("engine"), joined=False, concurrency=CALLS_AT_A_TIME)
            engines = group.place("engine", self._replica(sampling, stale_cache))
            link = self._link(self._source(), engines, vocabulary)
            about = f"live, {group.size} of its own, fed over {link.transport}"
            several = EngineGroup(group, alone=True)
            push = several.settled(link) if settling else link
            return WiredEngine(engine=several, push=push, about=about, link=link)
        return self._vllm(sampling, seed, vocabulary, others, settling)

    def engine_alone(self, draws: DrawsSection, *, seed: int) -> Engine:
        """An engine on the weights of the model's folder, where nothing is trained and nothing ever pushed."""
        vllm, count = self.engine.kind == "vllm", self.placement.workers("engine")
        how: dict[str, Any] = {"section": self.model, "sampling": draws, "engine": self.engine}
        build = (
            partial(vllm_engine, **how, seed=seed, shared=False, own_process=count > 0)
            if vllm
            else partial(replica_engine, **how)
        )
        if not count:
            home = self.of("engine")
            assert isinstance(home, Here)
            home.place("engine", build)
            engine: Engine = home.site.roles["engine"]
            return engine
        gpus = {"gpus_each": self.engine.tensor_parallel} if vllm else {}
        group = self._group("engine", count, joined=False, concurrency=CALLS_AT_A_TIME, **gpus)
        group.place("engine", build)
        engines = EngineGroup(group, alone=True, slots=draws.max_slots if vllm else None)
        # One that is started again loads the folder again, and needs no push.
        return RestartingOnce(engines, engines, lambda: None) if vllm else engines

    def _replica(self, sampling: DrawsSection, stale_cache: StaleCache) -> Build:
        """What makes a live engine with weights of its own, which are fed."""
        return partial(
            replica_engine,
            section=self.model,
            sampling=sampling,
            engine=self.engine,
            stale_cache=stale_cache,
            adapters=self.fed_adapters,
            whole=self.fold,
        )

    def _live_beside_actor(
        self, sampling: SamplingSection, vocabulary: int, stale_cache: StaleCache, settling: bool
    ) -> WiredEngine:
        home = self.of("actor")
        build = partial(live_engine, sampling=sampling, engine=self.engine, stale_cache=stale_cache)
        if isinstance(home, Here) and not self.fold:
            home.place("engine", build)
            engine: LiveEngine = home.site.roles["engine"]

            def go_on(step: int) -> Metrics:
                engine.go_on()
                return {}

            return WiredEngine(engine=engine, push=go_on, about="live, on the actor's own weights")
        count = len(home.devices)
        if isinstance(home, WorkerGroup) and count == 1 and self.model.offload != "parameters" and not self.fold:
            home.place("engine", build)
            shared = EngineGroup(home, alone=False)
            return WiredEngine(engine=shared, push=lambda step: {}, about="live, on the actor's own weights")
        engines = home.place("engine", self._replica(sampling, stale_cache))
        check = TruthCheck(
            Seat(home, "actor"),
            engines,
            count=count,
            dtype=self.model.dtype,
            vocabulary=vocabulary,
            layers=layers_of(read_config(self.model.model, self.model.trust_remote_code)),
        )
        replicas = home.place("replicas", partial(Replicas, fold=self.fold))
        checked = check if self.engine.check_weights else None
        push = FillPush(replicas, checked, adapters=self.fed_adapters is not None)
        if isinstance(home, Here):
            about = "live, on a copy with the adapters folded in"
            copy: FedEngine = home.site.roles["engine"]
            return WiredEngine(engine=copy, push=settled(copy, push) if settling else push, about=about)
        assert isinstance(home, WorkerGroup)
        about = f"live, in each of the actor's {count} processes, on gathered weights"
        several = EngineGroup(home, alone=False)
        return WiredEngine(engine=several, push=several.settled(push) if settling else push, about=about)

    def _vllm(
        self, sampling: SamplingSection, seed: int, vocabulary: int, others: Mapping[str, Seat], settling: bool
    ) -> WiredEngine:
        shared = self.placement.home("engine") == "actor"
        tensor_parallel = self.engine.tensor_parallel
        actor = self.of("actor")
        count = len(actor.devices) // tensor_parallel if shared else self.placement.workers("engine")
        if not count:
            raise UserError(
                f"engine.tensor_parallel: {tensor_parallel} GPUs for one engine, and the actor has {len(actor.devices)}"
            )
        taking_turns = shared and self._device().type == "cuda" and self.engine.sleep
        group = self._group(
            "engine",
            count,
            gpus_each=tensor_parallel,
            joined=False,
            on_gpus_of=actor.devices if shared else (),
            concurrency=CALLS_AT_A_TIME,
        )
        say("starting vLLM")
        # It would keep few bits as they are; the first push brings the weights that these stand for.
        in_full: dict[str, Any] = {"load_format": "dummy", "hf_overrides": {"quantization_config": None}}
        arguments = in_full if quantized_kind(self.model.model) is not None else {}
        source = self._source()
        room = None if self.fed_adapters is None else room_of(source.call("plan", self.model.dtype))
        engines = group.place(
            "engine",
            partial(
                vllm_engine,
                # It reads whole models, and is fed others.
                section=replace(self.model, model=base_of(self.model.model)),
                sampling=sampling,
                engine=replace(self.engine, arguments=json.dumps(arguments | self.engine.vllm_arguments)),
                seed=seed,
                shared=shared,
                tokenizer=with_tokenizer(self.model.model),
                adapters=room,
            ),
        )
        push = self._link(source, engines, vocabulary, drops=taking_turns)
        about = f"vllm, {count} x {tensor_parallel}, {'shared' if shared else 'split'}, fed over {push.transport}"
        about += "" if push.moving is None else " with adapters alone"
        several = EngineGroup(group, alone=True, slots=sampling.max_slots)
        if not taking_turns:
            restarting = RestartingOnce(several, several, push.again)
            guarded = restarting.guard(several.settled(push) if settling else push, push.again)
            return WiredEngine(engine=restarting, push=guarded, about=about, link=push)
        turns = TakingTurns(
            several,
            engines,
            [seat for seat in others.values() if seat.home is actor],
            push,
            version=lambda: others["actor"].call("version"),
        )
        restarting = RestartingOnce(turns, several, turns.recover)
        return WiredEngine(engine=restarting, push=turns.push_later, about=about, link=push)

    def _source(self) -> Seat:
        """Beside the actor: its weights, to be pushed."""
        actor = sender = self.of("actor")
        if isinstance(actor, Here):
            # Whoever sends waits for an engine, and somebody must be free to see it die.
            sender = Aside(actor.site)
            self.stack.callback(sender.close)
        return sender.place("source", partial(weight_source, fold=self.fold, scaled=self.engine.kind == "vllm"))

    def _link(self, source: Seat, engines: Seat, vocabulary: int, drops: bool = False) -> WeightPush:
        config = read_config(self.model.model, self.model.trust_remote_code)
        push = WeightPush(
            source,
            Seat(self.of("actor"), "actor"),
            engines,
            PushParams(
                dtype=self.model.dtype,
                transport=self.engine.transport,
                check=self.engine.check_weights,
                ranks_per_engine=self.engine.tensor_parallel,
                vocabulary=vocabulary,
                layers=layers_of(config),
                limit=furthest_limit(config, self.engine.max_length, by=BEYOND + 1),
                timeout_s=min(300.0, self.section.deadline),
                drops=drops,
            ),
        )
        push.connect()
        return push


def passed_on(*names: str) -> dict[str, str]:
    """Variables that workers need as this process has them, wherever they run."""
    return {name: os.environ[name] for name in names if name in os.environ}
