"""``tandem score``."""

from __future__ import annotations

import statistics

from tandem.assembly.scored import accuracy, score_rows
from tandem.assembly.uses import ScoreConfig
from tandem.runs.lines import read_lines
from tandem.runs.progress import format_number
from tandem.runs.table import print_table


def run(config: ScoreConfig) -> int:
    """The command."""
    path = score_rows(config)
    if path is None:
        return 0
    rows = read_lines(path)
    found: dict[str, float] = accuracy(path)
    for name in ("reward", "chosen_reward", "rejected_reward"):
        judged = [row[name] for row in rows if row.get(name) is not None]
        found |= {name: statistics.fmean(judged)} if judged else {}
    if "reward" in rows[0]:
        found["unjudged"] = sum(row["reward"] is None for row in rows)
    print_table(
        f"{len(rows)} rows of {config.data.data}", ("", "value"), [(n, format_number(v)) for n, v in found.items()]
    )
    print(f"\nThe rows and their rewards are in {path}")
    return 0
