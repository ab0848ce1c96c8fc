"""Training on a fixed dataset: SFT and reward models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tandem.batch import Batch
from tandem.roles import Metrics, Seat
from tandem.runs.progress import Progress
from tandem.schedules.session import Evaluation, Session, StepClock


@dataclass(frozen=True, kw_only=True)
class OfflineRoles:
    """Who does what in an offline run. ``batch`` is the rows at some positions, packed, its weights stamped."""

    batch: Callable[[range], Batch]
    trainer: Seat
    evaluate: Callable[[int], Metrics]


@dataclass(frozen=True, kw_only=True)
class Offline:
    """One optimizer step a batch, of ``batch_size`` rows."""

    steps: int
    batch_size: int

    def run(self, roles: OfflineRoles, session: Session) -> None:
        """Runs from where the session's newest checkpoint stands to ``steps``."""
        done, state = session.resume({})
        with session.kept():
            session.record(partial(_evaluate, roles, session.progress))
            for step in range(done + 1, self.steps + 1):
                clock = StepClock(session.progress)
                with clock("data"):
                    batch = roles.batch(session.take(self.batch_size))
                with clock("training"):
                    metrics = roles.trainer.call("forward_backward", batch)
                    session.changing()
                    metrics |= roles.trainer.call("optim_step", step - 1)
                metrics |= {"trained_tokens": float(batch.tokens)} | clock.metrics()
                metrics["tokens_per_second"] = metrics["trained_tokens"] / metrics["seconds"]
                session.reached(step, state, metrics)
                session.record(partial(_evaluate, roles, session.progress))
                session.save_if_due(last=step == self.steps)


def _evaluate(roles: OfflineRoles, progress: Progress, step: int) -> Evaluation:
    with progress.phase("evaluating"):
        return roles.evaluate(step), []
