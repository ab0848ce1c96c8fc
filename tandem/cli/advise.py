"""``tandem advise``, and what a run on samples says at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tandem.cli.configs import AdviseConfig
from tandem.errors import UserError
from tandem.methods.table import SAMPLES, method_class
from tandem.runs.advice import advise_run
from tandem.runs.identity import IDENTITY, read_identity


def run(config: AdviseConfig) -> int:
    """The command."""
    out = Path(config.advised.run)
    if not (out / IDENTITY).exists():
        raise UserError(f"{out}: not the folder of a run: it has no {IDENTITY}")
    tell(out)
    return 0


def tell(out: Path) -> None:
    """Prints what follows from a run's seconds, on a terminal in lines that end between words."""
    title, console = read_identity(out)["method"], Console()
    pairwise = any(method.pairwise and method.title == title for method in map(method_class, SAMPLES))
    for line in advise_run(out, pairwise=pairwise):
        console.print(f"advice: {line}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
