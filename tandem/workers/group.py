"""A group of worker processes as Ray actors: placed, called together, watched, and ended together."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError, WorkerDied, WorkerFailure, first_line
from tandem.parallel.world import LOOPBACK
from tandem.roles import Device, Seat
from tandem.signals import stopping
from tandem.stages import Seconds
from tandem.workers.cluster import Cluster, is_stopped, log_tail
from tandem.workers.keeper import MARK
from tandem.workers.process import Build, Packed, Where, WorkerProcess, raise_failure

log = logging.getLogger("tandem")
START_DEADLINE_S = 300.0
LOAD_DEADLINE_S = 3600.0
"""Reading a large model from a slow disk is the longest of all waits."""
SECONDS_S = 5.0
"""What a start has taken is not waited for any longer."""
DEATH_KNOWN_S = 5.0
"""Until Ray knows of a death that others of a group have noticed."""
LONGER_S = 10.0
"""By which ranks wait longer for each other than their driver does for them: it knows who is late, and says so."""

LOOK_EVERY_S = 1.0
STOP_S = 5.0
"""A signal that stops the command waits 5 s for a worker that is stopped itself, and says of others who is awaited."""

UNEXPLAINED = "The actor died unexpectedly"
"""Where Ray's words for a death begin so, it knows no cause."""
NO_ROOM = (
    "Ray's object store is full, and so is the disk behind it (95%); free some of that, or start Ray with other values "
    "of --object-store-memory and --object-spilling-directory"
)


class WorkerGroup:
    """``size`` processes, one a GPU (or CPU), as a home for roles (``tandem.roles.Home``).

    ``joined`` makes them one world for collectives. All ranks see calls in the order of submission: a Ray actor that
    runs one call at a time, and is not restarted, takes those of one driver in their order. ``concurrency`` above 1
    gives that up, so that several calls run in one process at the same time, and is for processes that are not joined.
    ``on_gpus_of`` puts them where other processes are, on their GPUs, reserving none. Whoever has waited for an answer
    for ``deadline_s`` gets an error that says who has not given it. Processes start with ``environment``, which Ray
    logs; ``secrets`` are variables that they are told in a call, and that stand in no log and on no command line.
    """

    at_once = False

    def __init__(
        self,
        name: str,
        size: int,
        cluster: Cluster,
        *,
        gpus_each: int = 1,
        joined: bool = True,
        on_gpus_of: Seq[Device] = (),
        concurrency: int = 1,
        deadline_s: float = 1800.0,
        environment: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
    ) -> None:
        assert concurrency == 1 or not joined
        self.name, self.size, self.cluster, self.deadline_s = name, size, cluster, deadline_s
        self.device, self.gpus_each = cluster.device, gpus_each
        self.secrets = secrets or {}
        self._one_order = threading.Lock()
        """Held while a call is handed to all ranks: where several threads make calls, too, all ranks see one order."""
        self.builds: dict[str, Build] = {}
        self.silent = ""
        """Who has not answered within the deadline. The end of a run that finds that out must not wait for it again."""
        self.options = [
            cluster.actor_options(name, rank, gpus_each, host=list(on_gpus_of) or None, environment=environment or {})
            | {"max_concurrency": concurrency}
            for rank in range(size)
        ]
        self.joined = joined
        self.wheres: list[Where] = []
        self.actors = [self._start(rank) for rank in range(size)]
        self._beginning = [self._begin(rank) for rank in range(size)]
        self._loading = self._beginning
        """The last that each process was told to build."""

    def ready(self) -> None:
        """Waits until all processes have started, and have met where they are joined."""
        if self.wheres:
            return
        self.wheres = self._all("start", self._beginning, START_DEADLINE_S)
        if self.joined:
            nodes = {where.node for where in self.wheres}
            host = LOOPBACK if len(nodes) == 1 else self.wheres[0].node
            port = self._all("rendezvous", [self.actors[0].listen.remote(host)], START_DEADLINE_S)[0]
            joining = [a.join.remote(host, port, self.deadline_s + LONGER_S) for a in self.actors]
            self._all("rendezvous", joining, START_DEADLINE_S)

    def _start(self, rank: int) -> Any:
        actor = self.cluster.ray.remote(WorkerProcess)
        return actor.options(**self.options[rank]).remote(rank, self.size, self.device, os.getcwd())

    def _begin(self, rank: int) -> Any:
        mark = self.options[rank]["runtime_env"]["env_vars"][MARK]
        return self.actors[rank].begin.remote(self.secrets, mark, self.cluster.heartbeat_s)

    def restart(self, rank: int) -> None:
        """A new process in the place of one that is gone, with the same roles built anew. Not for joined groups."""
        with contextlib.suppress(Exception):
            self.cluster.ray.kill(self.actors[rank])
        self.options[rank] |= {"name": f"{self.options[rank]['name']}-again"}
        self.actors[rank] = self._start(rank)
        self.silent = ""
        self._beginning[rank] = self._begin(rank)
        self.wheres[rank] = self._all("restart", [self._beginning[rank]], START_DEADLINE_S, rank)[0]
        for role, build in self.builds.items():
            placed = self.actors[rank].place.remote(role, self._packed(build))
            self._all(f"loading {role}", [placed], LOAD_DEADLINE_S, rank)

    def dead(self) -> list[int]:
        """Ranks whose process is gone."""
        gone = []
        for rank, actor in enumerate(self.actors):
            try:
                self.cluster.ray.get(actor.where.remote(), timeout=30)
            except self.cluster.ray.exceptions.RayError:
                gone.append(rank)
        return gone

    @property
    def devices(self) -> Seq[Device]:
        """One for each device; on a CPU, for each rank that a process runs by itself (tensor-parallel engines)."""
        self.ready()
        return [(where.node, gpu) for where in self.wheres for gpu in (where.gpus or (None,) * self.gpus_each)]

    def place(self, role: str, build: Build) -> Seat:
        """Builds a role in every process."""
        return self.begin(role, build).result()

    def begin(self, role: str, build: Build) -> Placing:
        """Begins to build a role in every process. Waits for nothing but the meeting of those that are joined."""
        self.builds[role] = build
        if self.joined:
            self.ready()
        pairs, packed = zip(self.actors, self._beginning, strict=True), self._packed(build)
        self._loading = [actor.place.remote(role, packed, after=begun) for actor, begun in pairs]
        return Placing(self, role, self._loading)

    def _packed(self, build: Build) -> Packed:
        return Packed(self.cluster.ray.cloudpickle.dumps(build))

    def seconds(self) -> dict[str, Seconds]:
        """Those of the stages of each process so far, by its name; of those that say it soon."""
        ray = self.cluster.ray
        refs = {f"{self.name} rank {rank}": actor.seconds.remote() for rank, actor in enumerate(self.actors)}
        if refs:
            ray.wait([*refs.values()], num_returns=len(refs), timeout=SECONDS_S)
        found: dict[str, Seconds] = {}
        for name, ref in refs.items():
            with contextlib.suppress(ray.exceptions.RayError):  # of one that has died others will tell
                found[name] = ray.get(ref, timeout=0)
        return found

    def submit(self, role: str, verb: str, arguments: tuple[Any, ...]) -> Answer:
        """See ``tandem.roles.Home``."""
        what = f"{role}.{verb}"
        with self._room(what):
            # Stored once, however many read it.
            shared = self.cluster.ray.put(arguments) if self.size > 1 else arguments
            with self._one_order:
                refs = [a.call.remote(role, verb, shared, rank > 0) for rank, a in enumerate(self.actors)]
        return Answer(self, what, refs)

    def submit_each(self, role: str, verb: str, arguments: Seq[tuple[Any, ...]]) -> Answer:
        """See ``tandem.roles.Home``."""
        what, calls = f"{role}.{verb}", zip(self.actors, arguments, strict=True)
        with self._room(what), self._one_order:
            refs = [actor.call.remote(role, verb, own, False) for actor, own in calls]
        return Answer(self, what, refs, each=True)

    def submit_one(self, rank: int, role: str, verb: str, *arguments: Any) -> Answer:
        """A method in one process."""
        what = f"{role}.{verb}"
        with self._room(what):
            ref = self.actors[rank].call.remote(role, verb, arguments, False)
        return Answer(self, what, [ref], rank)

    def ended_of(self, calls: Seq[Answer], seconds: float, *, all_of_them: bool = False) -> list[Answer]:
        """Those of some calls to single processes that have ended; waits so long for one of them, or for all."""
        if not calls:
            return []
        ray, by_ref = self.cluster.ray, {call.refs[0]: call for call in calls}
        ray.wait(list(by_ref), num_returns=len(by_ref) if all_of_them else 1, timeout=seconds)
        ended, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
        return [by_ref[ref] for ref in ended]

    def close(self) -> None:
        """Ends every process: at once where one loads, after 5 s where one is silent, 1 s if it is ``unheard``."""
        ray = self.cluster.ray
        with contextlib.suppress(Exception):
            loaded, _ = ray.wait(self._loading, num_returns=self.size, timeout=0)
            calls = [a.close.remote() for a, ref in zip(self.actors, self._loading, strict=True) if ref in loaded]
            ray.wait(calls, num_returns=len(calls), timeout=1 if self.unheard else 5)
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self.actors = []

    @property
    def unheard(self) -> bool:
        """Whether one of its processes is stopped, or owes an answer since a deadline: an end does not wait for it."""
        return bool(self.silent) or any(map(is_stopped, self.wheres))

    def _all(self, what: str, refs: list[Any], deadline_s: float, first_rank: int = 0) -> list[Any]:
        """The results of calls to successive ranks, watching all of them: one that fails ends the wait for the rest."""
        if self.silent:
            raise WorkerFailure(f"{what}: {self.silent} still owes the answer to an earlier call")
        ray = self.cluster.ray
        ranks = {ref: first_rank + i for i, ref in enumerate(refs)}
        results: dict[Any, Any] = {}
        start, said = time.monotonic(), False
        while waiting := [ref for ref in refs if ref not in results]:
            waited = time.monotonic() - start
            done, _ = ray.wait(waiting, num_returns=1, timeout=max(0.0, min(LOOK_EVERY_S, deadline_s - waited)))
            late = [] if done else [ranks[ref] for ref in waiting]
            if late and waited >= deadline_s:
                raise self.late(what, late, deadline_s)
            if late and waited >= STOP_S and stopping():
                self._leave_stopped(what, late)
                if not said:
                    who = ", ".join(map(self.who, late))
                    log.warning("%s: %s is waited for, %.0f s at most; another signal ends it", what, who, deadline_s)
                said = True
            for ref in done:
                try:
                    results[ref] = self._result(what, ref, ranks[ref])
                except (UserError, WorkerFailed) as error:
                    others = {other: ranks[other] for other in waiting if other != ref}
                    raise self._death(what, others) or error from None
        return [results[ref] for ref in refs]

    def _leave_stopped(self, what: str, ranks: list[int]) -> None:
        """Raises WorkerFailure where one of them is stopped: whoever ends the run may not wait until it is killed."""
        if frozen := [rank for rank in ranks if rank < len(self.wheres) and is_stopped(self.wheres[rank])]:
            self.silent = ", ".join(map(self.who, frozen))
            raise WorkerFailure(f"{what}: {self.silent} is stopped (SIGSTOP) and has not answered for {STOP_S:.0f} s")

    def late(self, what: str, ranks: list[int], deadline_s: float | None = None) -> WorkerFailure:
        """The error that these have not answered within the deadline, or the group's. Nobody waits for them again."""
        self.silent, waited = ", ".join(map(self.who, ranks)), deadline_s or self.deadline_s
        return WorkerFailure(f"{what}: no answer within {waited:.0f} s from {self.silent}{self._tail(ranks[0])}")

    def _death(self, what: str, others: dict[Any, int]) -> WorkerDied | None:
        """Which of the others has died: what they do together fails for those that live, who may say so first."""
        ended = self.cluster.ray.wait(list(others), num_returns=len(others), timeout=DEATH_KNOWN_S)[0] if others else []
        for ref in ended:
            try:
                self._result(what, ref, others[ref])
            except WorkerDied as died:
                return died
            except (UserError, WorkerFailed):
                continue
        return None

    def _result(self, what: str, ref: Any, rank: int) -> Any:
        exceptions = self.cluster.ray.exceptions
        try:
            with self._room(f"{what}: {self.who(rank)}"):
                return raise_failure(self.cluster.ray.get(ref), self.who(rank))
        except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
            said = " ".join(str(error).split("\n\t")[0].split())[:200]
            how = "killed, crashed, or out of the machine's memory" if said.startswith(UNEXPLAINED) else said
            if isinstance(error, exceptions.ActorUnavailableError):
                how = "Ray cannot reach it: it, its machine or the network to it is gone"
            raise WorkerDied(f"{self.who(rank)} died ({how}; in {what}){self._tail(rank)}") from None
        except exceptions.RayTaskError as error:
            lines = str(error).strip().splitlines()
            raise WorkerFailed(f"{self.who(rank)} failed in {what}: {lines[-1]}\n" + "\n".join(lines)) from None
        except exceptions.RayError as error:
            # Of the answer, which is lost with a machine that has left.
            raise WorkerFailure(f"{what}: the answer of {self.who(rank)} is lost: {first_line(error)}") from None

    @contextlib.contextmanager
    def _room(self, what: str) -> Iterator[None]:
        """Around what hands arguments to Ray, or results. Raises WorkerFailure where it has no room for them."""
        exceptions = self.cluster.ray.exceptions
        try:
            yield
        except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError):
            raise WorkerFailure(f"{what}: {NO_ROOM}") from None

    def who(self, rank: int) -> str:
        """A process, for messages."""
        if rank >= len(self.wheres):
            return f"{self.name} rank {rank}"
        where = self.wheres[rank]
        return f"{self.name} rank {rank} (pid {where.pid} on {where.node})"

    def _tail(self, rank: int) -> str:
        return log_tail(self.wheres[rank]) if rank < len(self.wheres) else ""


@dataclass(frozen=True)
class Placing:
    """The seat of a role that is being built (``tandem.futures.Future``)."""

    group: WorkerGroup
    role: str
    refs: list[Any]

    def done(self) -> bool:
        ended, _ = self.group.cluster.ray.wait(self.refs, num_returns=len(self.refs), timeout=0)
        return len(ended) == len(self.refs)

    def result(self) -> Seat:
        self.group.ready()
        self.group._all(f"loading {self.role}", self.refs, LOAD_DEADLINE_S)
        return Seat(self.group, self.role)


@dataclass(frozen=True, eq=False)
class Answer:
    """What processes return from a call that is under way (``tandem.futures.Future``).

    ``result`` watches all of them: it names who is late, and who has died. It is what each returned, or what the first
    of them did.
    """

    group: WorkerGroup
    what: str
    refs: list[Any]
    first_rank: int = 0
    each: bool = False

    def done(self) -> bool:
        return len(self.group.cluster.ray.wait(self.refs, num_returns=len(self.refs), timeout=0)[0]) == len(self.refs)

    def wait(self, seconds: float) -> None:
        """Returns when all have answered, or after so long."""
        self.group.cluster.ray.wait(self.refs, num_returns=len(self.refs), timeout=seconds)

    def result(self) -> Any:
        results = self.group._all(self.what, self.refs, self.group.deadline_s, self.first_rank)
        return results if self.each else results[0]


class WorkerFailed(RuntimeError):
    """A bug showed itself in a worker: its traceback is in the message."""
