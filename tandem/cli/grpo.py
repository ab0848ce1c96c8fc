"""``tandem grpo``: group relative policy optimization, without a critic."""

from __future__ import annotations

from pathlib import Path

from tandem.cli.configs import GRPOConfig
from tandem.cli.online import Online


def train(config: GRPOConfig) -> Path | None:
    """Trains and returns the folder of the trained model; None after a dry run."""
    return Online(config, config.algorithm, None, "GRPO").run()


def run(config: GRPOConfig) -> int:
    """The command."""
    train(config)
    return 0
