"""The commands that use a model without training it."""

from __future__ import annotations

from pathlib import Path

from tandem.assembly.configs.uses import (
    EvalConfig,
    EvalRowsConfig,
    ExportConfig,
    GenerateConfig,
    SampleConfig,
    ScoreConfig,
)
from tandem.assembly.uses.best_and_pairs import write_best, write_pairs
from tandem.assembly.uses.evaluated import evaluate_rows, evaluate_samples
from tandem.assembly.uses.export import export as write_model
from tandem.assembly.uses.sampled import sample_rows
from tandem.assembly.uses.scored import score_rows, summary
from tandem.cli.train import following
from tandem.errors import UserError
from tandem.runs.folder import BEST, MEASURED, PAIRS
from tandem.runs.progress import format_number
from tandem.runs.table import print_table


def generate(config: GenerateConfig) -> int:
    """``tandem generate``."""
    if path := sample_rows(config, "generate"):
        print(f"\nThe samples are in {path}")
    return 0


def sample(config: SampleConfig) -> int:
    """``tandem sample``. Raises UserError where nothing is left to train on."""
    samples = sample_rows(config, "sample")
    if samples is None:
        return 0
    print(f"\nThe samples and their rewards are in {samples}")
    keep = config.kept.keep
    if keep == "all":
        return 0
    out = samples.with_name(BEST if keep == "best" else PAIRS)
    counts = write_best(samples, out, config.kept.min_reward) if keep == "best" else write_pairs(samples, out)
    words = {
        "below": f"with a best reward below {config.kept.min_reward}",
        "ties": "whose samples are equally good",
        "unjudged": "with too few rewards",
    }
    rest = ", ".join(f"{counts[what]} {said}" for what, said in words.items() if counts[what])
    if not counts["kept"]:
        raise UserError(f"{samples}: no prompt in it can be kept: {rest}; nothing to train on")
    print(f"{counts['kept']} prompts are kept in {out}" + (f"; left out are {rest}" if rest else ""))
    method = "sft" if keep == "best" else "dpo"
    print(f"  next: {following(method, Path(config.run.out), model=config.model.model, data=out, steps=500)}")
    return 0


def score(config: ScoreConfig) -> int:
    """``tandem score``."""
    if path := score_rows(config):
        print_table(config.data.data, ("", "value"), [(name, format_number(v)) for name, v in summary(path).items()])
        print(f"\nThe rows and their rewards are in {path}")
    return 0


def evaluate(config: EvalConfig | EvalRowsConfig) -> int:
    """``tandem eval``."""
    metrics = evaluate_rows(config) if isinstance(config, EvalRowsConfig) else evaluate_samples(config)
    if metrics is None:
        return 0
    errors = {name.removesuffix("_se"): f"± {format_number(v)}" for name, v in metrics.items() if name.endswith("_se")}
    columns = ("", "value", "standard error") if errors else ("", "value")
    rows = [
        (name, format_number(value), errors.get(name, ""))[: len(columns)]
        for name, value in metrics.items()
        if not name.endswith("_se")
    ]
    print_table(f"{config.model.model} on {config.data.data}", columns, rows)
    print(f"\nThe numbers are in {Path(config.run.out) / MEASURED}")
    return 0


def export(config: ExportConfig) -> int:
    """``tandem export``."""
    print(f"\nThe model is in {write_model(config)}")
    return 0
