"""A finished model measured on held-out data: prompts by samples that are judged, rows by a method's own loss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tandem.assembly.configs.sections import EngineSection
from tandem.assembly.configs.uses import EvalConfig, EvalRowsConfig
from tandem.assembly.feeds import RowsFeed
from tandem.assembly.models import load_models, scalar_roles
from tandem.assembly.placing import Homes
from tandem.assembly.plans import models_used, print_plan
from tandem.assembly.sessions import checked_start
from tandem.assembly.text_feed import TextFeed
from tandem.assembly.uses.sampled import sample_rows
from tandem.errors import UserError
from tandem.models.scalar import require_head
from tandem.roles import Metrics
from tandem.rollout.evaluate import HeldOut
from tandem.rollout.measure import held_out_metrics
from tandem.runs.folder import MEASURED, RunFolder
from tandem.runs.lines import iterate_lines
from tandem.runs.progress import Progress
from tandem.types import Group, Prompt, Rollout
from tandem.whole import write_aside


def evaluate_samples(config: EvalConfig) -> Metrics | None:
    """Writes ``samples.jsonl`` and ``evaluation.json``; what stands in the latter, or None for a dry run.

    Raises UserError where no sample has a reward.
    """
    samples = sample_rows(config, "eval")
    if samples is None:
        return None
    groups = list(_groups(iterate_lines(samples)))
    if not any(group.usable for group in groups):
        raise UserError(f"{samples}: no sample in it has a reward, so there is nothing to report")
    return _written(Path(config.run.out), held_out_metrics(groups, success=config.success.eval_success))


def _groups(rows: Iterable[Mapping[str, Any]]) -> Iterable[Group]:
    """The rows of a ``samples.jsonl`` as groups, of which tokens are only counted."""
    for number, of_prompt in groupby(rows, key=lambda row: row["row"]):
        rollouts = [
            Rollout.of_answer(
                str(number),
                row["sample"],
                row["stop"],
                ids=[0] * row["length"],
                reward=row["reward"],
                reward_parts=row["reward_parts"],
            )
            for row in of_prompt
        ]
        yield Group(prompt=Prompt(prompt_id=str(number), prompt="", token_ids=()), rollouts=rollouts)


def evaluate_rows(config: EvalRowsConfig) -> Metrics | None:
    """Writes ``evaluation.json``: what the method's run would report of held-out rows. None for a dry run."""
    run, out = config.as_run, Path(config.run.out)
    title = f"eval {config.method.title}"
    checked_start(config, title)
    homes = Homes(config.model, config.placement, config.cluster, EngineSection(), [*run.sources])
    homes.check()
    if config.method.head == "scalar":
        require_head(config.model.model)
    feed = TextFeed(run) if run.reads.kind == "text" else RowsFeed(run)
    start = checked_start(config, title, feed.inputs)
    if isinstance(feed, RowsFeed):
        config.method.aside(feed.examples, feed.longest)
    if config.run.dry_run:
        uses = models_used(run, scalar_roles(run))
        print_plan(config, uses | {"data": str(feed.counts or feed.uses()["data"])})
        return None
    with homes:
        models = load_models(run, homes.begin, 1, new_head="refuse")
        measure: HeldOut = (
            feed.measure(models, {"": feed.corpus})
            if isinstance(feed, TextFeed)
            else feed.measure(models, {"": feed.examples})
        )
        with RunFolder.open(start), Progress(title, total=1) as progress:
            found = measure(0, progress.phase).metrics
            return _written(out, {name.removeprefix("eval/"): value for name, value in found.items()})


def _written(out: Path, metrics: Metrics) -> Metrics:
    write_aside(out / MEASURED, json.dumps(metrics, indent=1) + "\n")
    return metrics
