"""Pushing weights from a trainer to engines that hold their own, and proving that they arrived (the driver's side)."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Literal

from tandem.errors import UserError
from tandem.parallel.world import LOOPBACK
from tandem.roles import HoldingEngine, Metrics, Seat
from tandem.sync.check import TruthCheck
from tandem.sync.links import Link, Transport
from tandem.sync.plan import Plan


@dataclass(kw_only=True)
class PushParams:
    """How weights travel."""

    dtype: Literal["float32", "bfloat16"]
    """The engines'."""
    transport: Transport | Literal["auto"] = "auto"
    timeout_s: float = 300.0
    drops: bool = False
    """Whether engines drop their weights between pushes, so that every push must bring all of them."""


class WeightPush:
    """Weights from a trainer's ranks to engines over links. ``connect`` once, then a call a push.

    Engines on the trainer's own GPUs map its buffers (CUDA IPC); others get them by broadcast (NCCL, or gloo on
    CPUs), each trainer rank feeding its part of the engines.

    ``source`` is a ``tandem.sync.source.WeightSource`` in every rank of the trainer, ``engines`` are
    ``tandem.roles.FedEngine``s; neither may be called at once, since each waits for the other. ``check`` compares every
    tensor of every push, unless it is turned off.
    """

    def __init__(self, source: Seat, engines: Seat, params: PushParams, check: TruthCheck) -> None:
        self.source, self.engines, self.params, self.check = source, engines, params, check
        self.plan: Plan = source.call("plan", params.dtype)
        self.adapters: Plan | None = source.call("moving_plan", params.dtype)
        self.wholly, self.moving = self.plan, None if params.drops else self.adapters
        """What the first push over new links consists of, and what those after it do, where that is not all."""
        self.version = 0
        self.pushed = False
        """Whether anything has gone over the links that there are."""

    def connect(self, plan: Plan | None = None) -> None:
        """Makes all links anew, for pushes of a plan; None: of all. Raises UserError where devices cannot be linked."""
        self.plan, self.pushed = plan or self.wholly, False
        transport, receivers = self._pair()
        links = [self._link(transport, rank, mine) if mine else None for rank, mine in enumerate(receivers)]
        ports = self.source.submit_each("listen", [(link, self.plan) for link in links]).result()
        ends: dict[int, Link] = {}
        for link, port, mine in zip(links, ports, receivers, strict=True):
            for place, number in enumerate(mine):
                assert link is not None
                ends[number] = Link(**vars(link) | {"port": port, "rank": place + 1})
        per = len(ends) // self.check.count
        engines = [([ends[number] for number in range(e, e + per)],) for e in range(0, len(ends), per)]
        self._both(("connect", ()), ("connect", engines))
        self.transport = transport
        # An engine that was started again has to show anew that it computes the same.
        self.check.pushes = 0

    def __call__(self, version: int) -> Metrics:
        """Pushes all weights, as of optimizer step ``version``, and proves it. Returns seconds and bandwidth.

        Raises WeightMismatch, naming the parameter, where an engine does not hold the trainer's.
        """
        if self.untried:
            with self.check.trial():
                self.push(version)
                self.check.prove(version)
        metrics = self.push(version)
        start = time.perf_counter()
        self.check.prove(version)
        metrics["sync_check_seconds"] += time.perf_counter() - start
        return metrics

    def again(self, version: int | None = None) -> dict[str, float]:
        """Links the engines anew, one of which was started again, and pushes what they had, or ``version``."""
        version = self.version if version is None else version
        self.connect()
        return self(version)

    def push(self, version: int) -> Metrics:
        """The push and its checksums. ``check.prove`` is left to do once the engines can compute."""
        start = time.perf_counter()
        self.version = version
        if self.moving is not None and self.pushed and self.plan != self.moving:
            # The base has arrived. From now on less travels.
            self.connect(self.moving)
        check = self.check.on
        sums, found = self._both(("send", (check,)), ("receive", [(version, check)] * self.check.count))
        pushed = time.perf_counter()
        self.pushed = True
        self.check.compare(version, sums, found)
        return {
            "sync_seconds": pushed - start,
            "sync_check_seconds": time.perf_counter() - pushed,
            "sync_gb_per_second": self.plan.nbytes / (pushed - start) / 1e9,
        }

    @property
    def untried(self) -> bool:
        """Whether a push within ``check.trial()`` has yet to show that engines compute with adapters.

        Once, before anything is sampled: what ran meanwhile would go on with the trial's.
        """
        return self.adapters is not None and self.check.untried

    def _both(self, source: tuple[str, tuple[Any, ...]], engines: tuple[str, list[tuple[Any, ...]]]) -> tuple[Any, Any]:
        """A call to the source and one to the engines at the same time."""
        received = self.engines.submit_each(*engines)
        sent = self.source.submit(source[0], *source[1])
        # The engines first: when one has died, the source waits for it in vain.
        theirs = received.result()
        return sent.result(), theirs

    def _pair(self) -> tuple[Transport, list[list[int]]]:
        """The transport, and for each trainer rank the numbers of the engine ranks that it feeds."""
        senders, sinks = list(self.source.devices), list(self.engines.devices)
        where = {device: rank for rank, device in enumerate(senders)}
        on_gpus = all(gpu is not None for _, gpu in [*senders, *sinks])
        together = [sink in where for sink in sinks] if on_gpus else [False]
        wanted = self.params.transport
        if any(together) and not all(together) and wanted != "gloo":
            raise UserError("placement: engines are partly on the trainer's GPUs and partly on others; give them all "
                            "the same GPUs as the trainer, or GPUs of their own")  # fmt: skip
        found: Transport = "gloo" if not on_gpus else "ipc" if all(together) else "nccl"
        if wanted != "auto" and wanted != found and wanted != "gloo":
            raise UserError(f"engine.transport: {wanted} does not reach engines that are placed so; {found} does")
        transport: Transport = found if wanted == "auto" else wanted
        receivers: list[list[int]] = [[] for _ in senders]
        for number, sink in enumerate(sinks):
            receivers[where[sink] if transport == "ipc" else number % len(senders)].append(number)
        return transport, receivers

    def _link(self, transport: Transport, rank: int, receivers: Seq[int]) -> Link:
        host = self.source.devices[rank][0]
        alone = {self.engines.devices[number][0] for number in receivers} == {host}
        place, size, timeout_s = LOOPBACK if alone else host, len(receivers) + 1, self.params.timeout_s
        return Link(transport, place, 0, 0, size, self.plan, timeout_s, token_hex(32))


def between_sequences(engine: HoldingEngine, push: Callable[[int], Metrics]) -> Callable[[int], Metrics]:
    """``push``, once all samples that run have ended; no other begins before it has come.

    ``settling_seconds``: how long that took.
    """

    def pushed(step: int) -> Metrics:
        start = time.perf_counter()
        try:
            engine.hold(True)
            engine.wait(lambda: not engine.running)
            metrics = {"settling_seconds": time.perf_counter() - start} | push(step)
        except BaseException:
            with suppress(Exception):  # what failed first is what is told
                engine.hold(False)
            raise
        engine.hold(False)
        return metrics

    return pushed


class FillPush:
    """Weights into engines in the trainer's own processes: each rank fills its own engine with gathered parameters.

    ``replicas`` does that (``assembly.models.Replicas``). ``adapters``: whether there are any apart from the base; they
    are tried before the first fill.
    """

    def __init__(self, replicas: Seat, check: TruthCheck, *, adapters: bool = False) -> None:
        self.replicas, self.check, self.adapters = replicas, check, adapters

    def __call__(self, version: int) -> Metrics:
        """Fills all engines and proves it. Raises WeightMismatch, naming the parameter."""
        if self.adapters and self.check.untried:
            with self.check.trial():
                self._fill(version)
        return self._fill(version)

    def _fill(self, version: int) -> Metrics:
        start = time.perf_counter()
        ranks = self.replicas.submit_each("push", [(self.check.on,)] * len(self.replicas.devices)).result()
        pushed = time.perf_counter()
        self.check.compare(version, ranks[0][0], [found for _, found in ranks])
        self.check.prove(version)
        return {"sync_seconds": pushed - start, "sync_check_seconds": time.perf_counter() - pushed}
