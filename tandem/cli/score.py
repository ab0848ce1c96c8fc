"""``tandem score``."""

from __future__ import annotations

from tandem.assembly.scored import score_rows, summary
from tandem.assembly.uses import ScoreConfig
from tandem.runs.progress import format_number
from tandem.runs.table import print_table


def run(config: ScoreConfig) -> int:
    """The command."""
    if path := score_rows(config):
        print_table(config.data.data, ("", "value"), [(name, format_number(v)) for name, v in summary(path).items()])
        print(f"\nThe rows and their rewards are in {path}")
    return 0
