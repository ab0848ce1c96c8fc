"""The Ray cluster that worker groups live on: started here, or joined; and what it has to give."""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import itertools
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from tandem.errors import UserError
from tandem.parallel.world import LOOPBACK
from tandem.roles import Device
from tandem.workers.keeper import MARK, STOPPED, command_line, parent_of, start_keeper, state_of
from tandem.workers.process import Where, ending, own_address
from tandem.workers.supervisor import stand_on

CONNECT_DEADLINE_S = 30.0
KEEPER_LATER_S = 10.0
AGENT = re.compile(r"ray::(\w+Agent)")
INSTALL = "pip install 'tandem-rlhf[cluster]'"
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Has Ray listen on the loopback alone, as it does on systems where it has no clusters. Read as it is imported."""
NO_SPARE = {"RAY_prestart_worker_first_driver": "0"}
"""Keeps Ray from starting a process for each core before it is asked for any: no role of ours could use one."""


class Cluster:
    """Ray, connected. ``address`` joins a running cluster (``auto``, ``HOST:PORT``); None starts one on this machine.

    ``device`` is ``cuda`` or ``cpu``: what a worker of a group gets. ``needed`` says for each group how many processes
    it has and how many devices each of them needs. A process of one that was started here, or of a group, which is
    stopped for ``heartbeat_s`` is killed, so that what waits for it ends. Raises UserError where Ray is not installed
    or does not answer, and where the cluster has fewer devices than that.
    """

    def __init__(
        self, *, address: str | None = None, device: str, needed: dict[str, tuple[int, int]], heartbeat_s: float = 30.0
    ) -> None:
        self.ray: Any = require_ray(alone=address is None)
        self.device, self.heartbeat_s = device, heartbeat_s
        self.mark = secrets.token_hex(8)
        """The mark of every process that belongs to the run (``tandem.workers.keeper``)."""
        # One failure is told of, and what follows from it to others is not: Ray would print it with its traceback.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        self.started = not self.ray.is_initialized()
        wanted = {name: processes * each for name, (processes, each) in needed.items()}
        bundles = [each for processes, each in needed.values() for _ in range(processes)]
        if self.started:
            if device == "cpu" and address is None:
                # Known without Ray, whose start takes seconds.
                require_room(wanted, len(os.sched_getaffinity(0)), "CPU")
            with own_sigterm():
                self._init(address, sum(bundles))
        stand_on(self._stood_on(), heartbeat_s)
        try:
            resource = "GPU" if device == "cuda" else "CPU"
            require_room(wanted, int(self.ray.cluster_resources().get(resource, 0)), resource)
            self.group = self._reserve(bundles)
        except BaseException:
            self.close()
            raise
        self.first = dict(zip(needed, itertools.accumulate([0] + [n for n, _ in needed.values()]), strict=False))
        """The first bundle of each group, which has one a process."""

    def _init(self, address: str | None, workers: int) -> None:
        if address is not None:
            connect(address)
            return
        # On GPUs Ray need not count cores: there are as many workers as GPUs, and they compute there.
        cores = len(os.sched_getaffinity(0))
        options: dict[str, Any] = (
            {"num_cpus": cores, "num_gpus": 0} if self.device == "cpu" else {"num_cpus": max(workers, cores)}
        )
        # Ray's own is in a file that others may read. It stays, since Ray reads it once in a process.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with environment(ON_LOOPBACK | NO_SPARE | {MARK: self.mark}), any_port(self.ray):
            # "local", since Ray would otherwise join whatever runs on this machine.
            self.ray.init(address="local", include_dashboard=False, **QUIET, **options)
        # By itself it gives this process the first word.
        start_keeper(self.mark, self.heartbeat_s + KEEPER_LATER_S)

    def _stood_on(self) -> dict[str, int]:
        """The processes of Ray on this machine without which no worker can be reached, by name."""
        node = self.ray._private.worker._global_node
        socket = f"--raylet_socket_name={node.raylet_socket_name}"
        lines = {int(name): command_line(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        raylet = next((pid for pid, line in lines.items() if socket in line and "/raylet " in line), None)
        if raylet is None:
            return {}
        started = {"raylet": raylet}
        if "gcs_server" in node.all_processes:
            started["gcs_server"] = node.all_processes["gcs_server"][0].process.pid
        # A raylet ends when one of its agents does.
        agents = {pid: AGENT.match(line) for pid, line in lines.items() if parent_of(pid) == raylet}
        return started | {agent[1]: pid for pid, agent in agents.items() if agent}

    def _reserve(self, bundles: list[int]) -> Any:
        """A placement group of one bundle a worker, or nothing where no worker reserves a device."""
        from ray.util.placement_group import placement_group

        if not bundles:
            return None
        resource = "GPU" if self.device == "cuda" else "CPU"
        group = placement_group([{resource: float(count)} for count in bundles], strategy="PACK")
        if not group.wait(CONNECT_DEADLINE_S):
            raise UserError(
                f"placement: the cluster has {sum(bundles)} {resource}s, but others use them, or no machine has "
                f"{max(bundles)} together; free them, or ask for fewer"
            )
        return group

    def actor_options(
        self, name: str, rank: int, gpus: int, *, host: Seq[Device] | None, environment: dict[str, str]
    ) -> dict[str, Any]:
        """Where and with what a worker starts: in its bundle, or on devices that another group has reserved."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        variables = environment | {MARK: f"{self.mark}.{name}-{rank}-{secrets.token_hex(4)}"}
        options: dict[str, Any] = {"name": f"tandem-{name}-{rank}-{os.getpid()}", "num_cpus": 0, "max_restarts": 0}
        if host is not None:
            mine = host[rank * gpus : (rank + 1) * gpus] or host[:1]
            variables |= {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            address, gpu = mine[0]
            if gpu is not None:
                variables |= {"CUDA_VISIBLE_DEVICES": ",".join(f"GPU-{gpu}" for _, gpu in mine)}
            node = next(n for n in self.ray.nodes() if n["Alive"] and _same_machine(n["NodeManagerAddress"], address))
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        else:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=self.first[name] + rank
            )
            options |= {"num_gpus": gpus} if self.device == "cuda" else {"num_cpus": gpus}
        return options | {"runtime_env": {"env_vars": variables}}

    def close(self) -> None:
        """Gives everything back; ends Ray where it was started here."""
        with contextlib.suppress(Exception):
            if getattr(self, "group", None) is not None:
                from ray.util.placement_group import remove_placement_group

                remove_placement_group(self.group)
        stand_on({}, self.heartbeat_s)
        if self.started:
            self.ray.shutdown()


def require_ray(*, alone: bool = False) -> Any:
    """The module, imported for this machine ``alone`` or for a cluster. Raises UserError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"several processes need Ray, which is not installed: {INSTALL}")
    with environment(ON_LOOPBACK if alone else {}):
        import ray

    return ray


def connect(address: str) -> None:
    """Joins a running cluster. Raises UserError where none answers there."""
    ray = require_ray()
    failure: list[BaseException] = []
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), CONNECT_DEADLINE_S).close()
        except OSError as error:
            raise _nobody_at(address, error.strerror or str(error)) from None

    def join() -> None:
        try:
            ray.init(address=address, **QUIET)
        except BaseException as error:
            failure.append(error)

    # Ray itself tries for minutes; nobody waits that long for a mistyped address.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(CONNECT_DEADLINE_S)
    if thread.is_alive() or failure:
        raise _nobody_at(address, _reason(failure[0]) if failure else f"nothing within {CONNECT_DEADLINE_S:.0f} s")


def _nobody_at(address: str, why: str) -> UserError:
    return UserError(
        f"cluster.address {address}: no Ray cluster answers there ({why}); start one with 'ray start --head' "
        "or leave the key out to run on this machine"
    )


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables for what is imported and started inside, and puts back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def any_port(ray: Any) -> Iterator[None]:
    """Has Ray's agent listen at any free port, for which ``init`` has no option.

    Where another Ray of this machine has port 52365, the agent tries it for 3.5 s, and all wait for the agent.
    """
    parameter = ray._private.parameter
    params = parameter.RayParams
    parameter.RayParams = functools.partial(params, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = params


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Keeps this process's answer to SIGTERM: Ray, as it starts, puts one in its place that aborts the process."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # A handler that was not set from Python reads as None and cannot be put back.
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _reason(error: BaseException) -> str:
    """What Ray failed with, in a line."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    if any("authentication token" in str(cause).lower() for cause in causes):
        return "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's"
    return " ".join(str(error).split())[:160]


def require_room(needed: dict[str, int], total: int, resource: str) -> None:
    """Raises UserError where groups of these sizes need more devices than ``total``."""
    if (wanted := sum(needed.values())) <= total:
        return
    asked = ", ".join(f"{name} {count}" for name, count in needed.items())
    raise UserError(
        f"placement: {wanted} {resource}s are asked for ({asked}), there {'is' if total == 1 else 'are'} {total}; "
        + what_would_fit(needed, total)
    )


def what_would_fit(needed: dict[str, int], total: int) -> str:
    """A placement that the machine has room for."""
    if total == 0:
        return "run in one process on the CPU: --placement.actor here --device cpu"
    if total == 1:
        return "--placement.actor here trains and samples on it in turns"
    together = f"--placement.actor {total} with every other role 'actor'"
    if total < len(needed):
        return f"{together} would fit"
    fits = " ".join(f"--placement.{name} {total // len(needed)}" for name in needed)
    return f"{fits} would fit, or {together}"


def visible_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def log_tail(where: Where) -> str:
    """The end of what a worker wrote, for an error message; where to look, if it ran on another machine."""
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    if not _same_machine(where.node, own_address()) or node is None:
        return f"; its log is on {where.node} in /tmp/ray/session_latest/logs (worker-*-{where.pid}.err)"
    lines: list[str] = []
    for path in sorted(glob.glob(os.path.join(node.get_logs_dir_path(), f"worker-*-{where.pid}.*"))):
        with contextlib.suppress(OSError):
            lines += Path(path).read_text(errors="replace").splitlines()
    return ending("log", (line for line in lines if not line.startswith(":")))


def is_stopped(where: Where) -> bool:
    """Whether a process of this machine is stopped by a signal. Of other machines' it is not known here."""
    return _same_machine(where.node, own_address()) and state_of(where.pid) in STOPPED


def _same_machine(a: str, b: str) -> bool:
    return a == b or {a, b} <= {LOOPBACK, own_address()}
