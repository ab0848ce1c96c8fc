"""What every command does around its own work: start a run in its folder, and build what the sections describe."""

from __future__ import annotations

import gc
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from tandem.checkpoint.saver import SaveEvery
from tandem.checkpoint.store import CheckpointStore
from tandem.cli.sections import ROLES, ClusterSection, DataSection, OptimSection, RunSection
from tandem.config import describe, dump_config
from tandem.data.rows import Rows, load_rows
from tandem.roles import Trainer
from tandem.runs.folder import CONFIG, RunFolder, require_same_config
from tandem.runs.lines import read_metrics
from tandem.runs.progress import Progress, format_number, say
from tandem.runs.table import print_table
from tandem.schedules.session import Session
from tandem.training.optim import OptimParams

MAY_CHANGE = {
    *("out", "steps", "save_every", "keep", "rollouts_logged"),
    *(f"placement.{role}" for role in ROLES),
    *(f"cluster.{key.name}" for key in fields(ClusterSection)),
}
"""Keys that may differ between a run and its resumption: none of them changes what is computed."""


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


def check_out(run: RunSection) -> None:
    """Refuses an ``--out`` that cannot be used, before anything slow is loaded. Creates nothing."""
    RunFolder.check(Path(run.out), resume=run.resume, overwrite=run.overwrite)


def finished_model(config: Any, run: RunSection) -> Path | None:
    """The model of a run that ``--resume`` finds at its last step already. Raises UserError where it is another run."""
    out = Path(run.out)
    if not run.resume or RunFolder.finished(out) != run.steps:
        return None
    require_same_config(out / CONFIG, dump_config(config), MAY_CHANGE)
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
    run: RunSection,
    trainers: Mapping[str, Trainer],
    *,
    title: str,
    leads: Seq[str],
    counts: Mapping[str, int],
) -> Iterator[Session]:
    """The run folder, open; its config written; the display on; what is loaded out of the garbage collector's way.

    The display shows the metrics ``leads``, and those that every schedule writes.
    Called once everything the run needs is loaded and valid, so that a wrong input never leaves a half-made folder.
    """
    folder = RunFolder.open(
        Path(run.out), config=dump_config(config), resume=run.resume, overwrite=run.overwrite, ignore=MAY_CHANGE
    )
    with folder:
        folder.event("start", title=title, **counts)
        store = CheckpointStore(folder.checkpoints, keep=run.keep)
        checkpoint = store.latest()
        with (
            standing_objects(),
            Progress(
                title, total=run.steps, start=checkpoint.step if checkpoint else 0, leads=(*leads, *ALWAYS)
            ) as progress,
        ):
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
