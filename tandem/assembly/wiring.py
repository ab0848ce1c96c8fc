"""What every command does around its own work: start a run in its folder, and build what the sections describe."""

from __future__ import annotations

import gc
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tandem.assembly.sections import DataSection, OptimSection, RunSection
from tandem.checkpoint.saver import SaveEvery
from tandem.checkpoint.store import CheckpointStore
from tandem.config import changeable, describe, dump_config
from tandem.data.rows import Rows, load_rows
from tandem.errors import UserError
from tandem.roles import Seat
from tandem.runs.folder import RunFolder, did_nothing
from tandem.runs.identity import IDENTITY, Inputs, Start, read_identity
from tandem.runs.lines import read_metrics
from tandem.runs.progress import Progress, format_number, say
from tandem.runs.table import print_table
from tandem.schedules.session import Session
from tandem.training.optim import OptimParams

ALWAYS = ("grad_norm", "seconds", "tokens_per_second")
"""The last 3 metrics that the display shows, whatever the method."""


def optim_params(section: OptimSection, *, total_steps: int, learning_rate: float | None = None) -> OptimParams:
    """The optimizer of one model; ``total_steps`` are the run's."""
    warmup = section.warmup_steps
    return OptimParams(
        learning_rate=learning_rate or section.learning_rate,
        total_steps=total_steps,
        lr_schedule=section.lr_schedule,
        warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
        weight_decay=section.weight_decay,
        betas=section.betas,
        max_grad_norm=section.max_grad_norm,
    )


def evaluation_due(run: RunSection, data: DataSection, step: int) -> bool:
    """Before the first step, every ``eval_every`` steps and after the last."""
    return step in (0, run.steps) or (data.eval_every > 0 and step % data.eval_every == 0)


def print_plan(config: Any, uses: Mapping[str, str]) -> None:
    """What ``--dry-run`` shows: the resolved config and what the run would use."""
    width = max(map(len, uses))
    print(describe(config))
    print("\nwould use")
    for what, value in uses.items():
        print(f"  {what:<{width}}  {value}")


def load_data(section: DataSection) -> tuple[Rows, Rows | None]:
    """The rows of ``data`` and of ``eval_data``. Read before any model, since a mistake in them shows soonest."""
    rows = load_rows(section.data, split=section.split)
    return rows, load_rows(section.eval_data, split=section.eval_split) if section.eval_data else None


def run_start(config: Any, method: str, inputs: Inputs | None = None) -> Start:
    """What a command would begin in its run folder, or go on with. ``inputs``: None where nothing is read yet."""
    run = config.run
    return Start(
        method=method,
        seed=run.seed,
        config=dump_config(config),
        changeable=changeable(config),
        inputs=inputs,
        accepted=run.accept_changed,
        resume=run.resume,
        overwrite=run.overwrite,
    )


def check_out(config: Any, method: str, inputs: Inputs | None = None) -> Path | None:
    """Refuses an ``--out`` that cannot be used, and a run that cannot be resumed, before anything slow is loaded.

    Creates nothing. Returns the model of a run that has done all its steps: nothing of it is to be done again.
    """
    run, out = config.run, Path(config.run.out)
    RunFolder.check(out, run_start(config, method, inputs))
    if not run.resume or not (out / IDENTITY).exists() or did_nothing(out):
        return None
    identity = {name: value for name, value in read_identity(out).items() if name != "inputs"}
    checkpoint = CheckpointStore(out / "checkpoints", keep=run.keep, run=identity).latest()
    finished = RunFolder.finished(out)
    done = max(checkpoint.step if checkpoint else 0, finished or 0)
    if done > run.steps:
        raise UserError(f"steps: {run.steps}, and the run in {out} has done {done} already; give more than {done}")
    if finished != run.steps or run.dry_run:
        return None
    say(f"{out}: all {run.steps} steps are done, nothing is left to resume")
    return out / "model"


def tell_end(out: Path, leads: Seq[str], *commands: str) -> None:
    """How far a finished run has come, where its model is, and commands that could follow."""
    rows = []
    records = read_metrics(out / "metrics.jsonl")
    for name in (shown for lead in leads for shown in (lead, f"eval/{lead}")):
        values = [record[name] for record in records if name in record]
        if values:
            rows.append((name, format_number(values[0]), format_number(values[-1])))
    print_table(f"{out}: {records[-1]['step']} steps", ("", "first", "last"), rows)
    print(f"\nThe model is in {out / 'model'}")
    for command in commands:
        print(f"  next: {command}")


def following(name: str, out: Path, **flags: Any) -> str:
    """A command that could follow the run in ``out``, as one would type it. Its own run is beside that."""
    words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    return shlex.join(["tandem", name, *words, "--out", str(out.with_name(name))])


@contextmanager
def session(
    config: Any,
    trainers: Mapping[str, Seat],
    *,
    title: str,
    leads: Seq[str],
    counts: Mapping[str, int],
    inputs: Inputs,
) -> Iterator[Session]:
    """The run folder, open; its config written; the display on; what is loaded out of the garbage collector's way.

    The display shows the metrics ``leads``, and those that every schedule writes.
    Called once everything the run needs is loaded and valid, so that a wrong input never leaves a half-made folder.
    """
    run = config.run
    folder = RunFolder.open(Path(run.out), run_start(config, title, inputs))
    with folder:
        folder.event("start", title=title, **counts)
        store = CheckpointStore(folder.checkpoints, keep=run.keep, run=folder.identity)
        checkpoint = store.latest()
        with (
            standing_objects(),
            Progress(
                title, total=run.steps, start=checkpoint.step if checkpoint else 0, leads=(*leads, *ALWAYS)
            ) as progress,
        ):
            if folder.replaced:
                progress.note(f"{run.out}: in place of a run that had done no step")
            elif run.resume and checkpoint is None:
                progress.note(f"{run.out}: no checkpoint to resume from; the run begins with step 1")
            if "steps" in folder.changed:
                before, now = folder.changed["steps"]
                share = ", and so was the warmup, a share of them" if 0 < config.optim.warmup_steps < 1 else ""
                progress.note(f"steps: {now} now; what is done was done for {before}{share}")
            if counts["kept"] < counts["rows"] or counts["truncated"]:
                progress.note(f"data: {describe_counts(counts)}")
            yield Session(
                run=folder,
                store=store,
                save_every=SaveEvery.parse(run.save_every),
                trainers=trainers,
                progress=progress,
                rollouts_logged=run.rollouts_logged,
            )


@contextmanager
def standing_objects() -> Iterator[None]:
    """Keeps full collections of garbage from walking all that stands, which takes a quarter of a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def tokenizing(rows: Rows) -> Iterator[Callable[[int, int], None]]:
    """A callback for (rows done, rows in all), which shows a bar where that takes longer than a second."""
    say(f"tokenizing {len(rows)} rows of {rows.source}")
    started = time.monotonic()
    with ExitStack() as stack:
        bar: Progress | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None and time.monotonic() - started > 1:
                bar = stack.enter_context(Progress(f"tokenizing {rows.source}", total=total, start=done))
            if bar is not None:
                bar.update(done)

        yield on_progress


def describe_counts(counts: Mapping[str, int]) -> str:
    """How many rows are used, and what became of the others."""
    rest = ", ".join(f"{counts[what]} {what}" for what in ("truncated", "dropped") if counts[what])
    return f"{counts['kept']} rows" + (f" ({rest})" if rest else "")
