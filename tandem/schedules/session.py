"""What stands around the steps of a run: resume, record, save, and stop without losing anything."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.checkpoint.saver import SaveEvery
from tandem.checkpoint.store import CheckpointStore
from tandem.errors import DiskFailure, NonFiniteError, RunFailure, WorkerFailure, first_line
from tandem.roles import Metrics, Seat
from tandem.rollout.evaluate import Evaluation
from tandem.runs.folder import EMA_MODEL, RunFolder
from tandem.runs.goals import BEST_MODEL, Best, Goals, evaluations_of, read_best, write_about
from tandem.runs.lines import read_metrics
from tandem.runs.progress import Progress
from tandem.runs.record import Recorded, Recorder, steps_in
from tandem.runs.tracking import Tracking
from tandem.signals import held
from tandem.stages import HERE, Seconds, counting, longest, since, told, told_seconds, told_start
from tandem.types import Group
from tandem.whole import remove_folder, restore_folder, whole_folder

Evaluate = Callable[[int, Progress], Evaluation]
"""Measures the held-out data after a step at which that is due; else nothing."""
Carried = dict[str, Any]
"""An open ticket as a checkpoint has it: its ``number``, the steps done when it was ``admitted``, and its ``item``
(``tandem.roles.Source.kept``), None where that had not ended."""
ENDED = "ended"
"""The part of a checkpoint with the items that had ended and were not trained on yet."""

STEPS_SCALED = 5
"""After 5 steps in a row whose learning rate was scaled down, by more than 1%, for their effective sample size, it is
said."""


class StepClock:
    """Seconds spent in each phase of a step, and the most memory allocated in it (``tandem.roles.Clock``).

    ``progress`` shows the phase. ``memory`` gives the peak in GB since it was last asked; None where that means
    nothing.
    """

    def __init__(self, progress: Progress, memory: Callable[[], float | None] = lambda: None) -> None:
        self.progress = progress
        self.memory = memory
        self.start()

    def start(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str, *, of: int = 0, done: Callable[[], int] | None = None) -> Iterator[None]:
        """Around a phase; ``done()`` says at any time how many of ``of`` things are done."""
        start = time.perf_counter()
        with self.progress.phase(phase, of=of, done=done):
            try:
                yield
            finally:
                self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start
            peak = self.memory()
        if peak is not None:
            self.peaks[phase] = max(peak, self.peaks.get(phase, 0.0))

    def metrics(self) -> Metrics:
        """``seconds`` since the clock started, ``seconds_<phase>``, and ``memory_gb_<phase>``."""
        metrics = {"seconds": time.perf_counter() - self.started}
        metrics |= {f"seconds_{phase}": seconds for phase, seconds in self.phases.items()}
        return metrics | {f"memory_gb_{phase}": peak for phase, peak in self.peaks.items()}


@dataclass(kw_only=True)
class Session:
    """A run folder, its checkpoints and its display. ``trainers`` are what a checkpoint holds, by role.

    The pipeline goes through its steps within ``kept``: it says ``changing`` before a step changes parameters,
    ``reached`` when the step has been trained, and ``record`` when it has been evaluated.
    """

    run: RunFolder
    store: CheckpointStore
    save_every: SaveEvery
    trainers: Mapping[str, Seat]
    progress: Progress
    clock: StepClock
    rollouts_logged: int = 8
    """Rollouts written to ``rollouts.jsonl`` each step, in whole groups; as many held-out ones."""
    recorder: Recorder | None = None
    """Writes what each step trains on. None: it is not recorded."""
    goals: Goals = field(default_factory=Goals)
    tracking: Tracking | None = None
    numbers: Callable[[], Mapping[str, float | None]] = field(default=dict, init=False)
    """What the config of the actor as it is now is to say where it is written (``training.trainer.remember``)."""
    workers: Callable[[], dict[str, Seconds]] = field(default=dict, init=False)
    """Seconds of the stages of the start of each process but this one so far, by its name."""
    ema: bool = False
    """Whether the actor keeps a running average of its weights."""
    step: int = field(default=0, init=False)
    """The last step that was reached, which is what a checkpoint is of."""
    taken: int = field(default=0, init=False)
    """How many items of the data the steps reached have taken: the cursor of the run."""
    state: dict[str, float] = field(default_factory=dict, init=False)
    """The method's after it."""
    pending: Metrics | None = field(default=None, init=False)
    """Its metrics where they are not written yet, since its evaluation is not done."""
    saved_step: int = field(default=-1, init=False)
    handed_out: int = field(default=0, init=False)
    """``taken``, and what the step in progress has taken."""
    returned: list[int] = field(default_factory=list, init=False)
    """Numbers below ``handed_out`` that are to be handed out again, lowest first: what was open at the checkpoint."""
    again: list[int] = field(default_factory=list, init=False)
    """Those of them that the step in progress has taken, which may be cut short before they are begun."""
    carried: list[Carried] = field(default_factory=list, init=False)
    """What had ended by then, and was not trained on."""
    carries: Callable[[int], list[Carried]] = field(default=lambda below: [], init=False)
    """Of all tickets below a number, those that no step reached has trained on or passed over."""
    changed: bool = field(default=False, init=False)
    """Whether the step in progress may have changed parameters."""
    measuring: bool = field(default=False, init=False)
    """Whether the step reached is not over: its weights are on their way to the sampler."""
    evaluations: list[Mapping[str, float]] = field(default_factory=list, init=False)
    """Those so far, with their steps."""
    scaled: int = field(default=0, init=False)
    """Steps in a row whose learning rate was scaled down (``STEPS_SCALED``)."""
    _counted: dict[str, Seconds] = field(default_factory=dict, init=False)
    """What each process's stages had taken when the first step began; empty from its end on."""
    best: Best | None = field(default=None, init=False)
    """What ``<run>/best`` holds."""

    def resume(self, initial_state: dict[str, float]) -> None:
        """Goes to where the newest whole checkpoint stands, if there is one: its step, and the method's state.

        Metrics written after it are dropped, so that each step stands once in the files.
        """
        checkpoint = self.store.latest()
        step, state = 0, initial_state
        pending: Metrics | None = {}
        if checkpoint is not None:
            for role, trainer in self.trainers.items():
                trainer.call("load_state_dict", checkpoint.load(role))
            step, state = checkpoint.step, dict(checkpoint.state["method"])
            pending, self.handed_out = checkpoint.state.get("pending"), checkpoint.state["taken"]
            self.returned = checkpoint.state.get("open", [])
            self.carried = checkpoint.load(ENDED)["items"] if f"{ENDED}.pt" in checkpoint.files else []
            self.saved_step = step
            self.run.event("resume", step=step)
        written = step if checkpoint is not None else -1
        self.run.truncate_after(written, metrics=written if pending is None else step - 1)
        self._at(step, state, pending)
        self.evaluations = evaluations_of(read_metrics(self.run.metrics))
        if self.evaluations:
            self.goals.require({name for line in self.evaluations for name in line})
        self._find_best()
        if self.recorder is not None and len(steps_in(self.recorder.folder)) < max(step, 0):
            self.note("steps up to here are not all recorded, so the run cannot be replayed")

    def record_groups(self, taken: Seq[Recorded]) -> None:
        """Writes what the step in progress is going to train on, where that is recorded."""
        if self.recorder is not None:
            with self.progress.phase("recording"):
                self.recorder.write(self.step + 1, taken)

    def ready(self) -> None:
        """The first step begins: says where the time until now went, and in which process it was longest.

        All processes' seconds stand in ``events.jsonl``. Nothing where nobody has counted them (``tandem.stages``).
        """
        with counting() as stages:
            self._counted = {HERE: stages.so_far()} | self.workers()
        if self._counted[HERE]:
            self.run.event("ready", seconds=round(stages.total, 3), stages=since({}, self._counted))
            total = stages.total
            self.progress.note(f"ready after {told_seconds(total)} s: {told_start(self._counted, total)}")

    def _first_step(self) -> None:
        """Says for how long the first step has compiled and captured, which later ones need not."""
        before, self._counted = self._counted, {}
        if not before.get(HERE):
            return
        with counting() as stages:
            spent = since(before, {HERE: stages.so_far()} | self.workers())
        if any(spent.values()):
            self.run.event("first_step", step=self.step, stages=spent)
            name = longest(spent)
            where = "" if name == HERE else f", {name}"
            self.progress.note(f"in the first step only{where}: {told(spent[name])} s")

    def take(self, count: int) -> Seq[int]:
        """Positions of the next ``count`` items of the data. No position is handed out twice, and none is left out."""
        again, self.returned = self.returned[:count], self.returned[count:]
        self.again += again
        first, self.handed_out = self.handed_out, self.handed_out + count - len(again)
        return [*again, *range(first, self.handed_out)]

    def give_back(self, number: int) -> None:
        """A position that was handed out is to be handed out again."""
        insort(self.returned, number)

    def changing(self) -> None:
        """From here on the step in progress changes parameters."""
        self.changed = True

    def reached(self, state: dict[str, float], metrics: Metrics, groups: Seq[Group] = ()) -> None:
        """The next step has been trained, and goes into the next checkpoint. Writes a few of its rollouts."""
        self._at(self.step + 1, state, metrics)
        self.measuring = True
        self.scaled = self.scaled + 1 if metrics.get("ess_scale", 1.0) < 0.99 else 0
        if self.scaled == STEPS_SCALED:
            self.note(
                f"ess_floor has scaled the learning rate down for {self.scaled} steps (now by "
                f"{metrics['ess_scale']:.3g}): the samples are far from the policy; give a smaller lag or learning rate"
            )
        self.run.log_rollouts(self.step, groups, self.rollouts_logged)

    def measured(self, metrics: Metrics) -> None:
        """The step reached is over; all its metrics, of which some are known only now."""
        self.pending, self.measuring = metrics, False
        self._first_step()

    def record(self, evaluate: Evaluate) -> None:
        """Evaluates the step reached, unless that has been done: one line in ``metrics.jsonl``, and the display.

        Where it is the best so far, its model and a checkpoint are kept. Raises UserError where the first evaluation
        lacks a metric that the run's goals name.
        """
        if self.pending is not None:
            found = evaluate(self.step, self.progress)
            if found.metrics and not self.evaluations:
                self.goals.require(found.metrics)
            if metrics := self.pending | found.metrics:
                self.run.log_metrics(self.step, metrics)
                for name, groups in found.groups.items():
                    self.run.log_rollouts(self.step, groups, self.rollouts_logged, held_out=True, eval_set=name)
                self.progress.update(self.step, metrics)
            self.pending = None
            if self.tracking is not None:
                self.tell(self.tracking.written(self.step))
            self.evaluations += evaluations_of([{"step": self.step, **found.metrics}])
        self._keep_if_best()

    @property
    def stop(self) -> str:
        """Why the run's goals end it now, before its last step; nothing where they do not."""
        return self.goals.met(self.evaluations)

    def tell(self, failed: Seq[str]) -> None:
        """What has gone wrong with the trackers: the run goes on."""
        for line in failed:
            self.run.event("tracker", step=self.step, message=line)
            self.progress.note(line)

    def note(self, text: str) -> None:
        """Says something about the steps so far: a line above the display, and one in ``events.jsonl``."""
        self.run.event("note", step=self.step, message=text)
        self.progress.note(f"after step {self.step}: {text}")

    def save_if_due(self, *, last: bool = False) -> None:
        """Saves where ``save_every`` says so, and after the last step unless saving is off."""
        if self.save_every.due(self.step) or (last and self.save_every.enabled):
            self.save()

    def save(self) -> None:
        """A checkpoint from which the run goes on as if it had never stopped. Signals wait until it is whole."""
        if self.step == self.saved_step:
            return
        with held(), self.progress.phase("saving"):
            parts = {role: trainer.call("state_dict") for role, trainer in self.trainers.items()}
            state: dict[str, Any] = {"method": self.state, "pending": self.pending, "taken": self.taken}
            carried = self.carries(self.taken)
            if ended := [one for one in carried if one["item"] is not None]:
                parts[ENDED] = {"items": ended}
            unbegun = {*self.returned, *self.again} - {one["number"] for one in carried}
            if open := sorted([*unbegun, *(one["number"] for one in carried if one["item"] is None)]):
                state["open"] = open
            path = self.store.save(self.step, parts, state)
            self.saved_step = self.step
            self.run.event("checkpoint", step=self.step, path=str(path))

    def finish(self) -> Path:
        """Exports the trained policy to ``<run>/model``, whole or not at all, and returns that folder.

        Before it the running average of its weights, where there is one, to ``<run>/model-ema``.

        Raises RunFailure where the disk is full or refuses.
        """
        if self.ema:
            self._export(EMA_MODEL, ema=True)
        folder = self._export("model")
        stop = self.stop
        self.run.event("finish", step=self.step, model=str(folder), **({"stopped": stop} if stop else {}))
        if stop:
            self.progress.note(f"stopped after step {self.step}: {stop}")
        return folder

    def _export(self, name: str, best: Best | None = None, *, ema: bool = False) -> Path:
        folder, actor = self.run.path / name, self.trainers["actor"]
        try:
            with whole_folder(folder) as aside, self._averaged() if ema else nullcontext():
                if numbers := self.numbers():
                    actor.call("remember", numbers)
                with self.progress.phase(f"writing the {name}" + (" model" if best else "")):
                    # Other processes share the disk with this one, but may work in another folder.
                    actor.call("export", aside if actor.home.at_once else aside.absolute())
                if best is not None:
                    write_about(aside, best)
        except (OSError, RunFailure) as error:
            rest = "--resume writes it again" if self.saved_step == self.step else "no checkpoint holds it either"
            raise RunFailure(f"the model is trained and not written: {error}; {rest}") from error
        return folder

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the running average in the places of the actor's weights. Signals do not part them."""
        with held():
            self.trainers["actor"].call("swap_average")
        try:
            yield
        finally:
            with held():
                self.trainers["actor"].call("swap_average")

    def _find_best(self) -> None:
        """What an earlier start has kept. A model of a later step than this one is of no evaluation of this run."""
        for name in ("model", EMA_MODEL, BEST_MODEL):
            restore_folder(self.run.path / name)
        best = read_best(self.run.path)
        if best is not None and best.step > self.step:
            remove_folder(self.run.path / BEST_MODEL)
            self.note(f"the best model was of step {best.step}, which comes again: it is removed")
            best = None
        self._spare(best)

    def _keep_if_best(self) -> None:
        """Keeps the model of the step reached where its evaluation is the best, its checkpoint first.

        So a run that is killed in between goes on from this very step, and keeps the model then.
        """
        goal, newest = self.goals.keep_best, self.evaluations[-1] if self.evaluations else {"step": -1}
        if goal is None or newest["step"] != self.step:
            return
        value = newest.get(goal.metric)
        if value is None or not goal.better(value, self.best.value if self.best else None):
            return
        if self.step > 0 and self.save_every.enabled:
            self.save()
        best = Best(step=self.step, metric=goal.metric, value=value)
        self._export(BEST_MODEL, best)
        self.run.event("best", step=best.step, metric=best.metric, value=best.value)
        self._spare(best)

    def _spare(self, best: Best | None) -> None:
        self.best = best
        self.store.spared = best.step if best else None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around the steps of a run: whatever ends it loses no step that was reached before.

        Its state is saved, unless the step in progress has changed parameters already, or a signal ends a run that
        saves nothing (``--save-every 0``). A loss or a gradient that is not finite changes none; earlier minibatches
        of the same step stay applied.
        """
        try:
            yield
        except BaseException as error:
            step, doing = self.step + (not self.measuring), self.progress.ended_in(error)
            wanted = self.save_every.enabled or not isinstance(error, KeyboardInterrupt)
            if isinstance(error, NonFiniteError) or (self.step > 0 and not self.changed and wanted):
                try:
                    self.save()
                except Exception as why:  # what ended the run may be what hinders the save
                    if not isinstance(error, WorkerFailure | DiskFailure):
                        self.progress.note(f"step {self.step} is not saved: {first_line(why)}")
            if isinstance(error, NonFiniteError):
                self.run.event("error", step=step, message=str(error))
                where = self.store.path(self.step)
                raise NonFiniteError(f"step {step}: {error}; the last good state is in {where}") from error
            kept = f"go on after step {self.saved_step} with --resume"
            if self.saved_step < 0:
                kept = "nothing is saved" + (": --resume begins with step 1" if self.save_every.enabled else "")
            self.progress.note(f"stopped in step {step}; {kept}")
            if isinstance(error, WorkerFailure | DiskFailure):
                raise RunFailure(f"step {step}{', ' * bool(doing)}{doing}: {error}; {kept}") from error
            raise

    def _at(self, step: int, state: dict[str, float], pending: Metrics | None) -> None:
        self.step, self.state, self.pending, self.taken = step, state, pending, self.handed_out
        self.changed, self.again = False, []
