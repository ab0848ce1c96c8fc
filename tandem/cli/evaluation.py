"""``tandem eval``."""

from __future__ import annotations

from pathlib import Path

from tandem.assembly.evaluated import evaluate_rows, evaluate_samples
from tandem.assembly.uses import EvalConfig, EvalRowsConfig
from tandem.runs.folder import MEASURED
from tandem.runs.progress import format_number
from tandem.runs.table import print_table


def run(config: EvalConfig | EvalRowsConfig) -> int:
    """The command."""
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
