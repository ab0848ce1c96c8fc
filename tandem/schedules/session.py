"""What every schedule does around its steps: resume, record, save, and stop without losing anything."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.checkpoint.random_state import capture_random_state, restore_random_state, seed_generators
from tandem.checkpoint.saver import SaveEvery
from tandem.checkpoint.store import CheckpointStore
from tandem.errors import NonFiniteError
from tandem.roles import Metrics, Trainer
from tandem.runs.folder import RunFolder
from tandem.runs.progress import Progress
from tandem.types import Group


class StepClock:
    """Seconds spent in each phase of a step, and the most memory allocated in it.

    ``memory`` gives the peak in GB since it was last asked; None where that means nothing.
    """

    def __init__(self, memory: Callable[[], float | None] = lambda: None) -> None:
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.memory = memory
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start
        if (peak := self.memory()) is not None:
            self.peaks[phase] = max(peak, self.peaks.get(phase, 0.0))

    def metrics(self) -> Metrics:
        """``seconds`` since the clock started, ``seconds_<phase>``, and ``memory_gb_<phase>``."""
        metrics = {"seconds": time.perf_counter() - self.started}
        metrics |= {f"seconds_{phase}": seconds for phase, seconds in self.phases.items()}
        return metrics | {f"memory_gb_{phase}": peak for phase, peak in self.peaks.items()}


@dataclass(kw_only=True)
class Session:
    """A run folder, its checkpoints and its display. ``trainers`` are what a checkpoint holds, by role."""

    run: RunFolder
    store: CheckpointStore
    save_every: SaveEvery
    trainers: Mapping[str, Trainer]
    progress: Progress
    seed: int = 0
    """Of the global random generators, which a user's reward function may draw from."""
    rollouts_logged: int = 8
    """Rollouts written to ``rollouts.jsonl`` each step."""
    saved_step: int = field(default=-1, init=False)
    random_state: dict[str, Any] = field(default_factory=dict, init=False)
    """Of the global generators after the last recorded step, for a checkpoint that is saved within the next one."""

    def resume(self, initial_state: dict[str, float]) -> tuple[int, dict[str, float]]:
        """Loads the newest whole checkpoint, if there is one: (steps done, algorithm state).

        Metrics written after it are dropped, so that each step stands once in the files.
        """
        checkpoint = self.store.latest()
        step, state = 0, initial_state
        if checkpoint is None:
            seed_generators(self.seed)
        else:
            for role, trainer in self.trainers.items():
                trainer.load_state_dict(checkpoint.load(role))
            restore_random_state(checkpoint.load("random"))
            step, state = checkpoint.step, dict(checkpoint.state["algorithm"])
            self.saved_step = step
            self.run.event("resume", step=step)
        self.random_state = capture_random_state()
        self.run.truncate_after(step if checkpoint is not None else -1)
        return step, state

    def record(self, step: int, metrics: Metrics, groups: Seq[Group] = ()) -> None:
        """One line in ``metrics.jsonl``, a few rollouts, and the display."""
        self.run.log_metrics(step, metrics)
        if groups:
            self.run.log_rollouts(step, groups, self.rollouts_logged)
        self.progress.update(step, metrics)
        self.random_state = capture_random_state()

    def save_if_due(self, step: int, state: dict[str, float], *, last: bool = False) -> None:
        """Saves where ``save_every`` says so, and after the last step unless saving is off."""
        if self.save_every.due(step) or (last and self.save_every.enabled):
            self.save(step, state)

    def save(self, step: int, state: dict[str, float]) -> None:
        """A checkpoint from which the run goes on as if it had never stopped."""
        if step == self.saved_step:
            return
        parts = {role: trainer.state_dict() for role, trainer in self.trainers.items()}
        path = self.store.save(step, {**parts, "random": self.random_state}, {"algorithm": state})
        self.saved_step = step
        self.run.event("checkpoint", step=step, path=str(path))

    def finish(self, trainer: Trainer) -> Path:
        """Exports the trained model to ``<run>/model``, whole or not at all, and returns that folder."""
        folder = self.run.path / "model"
        aside = self.run.path / ".model-partial"
        shutil.rmtree(aside, ignore_errors=True)
        trainer.export(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        self.run.event("finish", model=str(folder))
        return folder

    @contextmanager
    def guard(self, step: int, state: dict[str, float]) -> Iterator[None]:
        """Around everything that step ``step`` does: what ends it there loses no step that was done before.

        A loss or gradient that is not finite stops the run with the last good state saved. Ctrl-C and SIGTERM save
        the state after the last step, unless this one has changed parameters already.
        """
        before = self._versions()
        try:
            yield
        except NonFiniteError as error:
            # No parameter was touched by the minibatch that failed; earlier ones of the same step stay applied.
            self.save(step - 1, state)
            self.run.event("error", step=step, message=str(error))
            where = self.store.path(step - 1)
            raise NonFiniteError(f"step {step}: {error}; the last good state is in {where}") from error
        except KeyboardInterrupt:
            if self.save_every.enabled and step > 1 and self._versions() == before:
                self.save(step - 1, state)
            kept = f"go on after step {self.saved_step} with --resume" if self.saved_step >= 0 else "nothing is saved"
            self.progress.note(f"stopped in step {step}; {kept}")
            raise

    def _versions(self) -> list[int]:
        return [trainer.version for trainer in self.trainers.values()]
