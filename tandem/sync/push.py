"""Pushing weights from a trainer to engines that hold their own, and proving that they arrived (the driver's side)."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tandem.errors import UserError
from tandem.sync.bounds import LOGP_BOUNDS
from tandem.sync.checksum import Checked, Sums, add
from tandem.sync.links import Link, Transport
from tandem.sync.plan import Plan

log = logging.getLogger("tandem")
SHARE = 0.005
"""After the first pushes, parameters of this part of all bytes are checked each time (one at least), then the next."""
WHOLE = 2
"""So many pushes are checked in full: an engine may load its first in another way than those that follow."""
PROBE_EVERY = 64
PROBE_TOKENS = (11, 7)


class WeightMismatch(UserError):
    """An engine does not hold the weights that were pushed to it."""


class End(Protocol):
    """One side of a push: the ranks of a trainer, or a set of engines, wherever their processes are."""

    @property
    def places(self) -> Seq[tuple[str, str | None]]:
        """For each rank, its machine's address and its GPU."""
        ...

    def each(self, method: str, arguments: Seq[tuple[Any, ...]]) -> list[Any]:
        """Calls every rank with its own arguments; what each returned."""
        ...

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls every rank with the same arguments; what rank 0 returned."""
        ...


@dataclass(kw_only=True)
class PushParams:
    """How weights travel. ``dtype`` is the engines'."""

    dtype: Literal["float32", "bfloat16"]
    transport: Transport | Literal["auto"] = "auto"
    check: bool = True
    ranks_per_engine: int = 1
    vocabulary: int = 32
    timeout_s: float = 300.0


class WeightPush:
    """Weights from a trainer's ranks to engines over links. ``connect`` once, then a call a push.

    Engines on the trainer's own GPUs map its buffers (CUDA IPC); others get them by broadcast (NCCL, or gloo on
    CPUs), each trainer rank feeding its part of the engines.

    The truth check, unless turned off: the first two pushes compare every parameter's checksum with what the engine
    then holds, later ones a part of them; the first two and every 64th compare the log-probs of a fixed probe.
    """

    def __init__(self, source: End, trainer: End, engines: End, params: PushParams) -> None:
        self.source, self.trainer, self.engines, self.params = source, trainer, engines, params
        self.plan: Plan = source.call("plan", params.dtype)
        self.pushes = self.version = 0
        self.truth: list[list[float]] | None = None
        """The trainer's log-probs of the probe, until the engines' have been compared with them."""
        self.sizes = {spec.name: spec.nbytes for spec in self.plan.tensors}
        self.next = 0
        self.parts: dict[str, tuple[str, ...]] = {}
        """Which pushed tensors each of an engine's parameters consists of, learned at the first push."""
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="push")

    def connect(self) -> None:
        """Makes all links anew. Raises UserError where devices cannot be linked."""
        transport, receivers = self._pair()
        links = [self._link(transport, rank, len(mine)) if mine else None for rank, mine in enumerate(receivers)]
        ports = self.source.each("listen", [(link, self.plan) for link in links])
        ends: dict[int, Link] = {}
        for link, port, mine in zip(links, ports, receivers, strict=True):
            for place, number in enumerate(mine):
                assert link is not None
                ends[number] = Link(**vars(link) | {"port": port, "rank": place + 1})
        per = self.params.ranks_per_engine
        engines = [([ends[number] for number in range(e, e + per)],) for e in range(0, len(ends), per)]
        self._both(("connect", ()), ("connect", engines))
        self.transport = transport
        self.pushes = 0

    def __call__(self, version: int) -> dict[str, float]:
        """Pushes all weights, as of optimizer step ``version``, and proves it. Returns seconds and bandwidth.

        Raises WeightMismatch, naming the parameter, where an engine does not hold what was sent.
        """
        metrics = self.push(version)
        start = time.perf_counter()
        self.prove(version)
        metrics["sync_check_seconds"] += time.perf_counter() - start
        return metrics

    def again(self) -> None:
        """Links the engines anew, one of which was started again, and pushes what they had."""
        self.connect()
        self(self.version)

    def push(self, version: int) -> dict[str, float]:
        """The push and its checksums. ``prove`` is left to do once the engines can compute."""
        start = time.perf_counter()
        self.version = version
        chosen = self._chosen()
        names = self._names(chosen)
        # An empty list asks for no checksums, None for all.
        asked = None if chosen is None and self.params.check else names
        sums, held = self._both(("send", (names,)), ("receive", [(version, asked)] * self._engines))
        pushed = time.perf_counter()
        if self.params.check:
            self._compare(version, held, sums)
            if chosen is None:
                self._learn(held[0])
            if self.pushes < WHOLE or self.pushes % PROBE_EVERY == 0:
                self.truth = self.trainer.call("logprobs", self._sequences)
        self.pushes += 1
        return {
            "sync_seconds": pushed - start,
            "sync_check_seconds": time.perf_counter() - pushed,
            "sync_gb_per_second": self.plan.nbytes / (pushed - start) / 1e9,
        }

    def prove(self, version: int) -> None:
        """Compares the engines' log-probs of the probe with the trainer's, where this push has taken them."""
        if self.truth is None:
            return
        truth = [x for row in self.truth for x in row]
        self.truth = None
        for engine, rows in enumerate(self.engines.each("logprobs", [(self._sequences,)] * self._engines)):
            found = [x for row in rows for x in row]
            gap = sum(abs(a - b) for a, b in zip(truth, found, strict=True)) / len(truth)
            if not gap <= LOGP_BOUNDS[self.params.dtype]:
                held = self.engines.each("checksums", [(None,)] * self._engines)
                self._compare(version, held, self.source.call("send_checksums"))
                raise WeightMismatch(
                    f"weight sync: after push {version} engine {engine} gives the probe log-probs that differ from the "
                    f"trainer's by {gap:.3g} nats on average (bound {LOGP_BOUNDS[self.params.dtype]}), though every "
                    "checksum agrees: it computes something else with the same weights (dtype, attention, rope scaling)"
                )

    @property
    def _sequences(self) -> list[list[int]]:
        """The tokens of the probe."""
        rng = random.Random(0)
        return [[rng.randrange(self.params.vocabulary) for _ in range(n)] for n in PROBE_TOKENS]

    def close(self) -> None:
        self.pool.shutdown(wait=False)

    @property
    def _engines(self) -> int:
        return len(self.engines.places) // self.params.ranks_per_engine

    def _both(self, source: tuple[str, tuple[Any, ...]], engines: tuple[str, list[tuple[Any, ...]]]) -> tuple[Any, Any]:
        """A call to the source and one to the engines at the same time."""
        sent = self.pool.submit(self.source.call, source[0], *source[1])
        received = self.pool.submit(self.engines.each, *engines)
        # The engines first: when one has died, the source waits for it in vain.
        theirs = received.result()
        return sent.result(), theirs

    def _chosen(self) -> list[str] | None:
        """The engine's parameters to check in this push, in rotation; None for all."""
        if self.pushes < WHOLE:
            return None
        chosen: list[str] = []
        room = SHARE * self.plan.nbytes
        while self.parts and room > 0 and len(chosen) < len(self.parts):
            chosen.append(list(self.parts)[self.next % len(self.parts)])
            room -= sum(self.sizes[part] for part in self.parts[chosen[-1]])
            self.next += 1
        return chosen

    def _names(self, chosen: list[str] | None) -> list[str]:
        if not self.params.check:
            return []
        if chosen is None:
            return [spec.name for spec in self.plan.tensors]
        return [part for name in chosen for part in self.parts[name]]

    def _compare(self, version: int, held: Seq[Mapping[str, Checked]], sums: Mapping[str, Sums]) -> None:
        """Every parameter that engines report on, if all of its parts were summed when they were sent."""
        for engine, parameters in enumerate(held):
            for name, each in parameters.items():
                if all(part in sums for part in each.parts):
                    self._compare_one(version, engine, name, each, sums)

    def _compare_one(self, version: int, engine: int, name: str, held: Checked, sums: Mapping[str, Sums]) -> None:
        sent = add([sums[part] for part in held.parts])
        if sent[:2] != held.sums[:2]:
            raise WeightMismatch(
                f"weight sync: after push {version} engine {engine} does not hold the trainer's {name} (made of "
                f"{', '.join(held.parts)}): checksum {held.sums[:2]}, sent {sent[:2]}"
            )

    def _learn(self, held: Mapping[str, Checked]) -> None:
        self.parts = {name: each.parts for name, each in held.items()}
        covered = {part for parts in self.parts.values() for part in parts}
        missing = [spec.name for spec in self.plan.tensors if spec.name not in covered]
        if missing:
            log.warning(
                "truth check: %d of %d tensors cannot be compared by checksum on this engine (such as %s), "
                "so the probe alone speaks for them",
                len(missing), len(self.plan.tensors), missing[0],
            )  # fmt: skip

    def _pair(self) -> tuple[Transport, list[list[int]]]:
        """The transport, and for each trainer rank the numbers of the engine ranks that it feeds."""
        senders, sinks = list(self.source.places), list(self.engines.places)
        where = {place: rank for rank, place in enumerate(senders)}
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

    def _link(self, transport: Transport, rank: int, receivers: int) -> Link:
        host = self.source.places[rank][0]
        return Link(transport, host, 0, 0, receivers + 1, self.plan, self.params.timeout_s)
