"""A run in its folder: what may begin or go on there, and the session in which it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem.assembly.configs.methods import RunConfig
from tandem.assembly.feeds import Feed
from tandem.checkpoint.saver import SaveEvery
from tandem.checkpoint.store import CheckpointStore
from tandem.config import changeable, default_settings, dump_config, paths_read
from tandem.errors import UserError, first_line
from tandem.roles import Seat
from tandem.runs.folder import RunFolder, did_nothing
from tandem.runs.goals import evaluations_of
from tandem.runs.identity import IDENTITY, Inputs, Start, read_run
from tandem.runs.lines import read_metrics
from tandem.runs.progress import Progress, say
from tandem.runs.record import RECORD, Recorder
from tandem.runs.report import write_report
from tandem.runs.tracking import Tracking
from tandem.schedules.session import Session, StepClock

ALWAYS = ("pass@1", "grad_norm", "seconds", "tokens_per_second")
"""The last 4 metrics that the display shows, whatever the method, where the run has them."""


def checked_start(config: Any, title: str, inputs: Inputs | None = None) -> Start:
    """What a command with this config would begin in its run folder, or go on with: where that may be, else UserError.

    ``title``: what the folder is known by; ``inputs``: None where nothing is read yet.
    """
    run, reads = config.run, paths_read(config)
    if "data" in reads:
        # Several, with what they hold before them and weights behind.
        reads["data"] += tuple(source.name.rpartition("@")[2] for source in config.data.sources)
    start = Start(
        out=Path(run.out),
        method=title,
        seed=run.seed,
        config=dump_config(config),
        defaults=default_settings(config),
        changeable=changeable(config),
        inputs=inputs,
        accepted=run.accept_changed,
        resume=run.resume,
        overwrite=run.overwrite,
        reads=reads,
    )
    RunFolder.check(start)
    return start


def check_out(config: RunConfig, feed: Feed | None = None) -> Path | None:
    """Refuses an ``--out`` that cannot be used, and a run that cannot be resumed, before anything slow is loaded.

    Creates nothing. Returns the model of a run that has done all its steps (which may not be known before the data are
    read, by a ``feed``) or has met its goals: nothing of it is to be done again.
    """
    run, out, steps = config.run, Path(config.run.out), feed.steps if feed else config.length
    checked_start(config, config.method.title, feed.inputs if feed else None)
    if not run.resume or not (out / IDENTITY).exists() or did_nothing(out):
        return None
    checkpoint = CheckpointStore(out / "checkpoints", keep=run.keep, run=read_run(out)).latest()
    finished = RunFolder.finished(out)
    done = max(checkpoint.step if checkpoint else 0, finished or 0)
    if steps is not None and done > steps:
        key = "steps" if run.epochs is None else "epochs"
        raise UserError(f"{key}: {steps} steps, and the run in {out} has done {done} already; give more than {done}")
    if finished is None or run.dry_run:
        return None
    if finished == steps:
        say(f"{out}: all {steps} steps are done, nothing is left to resume")
        return out / "model"
    if stop := config.evaluation.goals.met(evaluations_of(read_metrics(out / "metrics.jsonl"))):
        say(f"{out}: the run has stopped after step {finished}, nothing is left to resume: {stop}")
        return out / "model"
    return None


@contextmanager
def session(config: RunConfig, trainers: Mapping[str, Seat], feed: Feed) -> Iterator[Session]:
    """The run folder, open; its config written; the display on.

    The display shows the metrics that lead the method, and those that every run writes.
    Called once everything the run needs is loaded and valid, so that a wrong input never leaves a half-made folder.
    """
    run, title, counts = config.run, config.method.title, feed.counts
    folder = RunFolder.open(checked_start(config, title, feed.inputs))
    with folder:
        folder.event("start", title=title, **(asdict(counts) if counts else {}))
        store = CheckpointStore(folder.checkpoints, keep=run.keep, run=folder.identity)
        checkpoint = store.latest()
        done = checkpoint.step if checkpoint else 0
        with (
            reported(folder, title, config.leads, config.held_out_judge),
            Progress(
                title, total=feed.steps, start=done, leads=(*config.leads, *ALWAYS), judge=config.held_out_judge
            ) as progress,
        ):
            if folder.replaced:
                progress.note(f"{run.out}: in place of a run that had done no step")
            elif run.resume and checkpoint is None:
                progress.note(f"{run.out}: no checkpoint to resume from; the run begins with step 1")
            if lengths := {key: folder.changed[key] for key in ("steps", "epochs") if key in folder.changed}:
                then, now = (
                    ", ".join(f"{values[i]} {key}" for key, values in lengths.items() if values[i] is not None)
                    for i in (0, 1)
                )
                share = ", and so was the warmup, a share of them" if 0 < config.optim.warmup_steps < 1 else ""
                progress.note(f"{now} now; what is done was done for {then}{share}")
            if counts and (counts.kept < counts.rows or counts.truncated):
                progress.note(f"data: {counts}")
            started = Session(
                run=folder,
                store=store,
                save_every=SaveEvery.parse(run.save_every),
                trainers=trainers,
                progress=progress,
                clock=StepClock(progress, lambda: trainers["actor"].call("memory_peak")),
                rollouts_logged=run.rollouts_logged,
                recorder=Recorder(folder=folder.path / RECORD, run=folder.identity["id"], steps=feed.planned)
                if run.record
                else None,
                goals=config.evaluation.goals,
                ema=config.optim.ema_decay is not None,
                tracking=Tracking(folder.path, run.track) if run.track else None,
            )
            with closing_trackers(started):
                yield started


@contextmanager
def closing_trackers(session: Session) -> Iterator[None]:
    """Lets the trackers of a session end after the body, however that does, and says what has gone wrong with them."""
    try:
        yield
    finally:
        if session.tracking is not None:
            with session.progress.phase("closing trackers"):
                failed = session.tracking.close()
            with suppress(UserError):  # a full disk, which the run has ended of
                session.tell(failed)


@contextmanager
def reported(folder: RunFolder, title: str, leads: Seq[str], judge: str) -> Iterator[None]:
    """Writes the run's summary and curves when the body ends, however it does: they change nothing of that."""
    ended = "finished"
    try:
        yield
    except BaseException as error:
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else f"ended by {type(error).__name__}: {error}"
        raise
    finally:
        try:
            write_report(folder.path, title=title, leads=leads, ended=ended, judge=judge)
        except Exception as error:  # whatever a picture or a full disk raises, the run has ended as it has
            say(f"{folder.path}: its summary is not written: {first_line(error)}")
