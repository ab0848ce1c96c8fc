"""Decides where the roles of a run live, and starts the processes for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from tandem.assembly.configs.role_sections import RolePlacement
from tandem.assembly.configs.sections import ClusterSection, EngineSection, ModelSection
from tandem.engines.vllm.adapters import check_dtype, room_for
from tandem.engines.vllm.setup import in_full, require_read
from tandem.errors import UserError
from tandem.futures import Done, Future
from tandem.models.loading import pick_device
from tandem.models.lora.adapters import AdapterParams
from tandem.models.lora.folder import adapter_folder
from tandem.models.quantized.folder import quantized_kind
from tandem.parallel.world import World
from tandem.roles import Home, Seat
from tandem.runs.progress import say
from tandem.stages import Seconds, stage
from tandem.workers.cluster import Cluster, connect, own_sigterm, require_ray, require_room, visible_gpus
from tandem.workers.group import WorkerGroup
from tandem.workers.homes import Here
from tandem.workers.launched import launched
from tandem.workers.process import Site

HOST_THREADS = 4
"""Of this process where it computes on a GPU, unless OMP_NUM_THREADS says otherwise."""
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


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
        self.groups: list[WorkerGroup] = []
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

    def place(self, role: str, build: Callable[[Site], Any]) -> Seat:
        """Builds a role in the processes that the placement gives it."""
        return self.of(role).place(role, build)

    def begin(self, role: str, build: Callable[[Site], Any]) -> Future[Seat]:
        """``place``, which does not wait for other processes: roles of several are built at the same time."""
        home = self.of(role)
        return home.begin(role, build) if isinstance(home, WorkerGroup) else Done(home.place(role, build))

    def of(self, role: str) -> Home:
        """The processes a role lives in."""
        return self.homes[self.placement.home(role)]

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
            require_read(self.model.model)
            if self.fed_adapters is not None:
                self._check_adapters(self.fed_adapters)
            if "actor" in self.roles:
                if quantized_kind(self.model.model) is not None:
                    in_full(self.engine.vllm_arguments)
                parallel, there = self.engine.tensor_parallel, max(1, self.placement.workers("actor"))
                if self.placement.home("engine") == "actor" and parallel > there:
                    raise UserError(
                        f"engine.tensor_parallel: {parallel} GPUs for one engine, and the actor has {there}"
                    )
            elif adapter_folder(self.model.model) is not None:
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
        needed, device = self._needed(), self.device()
        if self.spread:
            self._check(needed, device)
            say("starting Ray" if self.section.address is None else f"joining Ray at {self.section.address}")
            with stage("Ray"):
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
                self.homes[role] = self.group(role, self.placement.workers(role))

    def _check(self, needed: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        here = next((role for role in self.roles if self.placement.is_here(role)), None)
        if here and needed and device.type == "cuda":
            raise UserError(
                f"placement: {', '.join(needed)} would have GPUs of their own while the {here} takes one in this "
                f"process, which Ray does not know of; give the {here} one too: --placement.{here} 1"
            )

    def device(self) -> torch.device:
        """Where roles compute: on a cluster's GPUs, where it has some and this machine has none."""
        if self.model.device == "auto" and self.spread and self.section.address is not None and not visible_gpus():
            # The machine that drives a cluster often has no GPU itself.
            ray = require_ray()
            if not ray.is_initialized():
                with own_sigterm():
                    connect(self.section.address)
                self.stack.callback(ray.shutdown)
            return torch.device("cuda" if ray.cluster_resources().get("GPU") else "cpu")
        return pick_device(self.model.device)

    def group(self, name: str, size: int, **options: Any) -> WorkerGroup:
        """Starts processes for a role, and does not wait for them. ``options`` are ``WorkerGroup``'s."""
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
        self.groups.append(group)
        return group

    def seconds(self) -> dict[str, Seconds]:
        """Those of the stages of every process but this one so far, by its name."""
        return {name: seconds for group in self.groups for name, seconds in group.seconds().items()}

    def _threads(self, name: str) -> dict[str, str]:
        """CPU workers divide this machine's threads; Ray would give each a single one.

        One worker then computes as this process would, to the bit: torch's CPU kernels round by how many threads there
        are. vLLM chooses for itself.
        """
        if self.cluster is None or self.cluster.device != "cpu" or (name == "engine" and self.engine.kind == "vllm"):
            return {}
        workers = sum(processes * each for processes, each in self._needed().values())
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))}


def passed_on(*names: str) -> dict[str, str]:
    """Variables that workers need as this process has them, wherever they run."""
    return {name: os.environ[name] for name in names if name in os.environ}
