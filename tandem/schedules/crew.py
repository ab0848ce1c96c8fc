"""Who does what in a run, and how a step's minibatches go through all that is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from tandem.batch import Batch
from tandem.futures import Future
from tandem.methods.base import Method
from tandem.roles import Clock, Metrics, Seat, Source, call_all, call_each
from tandem.rollout.prepare import Preparation, Prepared, sampler_gap
from tandem.runs.progress import Progress
from tandem.schedules.session import Evaluate
from tandem.types import Ticket

OF_TRAINER = ("loss", "grad_norm", "learning_rate")
"""What every trainer reports: 3 metrics, which carry the role's name where it is not the actor's."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The parts of a run that the pipeline sets to work."""

    method: Method
    tickets: Callable[[Seq[int]], list[Ticket]]
    """Gives the tickets at some positions of the run's stream of items."""
    source: Source[Any]
    prepare: Preparation
    trainers: Mapping[str, Seat]
    """What is trained, by role: the ``actor`` first."""
    push_weights: Callable[[int], Metrics] | None
    """Gives the sampler the policy's weights; its argument is their version. None: nothing is sampled."""
    evaluate: Evaluate

    ess_floor: float | None = None
    """Effective sample size of a minibatch below which the actor's learning rate is scaled down. None: never."""
    ahead: Callable[[Progress], Seq[Future[Any]]] = lambda progress: ()
    """Begins what is better done while the first items are made than after them."""
    refresh: Callable[[int], None] | None = None
    """Renews the reference where that is due after a step. None: it stays as it was, or there is none."""

    def publish(self, clock: Clock) -> Metrics:
        """Gives the sampler the policy's weights as they are now."""
        if self.push_weights is None:
            return {}
        with clock("sync"):
            return self.push_weights(self.trainers["actor"].call("version"))

    def train(self, prepared: Prepared, *, roles: Collection[str], done: int, changing: Callable[[], None]) -> Metrics:
        """Every minibatch of every epoch through the ``roles`` that are trained; metrics are means over minibatches.

        ``done`` is how many steps of the run are behind, for the learning rate. ``changing`` is called before
        parameters change. Of roles that share a home only one has a gradient at a time. What the source has begun moves
        along meanwhile.
        """
        collected: list[Metrics] = []
        for number, minibatch in enumerate(prepared):
            at = done + number / len(prepared)
            metrics: Metrics = {}
            for turn in self._turns(roles):
                metrics |= self._step(turn, minibatch, at, changing)
            collected.append(metrics)
        means = {name: sum(m[name] for m in collected) / len(collected) for name in collected[0]}
        return prepared.metrics | means | self.method.measured(means) | {"trained_tokens": float(prepared.batch.tokens)}

    def _step(self, roles: list[str], minibatch: Batch, done: float, changing: Callable[[], None]) -> Metrics:
        seats = {role: self.trainers[role] for role in roles}
        losses = call_all(seats, "forward_backward", minibatch, meanwhile=self.source.look)
        scales = self._scales(minibatch, losses)
        changing()
        steps = call_each(seats, "optim_step", {role: (done, scales.get(role, 1.0)) for role in roles})
        metrics = {
            f"{role}_{name}" if role != "actor" and name in OF_TRAINER else name: value
            for role in roles
            for name, value in (losses[role] | steps[role]).items()
        }
        return metrics | ({"ess_scale": scales["actor"]} if scales else {})

    def _scales(self, minibatch: Batch, losses: Mapping[str, Metrics]) -> dict[str, float]:
        """What the actor's learning rate is multiplied by, ``min(1, effective sample size / floor)``; without one {}.

        The sample size is of the minibatch's tokens that are trained on: by the log-probs that ratios are taken
        against where the actor gave them at the start of the step, else by those of the forward that is trained on.
        """
        if self.ess_floor is None or "actor" not in losses:
            return {}
        seen = sampler_gap(minibatch) if "actor" in minibatch.seen else losses["actor"]
        return {"actor": min(1.0, seen["effective_sample_size"] / self.ess_floor)}

    def _turns(self, roles: Collection[str]) -> list[list[str]]:
        """The roles in lists of those that live apart: of each home, the first in the first turn, and so on."""
        turns: list[list[str]] = []
        for role in filter(roles.__contains__, self.trainers):
            home = self.trainers[role].home
            free = [turn for turn in turns if all(self.trainers[other].home is not home for other in turn)]
            if free:
                free[0].append(role)
            else:
                turns.append([role])
        return turns
