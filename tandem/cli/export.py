"""``tandem export``."""

from __future__ import annotations

from tandem.assembly.export import export
from tandem.assembly.uses import ExportConfig


def run(config: ExportConfig) -> int:
    """The command."""
    print(f"\nThe model is in {export(config)}")
    return 0
